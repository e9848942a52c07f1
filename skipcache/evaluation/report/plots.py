"""Speed against quality, drawn with matplotlib, and written as PNG and SVG files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcache.errors import ConfigError
from skipcache.evaluation.bench.results import Cell, Results
from skipcache.evaluation.drawing import require_matplotlib
from skipcache.evaluation.report.columns import (
    frechet_samples_text,
    is_identical,
    method_label,
    samples_text,
    turns_text,
)
from skipcache.evaluation.report.front import pareto_front, speed_and_quality

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, less yellow and black, which one of the two backgrounds swallows.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # 7 and 6: a combination recurs after 42 methods
INK, RULE, PAPER = "#1b1d21", "#d9dce1", "#fefefe"  # each stands for a CSS variable of the page
WIDE, NARROW = (10.6, 5.4), (5.0, 6.4)  # inches
POINT = "point-"  # begins the id of a point; its cell's index follows


@dataclass(frozen=True)
class Style:
    """How a method looks in every plot of a report."""

    colour: str
    marker: str


def method_styles(results: Iterable[Results]) -> dict[str, Style]:
    """A style for each ``method_label``, in order of appearance."""
    labels = [method_label(cell) for r in results for cell in r.cells if cell.family != "uncached"]
    looks = zip(dict.fromkeys(labels), itertools.cycle(COLOURS), itertools.cycle(MARKERS))
    return {label: Style(colour, marker) for label, colour, marker in looks}


def speed_quality_figure(
    cells: Sequence[Cell], styles: Mapping[str, Style], size: tuple[float, float] = WIDE
) -> Figure | None:
    """Draws PSNR against speedup, with both spreads and the Pareto front.

    Args:
        cells: of one benchmark; those without both numbers are left out.
        styles: of its methods, from ``method_styles``.
        size: in inches.

    Returns:
        The figure; None where no cell has both numbers.
    """
    points = [(i, cell) for i, cell in enumerate(cells) if speed_and_quality(cell) is not None]
    points = [(i, cell) for i, cell in points if cell.family != "uncached"]
    if not points:
        return None
    figure, axes = _figure(size)
    top = _top(cell for _, cell in points)
    front = pareto_front(cells)
    if front:
        _draw_front(axes, [(cell.speedup or 0.0, _height(cell, top)) for cell in front])
    _draw_series(axes, points, styles, lambda cell: _psnr_bar(cell, top))
    for _, cell in points:
        told = [cell.setting or cell.method] if cell in front else []
        told += ["identical to uncached"] if is_identical(cell.psnr) else []
        if told:
            _label(axes, ", ".join(told), cell.speedup or 0.0, _height(cell, top))
    shown = [cell for _, cell in points]
    samples = samples_text(Cell("", "", "", psnr=cell.psnr) for cell in shown)
    spread = "one sample" if samples == "1 sample" else f"mean ± standard deviation of {samples}"
    axes.set_ylabel(f"PSNR to the uncached samples, dB\n({spread})")
    _finish(figure, axes, shown, styles, has_front=bool(front))
    return figure


def drift_figure(
    cells: Sequence[Cell], styles: Mapping[str, Style], size: tuple[float, float] = WIDE
) -> Figure | None:
    """Draws the drift of the Fréchet distance against speedup, with its interval.

    Args:
        cells, styles, size: as for ``speed_quality_figure``.

    Returns:
        The figure; None where no cell has both numbers.
    """
    points = [
        (i, cell)
        for i, cell in enumerate(cells)
        if cell.frechet and cell.speedup is not None and cell.family != "uncached"
    ]
    if not points:
        return None
    figure, axes = _figure(size)
    axes.axhline(0, color=INK, linewidth=1, zorder=1)
    _draw_series(axes, points, styles, _drift_bar)
    shown = [cell for _, cell in points]
    axes.set_ylabel(
        "drift of the Fréchet distance from uncached\n"
        f"(95 % interval, {frechet_samples_text(shown)})"
    )
    _finish(figure, axes, shown, styles, has_front=False)
    return figure


FIGURES = {"speed-quality": speed_quality_figure, "frechet-drift": drift_figure}


def write_plots(results: Sequence[Results], folder: str | Path) -> tuple[Path, ...]:
    """Writes every plot as PNG and SVG, on a light background.

    Args:
        results: of several benchmarks; the same method looks the same in all of them.
        folder: created if need be.

    Returns:
        The files: ``speed-quality`` and, where there is one, ``frechet-drift``, with the name of
        the subject in front where there are several.

    Raises:
        ConfigError: there is nothing to draw.
        SkipCacheError: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    require_matplotlib()
    folder = Path(folder)
    styles = method_styles(results)
    written = []
    for number, each in enumerate(results, 1):
        for kind, draw in FIGURES.items():
            with plot_settings({}):
                figure = draw(each.cells, styles)
                if figure is None:
                    continue
                figure.axes[0].set_title(str(each.subject.get("name", "")))
                start = f"{number}-{_slug(each)}-" if len(results) > 1 else ""
                folder.mkdir(parents=True, exist_ok=True)
                for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                    path = folder / f"{start}{kind}.{suffix}"
                    figure.savefig(path, dpi=150, metadata=metadata)
                    written.append(path)
    if not written:
        raise ConfigError("nothing to draw: no cell has both a speedup and a quality.")
    return tuple(written)


