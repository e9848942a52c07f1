"""One HTML page of one benchmark or several, with everything inside."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipcache.errors import ConfigError, SkipCacheError
from skipcache.evaluation.bench.results import Cell, Results
from skipcache.evaluation.drawing import require_matplotlib
from skipcache.evaluation.report import columns
from skipcache.evaluation.report.front import pareto_front
from skipcache.evaluation.report.markdown import markdown_table
from skipcache.evaluation.report.page_plots import Drawing, page_drawing
from skipcache.evaluation.report.pictures import Picture, load_picture
from skipcache.evaluation.report.plan import Plan, plan_of
from skipcache.evaluation.report.plots import Style, method_styles

__all__ = ["load_results", "markdown_table", "write_report"]

HERE = Path(__file__).parent
TEMPLATE = "page.html.jinja"
SUBJECT_WORDS = ("pipeline", "transformer", "layers", "steps", "samples")
NOT_FACTS = ("name", "captions", "is_video")


@dataclass(frozen=True)
class Shown:
    """A cell, and what is drawn of it.

    Attributes:
        cell: the cell.
        index: of the cell in its benchmark.
        label: its family, method and setting.
        pictures: of its samples.
        plan: what ran in it.
        is_on_front: whether no other cell beats it.
    """

    cell: Cell
    index: int
    label: str
    pictures: tuple[Picture, ...]
    plan: Plan | None
    is_on_front: bool


@dataclass(frozen=True)
class Section:
    """A benchmark on the page.

    Attributes:
        key: begins the ids of what is in it.
        name: of the subject.
        results: as loaded.
        facts: name and text of what was measured, where and with what.
        shown: the cells that ran.
        missing: those that did not.
        columns: of the table.
        speed_quality: the plot; None: no cell has both numbers.
        drift: the plot of the Fréchet distance; None: there is none.
        captions: of the pictures, as many as the most pictures of a cell.
    """

    key: str
    name: str
    results: Results
    facts: tuple[tuple[str, str], ...]
    shown: tuple[Shown, ...]
    missing: tuple[Cell, ...]
    columns: tuple[columns.Column, ...]
    speed_quality: Drawing | None
    drift: Drawing | None
    captions: tuple[str, ...]

    @property
    def cells(self) -> list[Cell]:
        """Those that ran."""
        return [shown.cell for shown in self.shown]

    @property
    def front(self) -> list[Cell]:
        """Cells that no other beats, slowest first."""
        return pareto_front(self.cells)

    @property
    def uncached(self) -> Shown | None:
        """What pictures are compared with, where it has pictures."""
        found = [s for s in self.shown if s.cell.family == "uncached" and s.pictures]
        return found[0] if found else None

    @property
    def frames(self) -> int:
        """The most frames that one of its clips has; 1: all pictures are still."""
        return max((p.frames for shown in self.shown for p in shown.pictures), default=1)

    @property
    def command(self) -> str:
        """What was typed."""
        return shlex.join(self.results.command)


def write_report(results: Sequence[str | Path], out: str | Path) -> Path:
    """Writes one HTML file that needs nothing beside it: no network, no other file.

    Args:
        results: results files, or folders with one; each becomes a section.
        out: the file; its folder is created if need be. What was there is replaced at once or not
            at all.

    Returns:
        The file.

    Raises:
        ConfigError: there are no results, one cannot be read or is of another schema, has no cells,
            or names a picture that cannot be read.
        SkipCacheError: jinja2 or matplotlib is not installed.
        OSError: the file cannot be written.
    """
    loaded = load_results(results)
    require_matplotlib()
    styles = method_styles([each for _, each in loaded])
    sections = [
        _section(f"subject-{i}", folder, each, styles) for i, (folder, each) in enumerate(loaded, 1)
    ]
    text = _render(sections)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, out)
    return out


def load_results(results: Sequence[str | Path]) -> list[tuple[Path, Results]]:
    """Reads results, each with the folder that its pictures are relative to.

    Raises:
        ConfigError: as ``write_report``.
    """
    if isinstance(results, (str, Path)):
        raise ConfigError(f"results is {results!r}. Pass a list, with one entry or several.")
    if not results:
        raise ConfigError("no results. Name at least one folder that skipcache bench has written.")
    loaded = []
    for name in map(Path, results):
        found = Results.load(name)
        if not found.cells:
            raise ConfigError(f"{name} has no cells. Run skipcache bench to the end.")
        loaded.append((name if name.is_dir() else name.parent, found))
    return loaded


def _render(sections: Sequence[Section]) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise SkipCacheError(
            "a report needs jinja2, which is not installed. Install skipcache with its extra "
            "'bench'."
        ) from None
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    return environment.get_template(TEMPLATE).render(
        sections=sections,
        text=columns,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def _section(key: str, folder: Path, results: Results, styles: Mapping[str, Style]) -> Section:
    name = str(results.subject.get("name", folder.resolve().name))
    ran = [cell for cell in results.cells if cell.status == "ok"]
    front = pareto_front(ran)
    shown = tuple(
        Shown(
            cell,
            index,
            columns.cell_label(cell),
            tuple(load_picture(folder, picture) for picture in cell.pictures),
            plan_of(cell.ran),
            cell in front,
        )
        for index, cell in enumerate(ran)
    )
    return Section(
        key=key,
        name=name,
        results=results,
        facts=_facts(results),
        shown=shown,
        missing=tuple(cell for cell in results.cells if cell.status != "ok"),
        columns=tuple(columns.measured_columns(ran)),
        speed_quality=page_drawing(
            "speed-quality",
            ran,
            styles,
            f"{name}: PSNR to the uncached samples against wall-clock speedup. The numbers are in "
            "the table of all settings.",
            f"{key}-quality",
        ),
        drift=page_drawing(
            "frechet-drift",
            ran,
            styles,
            f"{name}: drift of the Fréchet distance against wall-clock speedup. The numbers are in "
            "the table of all settings.",
            f"{key}-drift",
        ),
        captions=_captions(results, max((len(s.pictures) for s in shown), default=0)),
    )


def _facts(results: Results) -> tuple[tuple[str, str], ...]:
    subject, machine = results.subject, dict(results.machine)
    first = [word for word in SUBJECT_WORDS if word in subject]
    rest = [word for word in subject if word not in (*SUBJECT_WORDS, *NOT_FACTS)]
    memory = machine.pop("memory_bytes", None)
    if isinstance(memory, int):
        machine["memory"] = columns.bytes_text(memory)
    facts = {
        "Sampled": _listed({word: subject[word] for word in (*first, *rest)}),
        "Machine": _listed(machine),
        "Versions": _listed(results.versions),
        "Measured": results.created,
    }
    return tuple((word, value) for word, value in facts.items() if value)


def _listed(values: Mapping[str, Any]) -> str:
    told = {word: value for word, value in values.items() if value is not None}
    return "; ".join(f"{word}: {_words(value)}" for word, value in told.items())


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{word} {_words(inner)}" for word, inner in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _captions(results: Results, count: int) -> tuple[str, ...]:
    """A caption a picture; those that the results lack are empty."""
    given = results.subject.get("captions") or ()
    return tuple(str(given[i]) if i < len(given) else "" for i in range(count))
