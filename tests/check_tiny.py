"""Runs the conformance kit on tiny transformers: python tests/check_tiny.py ADAPTER CLASS..."""

import functools
import importlib
import sys
import time
import warnings

sys.path.insert(0, "tests")
sys.path.insert(0, "adapters")
warnings.simplefilter("ignore")

module, *names = sys.argv[1:]
adapter = importlib.import_module(f"skipcache_adapters.{module}")
from skipcache.testing import CheckSkipped, adapter_checks  # noqa: E402
from tiny import TINY  # noqa: E402

for name in names:
    tiny = TINY[name]
    other = functools.partial(tiny.inputs, batch=2) if tiny.batches else None
    for check in adapter_checks(tiny.make, tiny.inputs, make_other_inputs=other, adapter=adapter):
        started = time.perf_counter()
        try:
            check()
            result = "ok"
        except CheckSkipped as skipped:
            result = f"skipped: {skipped}"
        except Exception as error:
            result = f"FAILED {type(error).__name__}: {error}"
        print(f"{name} {check} {time.perf_counter() - started:.1f}s {result}", flush=True)
