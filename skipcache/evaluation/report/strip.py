"""What a recipe does, as a picture: layers by steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from skipcache.evaluation.drawing import require_matplotlib
from skipcache.recipes.explain import runs_of
from skipcache.recipes.recipe import Recipe


def write_strip(
    recipe: Recipe,
    path: str | Path,
    *,
    speedups: Sequence[float] | None = None,
    steps: int | None = None,
) -> Path:
    """Draws which layers run at which step, one strip a speedup. Needs matplotlib.

    Args:
        recipe: which.
        path: of the PNG.
        speedups: as for ``explained``.
        steps: likewise.

    Returns:
        The path.

    Raises:
        ConfigError: as ``explained``, or matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    runs = runs_of(recipe, speedups, steps)
    figure = Figure(figsize=(8, 0.9 * len(runs) + 0.6), layout="constrained")
    rows = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    depth = recipe.record.layers
    for axes, (speedup, run) in zip(rows, runs, strict=True):
        starts = [i for i, is_refresh in enumerate(run.plan) if is_refresh]
        axes.broken_barh([(start, 1) for start in starts], (0, depth), color="#0072b2")
        axes.set(xlim=(0, len(run.plan)), ylim=(depth, 0), yticks=[0, depth])
        axes.set_ylabel(f"{speedup:g}x", rotation=0, ha="right", va="center")
    rows[-1].set_xlabel("denoising step (left: noise); layers that run, front at the top")
    figure.savefig(path, dpi=120)
    return Path(path)