def plot_settings(more: dict[Any, Any]) -> Any:
    """Reproducible files, and labels in which $ is a dollar."""
    from matplotlib import rc_context

    settings: Any = {"svg.hashsalt": "skipcache", "text.parse_math": False, "font.size": 10.5}
    return rc_context({**settings, **more})


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    return figure, axes


def _finish(
    figure: Figure,
    axes: Axes,
    cells: Sequence[Cell],
    styles: Mapping[str, Style],
    *,
    has_front: bool,
) -> None:
    """Draws what all plots share: the uncached run's place, the names, the legend."""
    from matplotlib.lines import Line2D

    axes.axvline(1, color=INK, linewidth=1, linestyle=":", zorder=1)
    axes.annotate(
        "uncached",
        (1, 0),
        (3, 4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        rotation=90,
        fontsize="small",
        color=INK,
    )
    turns = turns_text(cells)
    spread = "one turn" if turns == "1 turn" else f"median, least and greatest of {turns}"
    axes.set_xlabel("speedup, wall-clock" + (f"\n({spread})" if turns else ""))
    axes.margins(0.08, 0.12)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(INK)
    names = list(dict.fromkeys(method_label(cell) for cell in cells))
    handles = [Line2D([], [], **_look(styles[name]), color=styles[name].colour) for name in names]
    if has_front:
        handles.append(Line2D([], [], color=INK, linestyle="--", linewidth=1, **_RING))
        names.append("Pareto front")
    is_wide = figure.get_figwidth() > figure.get_figheight()
    figure.legend(
        handles,
        [name.lstrip("_") for name in names],  # matplotlib leaves out what begins with _
        loc="outside right upper" if is_wide else "outside lower left",
        ncols=1 if is_wide or len(names) < 5 else 2,
        frameon=False,
        fontsize="medium" if is_wide else "small",
        labelcolor=INK,
    )


_RING: dict[str, Any] = {
    "marker": "o",
    "markersize": 15,
    "markerfacecolor": "none",
    "markeredgecolor": INK,
    "markeredgewidth": 1.1,
}


def _look(style: Style) -> dict[str, Any]:
    return {
        "marker": style.marker,
        "markersize": 8,
        "markerfacecolor": style.colour,
        "markeredgecolor": INK,  # an outline: pale colours stand out from either background
        "markeredgewidth": 0.8,
    }


def _draw_front(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Stairs: at each speedup, the most PSNR that is to be had at it or beyond."""
    axes.plot(
        *zip(*points, strict=True),
        drawstyle="steps-pre",
        color=INK,
        linestyle="--",
        linewidth=1,
        zorder=2,
        **_RING,
    )


def _draw_series(
    axes: Axes, points: Sequence[tuple[int, Cell]], styles: Mapping[str, Style], bar: Any
) -> None:
    """Draws a line a method, and points with error bars; ``bar`` gives y, below and above it."""
    for name, style in styles.items():
        own = [(i, cell) for i, cell in points if method_label(cell) == name]
        own.sort(key=lambda entry: entry[1].speedup or 0.0)
        line = [(cell.speedup or 0.0, bar(cell)[0]) for _, cell in own]
        if not line:
            continue
        axes.plot(*zip(*line, strict=True), color=style.colour, linewidth=1.6, zorder=3)
        for i, cell in own:
            y, below, above = bar(cell)
            x = cell.speedup or 0.0
            low, high = cell.speedup_low or x, cell.speedup_high or x
            axes.errorbar(
                [x],
                [y],
                xerr=[[max(x - low, 0.0)], [max(high - x, 0.0)]],
                yerr=[[max(below, 0.0)], [max(above, 0.0)]],
                fmt="none",
                ecolor=style.colour,
                elinewidth=1.1,
                capsize=2.5,
                zorder=3,
            )
            axes.plot([x], [y], linestyle="none", zorder=4, gid=f"{POINT}{i}", **_look(style))


def _top(cells: Iterable[Cell]) -> float:
    """Where cells equal to the uncached one are drawn: their PSNR has no height of its own."""
    spreads = [cell.psnr for cell in cells if cell.psnr and not is_identical(cell.psnr)]
    highest = max((s.mean + s.deviation for s in spreads), default=0.0)
    lowest = min((s.mean - s.deviation for s in spreads), default=0.0)
    return highest + 0.15 * (highest - lowest) + 1


def _height(cell: Cell, top: float) -> float:
    assert cell.psnr is not None
    return top if is_identical(cell.psnr) else cell.psnr.mean


def _psnr_bar(cell: Cell, top: float) -> tuple[float, float, float]:
    assert cell.psnr is not None
    spread = 0.0 if is_identical(cell.psnr) else cell.psnr.deviation
    return _height(cell, top), spread, spread


def _drift_bar(cell: Cell) -> tuple[float, float, float]:
    assert cell.frechet is not None
    found = cell.frechet
    return found.drift, found.drift - found.low, found.high - found.drift


def _label(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(
        text,
        (x, y),
        (9, 9),
        textcoords="offset points",
        fontsize="small",
        color=INK,
        zorder=5,
        annotation_clip=False,
    )


def _slug(results: Results) -> str:
    name = str(results.subject.get("name", "subject"))
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.") or "subject"
