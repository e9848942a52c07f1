"""The columns of a table of cells: what each says in words, and what it is sorted by."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skipcache.evaluation.bench.quality import IDENTICAL_DB
from skipcache.evaluation.bench.results import Cell, Frechet, Spread

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        title: of the column.
        detail: unit, or how the number came about.
        text: a cell in words; empty: not measured.
        value: what rows are sorted by; None: not measured.
    """

    title: str
    detail: str
    text: Callable[[Cell], str]
    value: Callable[[Cell], float | None]


def method_label(cell: Cell) -> str:
    """Family and method, once where they are the same."""
    return cell.family if cell.family == cell.method else f"{cell.family}: {cell.method}"


def cell_label(cell: Cell) -> str:
    """Family, method and setting."""
    return ", ".join(filter(None, [method_label(cell), cell.setting]))


def bytes_text(count: int | None) -> str:
    """In the largest binary unit that keeps it above one; empty for None."""
    if count is None:
        return ""
    value, unit = float(count), 0
    while value >= 1023.95 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if unit == 0 or value >= 100 else 1
    return f"{value:.{digits}f} {UNITS[unit]}"


def spread_text(spread: Spread | None, digits: int) -> str:
    """Mean and standard deviation, or the mean of one sample; empty for None."""
    if spread is None:
        return ""
    spreads = f"± {spread.deviation:.{digits}f}" if len(spread.values) > 1 else "(one sample)"
    return f"{spread.mean:.{digits}f} {spreads}"


def psnr_text(spread: Spread | None) -> str:
    """As ``spread_text``; in words where every sample is equal to the uncached one."""
    if is_identical(spread):
        return "identical" if spread and len(spread.values) > 1 else "identical (one sample)"
    return spread_text(spread, 1)


def is_identical(spread: Spread | None) -> bool:
    """Whether a PSNR is of samples that all equal the uncached ones."""
    return spread is not None and spread.mean >= IDENTICAL_DB


def seconds_text(cell: Cell) -> str:
    """Median and range of the measured runs, to three digits."""
    if not cell.seconds:
        return ""
    median = statistics.median(cell.seconds)
    digits = max(0, 2 - math.floor(math.log10(median))) if median > 0 else 2
    return _range_text(f"{median:.{digits}f}", min(cell.seconds), max(cell.seconds), digits, cell)


def speedup_text(cell: Cell) -> str:
    """Median and range of the ratios; the uncached run's is 1, with no spread."""
    if cell.speedup is None:
        return ""
    middle, low, high = f"{cell.speedup:.2f}x", cell.speedup_low, cell.speedup_high
    if cell.family == "uncached" or low is None or high is None:
        return middle
    return _range_text(middle, low, high, 2, cell)


def layers_text(cell: Cell) -> str:
    """How many layers computed anything."""
    if cell.layers_run is None or cell.layers_total is None:
        return ""
    return f"{cell.layers_run} of {cell.layers_total}"


def drift_text(frechet: Frechet | None) -> str:
    """Drift and its interval; 0 of what drifts are taken from."""
    if frechet is None:
        return ""
    numbers = (frechet.drift, frechet.low, frechet.high)
    if not any(numbers):
        return "0"
    drift, low, high = (f"{number:+.{_frechet_digits(frechet)}f}" for number in numbers)
    return f"{drift} ({low} to {high})"


def repeatable_text(cell: Cell) -> str:
    """Whether the same seed gave the same picture twice."""
    return {True: "yes", False: "no", None: "not tried"}[cell.is_repeatable]


def options_text(cell: Cell) -> str:
    """Exactly what the method was given, as JSON."""
    return json.dumps(cell.options, ensure_ascii=False)


def counts_text(counts: Iterable[int], one: str, many: str) -> str:
    """How many there were: ``"3 turns"``, ``"2 to 5 samples"``; empty where there is none."""
    found = sorted(set(counts))
    if not found:
        return ""
    numbers = f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"
    return f"{numbers} {one if found == [1] else many}"


def samples_text(cells: Iterable[Cell]) -> str:
    """How many samples the cells' means are of."""
    spreads = [spread for c in cells for spread in (c.psnr, c.ssim, c.lpips, c.latent_error)]
    return counts_text((len(s.values) for s in spreads if s), "sample", "samples")


def turns_text(cells: Iterable[Cell]) -> str:
    """How many measured runs the cells' times are of; the uncached one may run more often."""
    timed = [cell for cell in cells if cell.seconds and cell.family != "uncached"]
    return counts_text((len(cell.seconds) for cell in timed), "turn", "turns")


