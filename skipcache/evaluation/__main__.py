"""``python -m skipcache.evaluation NAME``: measures, and prints one table each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from skipcache.evaluation import (
    benchmark,
    convert_memory,
    fits,
    presets,
    quality,
    recipes,
    rival_overhead,
)

BENCHMARKS: dict[str, Callable[[], str]] = {
    "overhead": benchmark.overhead,
    "rival-overhead": rival_overhead.rival_overhead,
    "speedup": benchmark.speedup,
    "presets": presets.presets,
    "sizes": presets.sizes,
    "relayouts": presets.relayouts,
    "memory": benchmark.memory,
    "syncs": benchmark.syncs,
    "estimators": quality.estimators,
    "fit": fits.fits,
    "recipe-ablation": recipes.recipe_ablation,
    "recipe-steps": recipes.recipe_steps,
    "recipe-adaptive": recipes.recipe_adaptive,
    "recipe-prediction": recipes.recipe_prediction,
    "convert-memory": convert_memory.convert_memory,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmarks named on the command line, all of them by default."""
    parser = argparse.ArgumentParser(prog="python -m skipcache.evaluation", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(BENCHMARKS)}")
    names = parser.parse_args(argv).names or list(BENCHMARKS)
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark is named {name!r}. Allowed: {', '.join(BENCHMARKS)}.")
    for name in names:
        run = BENCHMARKS[name]
        print(f"\n{name}: {(run.__doc__ or '').splitlines()[0]}\n\n{run()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
