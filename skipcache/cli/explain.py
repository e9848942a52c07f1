"""``skipcache explain``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "explain",
        help="what a recipe will do, as text and as a picture",
        description="Prints what a recipe was made for, and for each speedup which steps refresh, "
        "how near the samples come by prediction, and how near they came where it was measured.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="its folder or hub id")
    parser.add_argument(
        "--speedup", type=float, nargs="+", help="default: those it was measured at"
    )
    parser.add_argument("--steps", type=int, help="of the run; default: as calibrated")
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw layers by steps as well")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the text, and the name of the picture."""
    from skipcache.recipes.explain import explained
    from skipcache.recipes.recipe import Recipe

    recipe = Recipe.from_pretrained(arguments.recipe)
    options = {"speedups": arguments.speedup, "steps": arguments.steps}
    print(explained(recipe, **options))
    if arguments.out is not None:
        from skipcache.evaluation.report.strip import write_strip

        print(f"\n{write_strip(recipe, arguments.out, **options)}")
    return 0
