"""Fits branches to the packed demo model and puts them beside its weights, in half precision.

    python examples/fashion_dit/fit_branches.py --model skipcache/demo/fashion_dit

Minutes on two cores. ``apply_skip_cache`` uses them whenever the model is loaded from there.
"""

import argparse
import dataclasses
from pathlib import Path

from skipcache.demo import load_pipeline
from skipcache.evaluation.fits import demo_fit, error_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="pipeline folder")
    args = parser.parse_args()
    fit = demo_fit(load_pipeline(args.model))
    print(error_table(fit))
    halves = tuple(tuple(part.half() for part in matrix) for matrix in fit.matrices)
    folder = args.model / "transformer"
    dataclasses.replace(fit, matrices=halves).save_pretrained(folder)
    size = (folder / "skip_branches.safetensors").stat().st_size
    print(f"{folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