def quality_note(cells: Iterable[Cell]) -> str:
    """What is said of the samples' spread; empty where no quality was measured."""
    samples = samples_text(cells)
    if samples == "1 sample":
        return "Quality: one sample a setting, so no spread."
    return f"Quality: mean ± standard deviation of {samples}." if samples else ""


def time_note(cells: Iterable[Cell]) -> str:
    """What is said of the times' spread; empty where none was measured."""
    turns = turns_text(cells)
    if turns == "1 turn":
        return "Times and speedups: wall-clock, one turn, so no spread."
    return (
        f"Times and speedups: wall-clock, median (least to greatest) of {turns}." if turns else ""
    )


def frechet_samples_text(cells: Iterable[Cell]) -> str:
    """How many samples the Fréchet distances are of."""
    return counts_text((c.frechet.samples for c in cells if c.frechet), "sample", "samples")


def judged_note(cells: Sequence[Cell], subject: Mapping[str, Any]) -> str:
    """Of how many samples what a judge says is; empty where there is no judge."""
    names = ["Fréchet distance"] if any(cell.frechet for cell in cells) else []
    names += ["accuracy"] if any(cell.accuracy is not None for cell in cells) else []
    judged = subject.get("judged")
    samples = frechet_samples_text(cells) or (f"{judged} samples" if judged else "")
    if not names or not samples:
        return ""
    told = " and ".join(names)
    return f"{told[0].upper()}{told[1:]}: of {samples}."


def measured_columns(cells: Sequence[Cell]) -> list[Column]:
    """The columns in which at least one of the cells has something to say."""
    return [column for column in COLUMNS if any(column.text(cell) for cell in cells)]


def _range_text(middle: str, low: float, high: float, digits: int, cell: Cell) -> str:
    spread = f"{low:.{digits}f} to {high:.{digits}f}"
    return f"{middle} ({'one turn' if len(cell.seconds) == 1 else spread})"


def _frechet_digits(frechet: Frechet) -> int:
    return 4 if frechet.value < 10 else 2


def _mean(spread: Spread | None) -> float | None:
    return spread.mean if spread else None


COLUMNS = (
    Column("Speedup", "wall-clock", speedup_text, lambda cell: cell.speedup),
    Column(
        "Denoising",
        "s, wall-clock",
        seconds_text,
        lambda cell: statistics.median(cell.seconds) if cell.seconds else None,
    ),
    Column("PSNR", "dB to uncached", lambda c: psnr_text(c.psnr), lambda c: _mean(c.psnr)),
    Column("SSIM", "1 = equal", lambda c: spread_text(c.ssim, 4), lambda c: _mean(c.ssim)),
    Column("LPIPS", "0 = equal", lambda c: spread_text(c.lpips, 4), lambda c: _mean(c.lpips)),
    Column(
        "Latent error",
        "relative L2",
        lambda cell: spread_text(cell.latent_error, 4),
        lambda cell: _mean(cell.latent_error),
    ),
    Column(
        "Fréchet distance",
        "to the reference set",
        lambda c: f"{c.frechet.value:.{_frechet_digits(c.frechet)}f}" if c.frechet else "",
        lambda cell: cell.frechet.value if cell.frechet else None,
    ),
    Column(
        "Fréchet drift",
        "from uncached, 95 % interval",
        lambda cell: drift_text(cell.frechet),
        lambda cell: cell.frechet.drift if cell.frechet else None,
    ),
    Column(
        "Accuracy",
        "read as what was asked for",
        lambda cell: "" if cell.accuracy is None else f"{100 * cell.accuracy:.1f} %",
        lambda cell: cell.accuracy,
    ),
    Column(
        "CLIP score",
        "mean",
        lambda cell: "" if cell.clip_score is None else f"{cell.clip_score:.2f}",
        lambda cell: cell.clip_score,
    ),
    Column("Layers run", "a count, not a speedup", layers_text, lambda cell: cell.layers_run),
    Column("Cache", "most held", lambda c: bytes_text(c.cache_bytes), lambda c: c.cache_bytes),
    Column(
        "Peak memory",
        "beyond the model",
        lambda cell: bytes_text(cell.peak_bytes),
        lambda cell: cell.peak_bytes,
    ),
    Column(
        "Repeatable",
        "same seed, same picture",
        repeatable_text,
        lambda cell: None if cell.is_repeatable is None else float(cell.is_repeatable),
    ),
)
