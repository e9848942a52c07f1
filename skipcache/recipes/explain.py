"""What a recipe will do, for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from skipcache.recipes.plan import PlannedRun, speedup_of
from skipcache.recipes.recipe import DEFAULT_SPEEDUP, Recipe, planned


def explained(
    recipe: Recipe, *, speedups: Sequence[float] | None = None, steps: int | None = None
) -> str:
    """The recipe in words, and a line for each speedup: █ refreshes, · takes an estimate.

    Args:
        recipe: which.
        speedups: default: those it was measured at, or 2.
        steps: of the run; default: those it was calibrated at.

    Raises:
        ConfigError: a speedup out of reach, or fewer than three steps.
    """
    record, scheduler = recipe.record, recipe.record.scheduler
    prediction = scheduler["prediction_type"]
    lines = [
        f"Recipe for {record.base_model.name} with {scheduler['name']}"
        + (f" ({prediction})" if prediction else ""),
        f"  calibrated at {recipe.steps} steps, samples of {_sizes(record.sample_shape)}"
        + (f", guidance {record.guidance_scale:g}" if record.guidance_scale is not None else ""),
        f"  {record.made_by}",
        f"  a reuse step takes {recipe.reuse_cost:.1%} of the time of a refresh; up to "
        f"{recipe.highest_speedup:.1f}x",
    ]
    for speedup, run in runs_of(recipe, speedups, steps):
        count, length = sum(run.plan), len(run.plan)
        error = recipe.predicted_error(speedup, length)
        lines += [
            "",
            f"{speedup:g}x at {length} steps: {count} refresh, "
            f"{speedup_of(length, count, recipe.reuse_cost):.2f}x expected",
            f"  {''.join('█' if is_refresh else '·' for is_refresh in run.plan)}",
            f"  predicted error {error:.2%} of the sample ({-20 * math.log10(error):.1f} dB)"
            if error > 0
            else "  nothing is reused",
        ]
        for point in recipe.points:
            if point.speedup == speedup and length == recipe.steps:
                found = point.measured
                lines.append(
                    f"  measured {found.decibels:.1f} ± {found.deviation:.1f} dB on {found.samples}"
                    " samples held out"
                )
    return "\n".join(lines)


def runs_of(
    recipe: Recipe, speedups: Sequence[float] | None, steps: int | None
) -> list[tuple[float, PlannedRun]]:
    """Each speedup, and what a run does at it; arguments as of ``explained``."""
    wanted = speedups or [point.speedup for point in recipe.points] or [DEFAULT_SPEEDUP]
    times = recipe.times_of(steps)
    return [(float(speedup), planned(recipe, speedup, times)) for speedup in wanted]


def _sizes(shape: Sequence[int]) -> str:
    return " x ".join(str(size) for size in shape) or "unknown size"
