"""``python -m skipcache.evaluation overhead|speedup|memory|syncs``: prints one table each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from skipcache.evaluation.benchmark import BENCHMARKS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmarks named on the command line, all of them by default."""
    parser = argparse.ArgumentParser(prog="python -m skipcache.evaluation", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(BENCHMARKS)}")
    names = parser.parse_args(argv).names or list(BENCHMARKS)
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark is named {name!r}. Allowed: {', '.join(BENCHMARKS)}.")
    for name in names:
        benchmark = BENCHMARKS[name]
        print(f"\n{name}: {(benchmark.__doc__ or '').splitlines()[0]}\n\n{benchmark()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
