"""The table of a benchmark as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from skipcache.evaluation.bench.results import Cell, Results
from skipcache.evaluation.report.columns import (
    cell_label,
    judged_note,
    measured_columns,
    quality_note,
    time_note,
)
from skipcache.evaluation.report.front import pareto_front
from skipcache.evaluation.timing import format_table

FRONT_NOTE = r"\* on the Pareto front: no other setting beats it in both speedup and PSNR."


def markdown_table(results: Results) -> str:
    """Every cell that ran as a row, how many samples and turns it stands for, and what did not run.

    Settings on the Pareto front of speedup and PSNR are marked with an asterisk.
    """
    ran = [cell for cell in results.cells if cell.status == "ok"]
    columns = measured_columns(ran)
    front = pareto_front(ran)
    header = ["family", "method", "setting", *(f"{c.title}, {c.detail}" for c in columns)]
    rows = [
        [cell.family, cell.method, cell.setting + (" *" if cell in front else "")]
        + [column.text(cell) or "-" for column in columns]
        for cell in ran
    ]
    parts = [format_table(_escaped(header), [_escaped(row) for row in rows])]
    told = [quality_note(ran), time_note(ran), judged_note(ran, results.subject)]
    told += [FRONT_NOTE] if front else []
    parts.append(" ".join(filter(None, told)))
    missing = [cell for cell in results.cells if cell.status != "ok"]
    if missing:
        lines = [" ".join(_escaped([_missing_text(cell)])) for cell in missing]
        parts.append("Did not run:\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts)


def _missing_text(cell: Cell) -> str:
    return f"{cell_label(cell)}: {cell.status}. {cell.message}"


def _escaped(texts: list[str]) -> list[str]:
    """As one line each, which is neither a column break nor HTML."""
    return [
        " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")
        for text in texts
    ]


def write_markdown(results: Sequence[Results], path: str | Path) -> Path:
    """Writes the table of each benchmark under a heading with the subject's name."""
    parts = [
        f"## {' '.join(_escaped([str(each.subject.get('name', 'Results'))]))}\n\n"
        f"{markdown_table(each)}\n"
        for each in results
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")
    return path
