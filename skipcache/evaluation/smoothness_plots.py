"""Draws the smoothness of one model or several, side by side, and writes all that was measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skipcache.errors import ConfigError
from skipcache.evaluation.drawing import require_matplotlib
from skipcache.evaluation.smoothness import Array, Smoothness, measure_smoothness
from skipcache.evaluation.smoothness_surface import (
    DEFAULT_GRID,
    Surface,
    check_settings,
    perturbation_surface,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from skipcache.backbone import Backbone

COLOURS = "cividis"  # reads the same to colour-blind eyes, and in grey
NOT_MEASURED = "#d0d0d0"
CONTOURS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
DECADES = 3  # that a heat-map's colours span at most


def write_smoothness(
    pipes: Mapping[str, Any],
    call: Mapping[str, Any],
    folder: str | Path,
    *,
    step: int | None = None,
    grid: int = DEFAULT_GRID,
    span: float = 1.0,
    seed: int = 0,
    adapter: str | Backbone | object | None = None,
    component: str = "transformer",
    progress: Callable[[], object] | None = None,
) -> tuple[Path, ...]:
    """Measures pipelines in turn, with the same noise and directions, and writes what was found.

    Args:
        pipes: pipeline by name: ``{"before": pipe, "after": another}``. The name is the title of
            its pictures, and part of the names of its CSV files where there are several.
        call: keywords of every call, ``pipe(**call)``.
        folder: created if need be.
        step, grid, span, seed, adapter, component, progress: as for ``perturbation_surface``.

    Returns:
        The files: two CSV files a pipeline, ``smoothness.png`` and ``surface.png``.

    Raises:
        SkipCacheError: as ``measure_smoothness`` and ``perturbation_surface``; no pipeline; no
            matplotlib, before anything is measured.
        OSError: the folder cannot be written, likewise.
    """
    require_matplotlib()
    check_settings(step, grid, span)
    if not pipes:
        raise ConfigError("pipes is empty. Name at least one pipeline: {'before': pipe}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    common: dict[str, Any] = {"seed": seed, "adapter": adapter, "component": component}
    features, surfaces = {}, {}
    for name, pipe in pipes.items():
        features[name] = measure_smoothness(pipe, call, **common)
        surfaces[name] = perturbation_surface(
            pipe, call, step=step, grid=grid, span=span, progress=progress, **common
        )
    written = []
    for name in pipes:
        suffix = f"-{re.sub(r'[^A-Za-z0-9_.]+', '-', name)}" if len(pipes) > 1 else ""
        written.append(features[name].save_csv(folder, f"smoothness{suffix}"))
        written.append(surfaces[name].save_csv(folder, f"surface{suffix}"))
    written.append(plot_smoothness(features, folder / "smoothness.png"))
    written.append(plot_surfaces(surfaces, folder / "surface.png"))
    return tuple(written)


def plot_smoothness(measured: Mapping[str, Smoothness], path: str | Path) -> Path:
    """Draws heat-maps, layer by step: above 1 - cosine similarity, below relative L1 change.

    Args:
        measured: by title; a column each, with colours that mean the same in all of them.
        path: of the PNG.

    Raises:
        SkipCacheError: matplotlib is not installed.
    """
    rows = {
        "1 - cosine similarity": {name: 1 - each.similarity for name, each in measured.items()},
        "relative L1 change": {name: each.change for name, each in measured.items()},
    }
    figure = _figure(1.0 + 5.2 * len(measured), 6.6)
    all_axes = figure.subplots(len(rows), len(measured), squeeze=False)
    for (what, values), row in zip(rows.items(), all_axes, strict=True):
        low, high = _log_limits(values.values())
        for (name, each), axes in zip(values.items(), row, strict=True):
            image = _draw_heat_map(axes, each, low, high, measured[name].times)
            axes.set_title(f"{name}: change between neighbouring steps")
        figure.colorbar(image, ax=list(row), label=what)
    return _save(figure, path)


def plot_surfaces(measured: Mapping[str, Surface], path: str | Path) -> Path:
    """Draws perturbation surfaces as maps with contours.

    Args:
        measured: by title; a column each, with colours that mean the same in all of them.
        path: of the PNG.

    Raises:
        SkipCacheError: matplotlib is not installed.
    """
    figure = _figure(1.2 + 4.2 * len(measured), 4.6)
    columns = figure.subplots(1, len(measured), squeeze=False)[0]
    finite = np.concatenate([s.similarity[np.isfinite(s.similarity)] for s in measured.values()])
    low = min(float(finite.min(initial=1.0)), 0.9)
    for (name, surface), axes in zip(measured.items(), columns, strict=True):
        image = _draw_surface(axes, surface, low)
        axes.set_title(f"{name}, step {surface.step} (time {surface.time:.2f})")
    figure.colorbar(image, ax=list(columns), label="cosine similarity of the predicted noise")
    return _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")  # no state beyond the figure


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def _log_limits(values: Iterable[Array]) -> tuple[float, float]:
    """Limits of a logarithmic colour scale for all the values; zeros take the lowest colour."""
    joined = np.concatenate([each.ravel() for each in values])
    positive = joined[np.isfinite(joined) & (joined > 0)]
    high = float(positive.max(initial=1e-6))
    low = float(positive.min(initial=high))
    return min(max(low, high / 10**DECADES), high / 10), high


def _draw_heat_map(axes: Axes, values: Array, low: float, high: float, times: Array) -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    layers, pairs = values.shape
    image = axes.imshow(
        np.ma.masked_invalid(np.clip(values, low, high)),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, pairs + 0.5, -0.5, layers - 0.5),
        cmap=colormaps[COLOURS].with_extremes(bad=NOT_MEASURED),
        norm=LogNorm(low, high),
    )
    ticks = sorted({int(tick) for tick in np.linspace(1, pairs, min(pairs, 8)).round()})
    axes.set_xticks(ticks, [f"{tick}\n{times[tick]:.2f}" for tick in ticks])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="step; below it its time (1 = noise)", ylabel="layer")
    return image


def _draw_surface(axes: Axes, surface: Surface, low: float) -> Any:
    from matplotlib import colormaps

    values = np.ma.masked_invalid(surface.similarity.T)  # alpha runs to the right
    image = axes.pcolormesh(
        surface.alphas,
        surface.betas,
        values,
        shading="nearest",
        cmap=colormaps[COLOURS].with_extremes(bad=NOT_MEASURED),
        vmin=low,
        vmax=1.0,
    )
    axes.set_facecolor(NOT_MEASURED)
    inside = [c for c in CONTOURS if values.count() and values.min() < c < values.max()]
    if inside:
        colours = ["white" if c < (1 + low) / 2 else "black" for c in inside]
        lines = axes.contour(
            surface.alphas, surface.betas, values, levels=inside, colors=colours, linewidths=0.8
        )
        axes.clabel(lines, fmt="%g", fontsize=8)
    axes.set(xlabel="alpha", ylabel="beta", aspect="equal")
    return image
