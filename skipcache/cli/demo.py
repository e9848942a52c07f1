"""``skipcache demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from skipcache.demo.model import DEFAULT_TASK, MODELS


def add_to(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "demo",
        help="generate pictures or clips with and without the cache; print a table, draw them",
        description="Samples a model that comes with skipcache, uncached and cached in turns.",
    )
    parser.add_argument("--task", choices=MODELS, default=DEFAULT_TASK, help="what to generate")
    parser.add_argument(
        "--out", type=Path, help="the picture; default: skipcache_demo.png, or .gif for clips"
    )
    parser.add_argument("--steps", type=_positive, default=50, help="denoising steps")
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise")
    parser.add_argument("--guidance-scale", type=float, help="default: 2 for classes, 3 for text")
    parser.add_argument(
        "--repeats", type=_positive, help="measured runs a method; default: 5, 3 or 2, by task"
    )
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo and shows its result."""
    from tqdm import tqdm

    from skipcache.demo.show import check_picture, number_of_methods, run_demo, save_picture
    from skipcache.demo.tasks import task_named

    task = task_named(arguments.task)
    out = Path(task.picture) if arguments.out is None else arguments.out
    guidance = task.guidance_scale if arguments.guidance_scale is None else arguments.guidance_scale
    repeats = task.repeats if arguments.repeats is None else arguments.repeats
    check_picture(out)
    total = (repeats + 1) * number_of_methods(arguments.task)
    with tqdm(total=total, desc="sampling", unit="run") as bar:
        result = run_demo(
            task=arguments.task,
            steps=arguments.steps,
            seed=arguments.seed,
            guidance_scale=guidance,
            repeats=repeats,
            progress=bar.update,
        )
    save_picture(result, out)
    print(f"\n{result.table()}\n")
    print(
        f"{len(task.captions)} samples, {arguments.steps} DDIM steps, guidance {guidance:g}, seed "
        f"{arguments.seed}; median of {repeats} runs taken in turns.\nPicture: {out}"
    )
    return 0
