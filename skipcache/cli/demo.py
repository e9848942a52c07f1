"""``skipcache demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "demo",
        help="generate pictures with and without the cache; print a table, write a PNG",
        description="Samples the model that comes with skipcache, uncached and cached in turns.",
    )
    parser.add_argument("--out", type=Path, default=Path("skipcache_demo.png"), help="the picture")
    parser.add_argument("--steps", type=_positive, default=50, help="denoising steps")
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise")
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--repeats", type=_positive, default=5, help="measured runs a method")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo and shows its result."""
    from tqdm import tqdm

    from skipcache.demo.show import number_of_methods, run_demo, save_picture

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    total = (arguments.repeats + 1) * number_of_methods()
    with tqdm(total=total, desc="sampling", unit="run") as bar:
        result = run_demo(
            steps=arguments.steps,
            seed=arguments.seed,
            guidance_scale=arguments.guidance_scale,
            repeats=arguments.repeats,
            progress=bar.update,
        )
    save_picture(result, arguments.out)
    print(f"\n{result.table()}\n")
    print(
        f"Ten classes, {arguments.steps} DDIM steps, guidance {arguments.guidance_scale:g}, seed "
        f"{arguments.seed}; "
        f"median of {arguments.repeats} runs taken in turns.\nPicture: {arguments.out}"
    )
    return 0
