"""The plots as SVG inside HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

from skipcache.evaluation.bench.results import Cell
from skipcache.evaluation.report.columns import cell_label, drift_text, psnr_text, speedup_text
from skipcache.evaluation.report.plots import (
    FIGURES,
    INK,
    NARROW,
    PAPER,
    POINT,
    RULE,
    WIDE,
    Style,
    plot_settings,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_COLOURS = {INK: "var(--ink)", RULE: "var(--rule)", PAPER: "var(--paper)"}


@dataclass(frozen=True)
class Drawing:
    """A plot for the page, at two widths.

    Attributes:
        wide: SVG.
        narrow: SVG with the same content, for a phone.
    """

    wide: str
    narrow: str


def page_drawing(
    kind: str, cells: Sequence[Cell], styles: Mapping[str, Style], label: str, prefix: str
) -> Drawing | None:
    """A plot as SVG inside HTML: its text is text, its colours are variables of the page.

    Args:
        kind: of ``FIGURES``.
        cells: of one benchmark.
        styles: from ``method_styles``.
        label: read out in place of the drawing.
        prefix: of its ids, unique in the page.

    Returns:
        The drawing; None where there is nothing to draw.
    """
    drawn = []
    with plot_settings({"svg.fonttype": "none"}):
        for size, name in ((WIDE, "wide"), (NARROW, "narrow")):
            figure = FIGURES[kind](cells, styles, size)
            if figure is None:
                return None
            figure.patch.set_visible(False)
            drawn.append(_inline_svg(figure, cells, label, f"{prefix}-{name}"))
    return Drawing(*drawn)


def _inline_svg(figure: Figure, cells: Sequence[Cell], label: str, prefix: str) -> str:
    """The figure as an SVG element that shares a page with others."""
    file = StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    leave_out = r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>"  # the last is page-wide
    svg = re.sub(leave_out, "", svg, flags=re.DOTALL)
    svg = re.sub(r'xlink:href="#|href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace(' id="', f' id="{prefix}-')
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None
    head = f'<svg {size.group()} role="img" aria-label="{html.escape(label)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, variable)
    for i, cell in enumerate(cells):
        group = f'<g id="{prefix}-{POINT}{i}">'
        svg = svg.replace(group, f"{group}<title>{html.escape(_told(cell))}</title>")
    return svg


def _told(cell: Cell) -> str:
    """What a point says when pointed at."""
    numbers = [f"speedup {speedup_text(cell)}"]
    if cell.psnr:
        numbers.append(f"PSNR {psnr_text(cell.psnr)}")
    if cell.frechet:
        numbers.append(f"Fréchet drift {drift_text(cell.frechet)}")
    return f"{cell_label(cell)}. {', '.join(numbers)}"
