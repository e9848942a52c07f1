"""``skipcache calibrate``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from skipcache.cli.bench import add_subject_arguments, subject_of
from skipcache.errors import ConfigError

CALLS = 8  # at least, where the samples allow it


def add_to(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "calibrate",
        help="find a recipe for a pipeline: name the speedup, get the best it can give",
        description="Samples a pipeline a few times, finds from its outputs when to refresh and "
        "what to take for the outputs in between, and writes recipe.json and recipe.safetensors. "
        "A run that was stopped goes on where it was.",
    )
    add_subject_arguments(parser)
    parser.add_argument(
        "--speedup",
        type=float,
        nargs="+",
        default=[1.5, 2.0, 3.0],
        help="wall-clock factors to measure quality at; default: 1.5 2 3",
    )
    parser.add_argument(
        "--samples", type=int, default=32, help="to measure on; default: %(default)s"
    )
    parser.add_argument(
        "--refine",
        type=int,
        default=0,
        help="for each speedup, how many changed schedules are tried by sampling; default: "
        "%(default)s",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the recipe; default: recipe- and the pipeline's name (demo is "
        "class-to-image)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Calibrates, and prints what the recipe will do."""
    from tqdm import tqdm

    from skipcache.recipes.calibrate import calibrate
    from skipcache.recipes.explain import explained

    if arguments.samples < 2:
        raise ConfigError(f"--samples is {arguments.samples}. At least two are needed.")
    subject = subject_of(arguments, steps=arguments.steps)
    if arguments.batch_size is None:  # a tenth of the calls is held out, so several are wanted
        batch_size = max(1, min(subject.batch_size, arguments.samples // CALLS))
        subject = replace(subject, batch_size=batch_size)
    out = arguments.out or Path(f"recipe-{Path(subject.name).name}")
    batches = subject.batches(arguments.samples)
    if len(batches) < 2:
        raise ConfigError(
            f"--samples {arguments.samples} is one call of {subject.batch_size}, and two are "
            "needed. Ask for more, or lower --batch-size."
        )
    calls = []
    for batch in batches:
        call = subject.call_of(batch, arguments.seed)
        calls.append({name: value for name, value in call.items() if name != "generator"})
    checkpoint = out / "calibration.safetensors"
    with tqdm(unit="run") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        recipe = calibrate(
            subject.pipeline,
            calls,
            speedups=arguments.speedup,
            refine=arguments.refine,
            checkpoint=checkpoint,
            seed=arguments.seed * 1_000_003,
            progress=progress,
        )
    recipe.save_pretrained(out)
    checkpoint.unlink(missing_ok=True)
    print(f"\n{explained(recipe)}\n\nUse it: apply_skip_cache(pipe, recipe={str(out)!r})")
    return 0
