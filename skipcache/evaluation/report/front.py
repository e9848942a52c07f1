"""Which settings no other setting beats."""

from __future__ import annotations

from collections.abc import Iterable

from skipcache.evaluation.bench.results import Cell


def speed_and_quality(cell: Cell) -> tuple[float, float] | None:
    """Speedup and mean PSNR in dB; None where one of the two was not measured."""
    if cell.status != "ok" or cell.speedup is None or cell.psnr is None:
        return None
    return cell.speedup, cell.psnr.mean


def pareto_front(cells: Iterable[Cell]) -> list[Cell]:
    """Cells that no other beats in both speedup and PSNR, slowest first.

    The uncached run stands at speedup 1 and is equal to itself, so what is no faster than it is
    never on the front. Means are compared: of two cells with overlapping spreads either may win
    another time.
    """
    found = [(point, cell) for cell in cells if (point := speed_and_quality(cell)) is not None]
    kept = [
        (point, cell)
        for point, cell in found
        if point[0] > 1
        and not any(
            other != point and other[0] >= point[0] and other[1] >= point[1] for other, _ in found
        )
    ]
    return [cell for _, cell in sorted(kept, key=lambda entry: entry[0])]
