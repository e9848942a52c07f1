"""What a benchmark found, as one JSON file beside its pictures."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skipcache.errors import ConfigError

SCHEMA = "skipcache-bench/1"
RESULTS_FILE = "results.json"
TABLE_FILE = "results.csv"


@dataclass(frozen=True)
class Spread:
    """One value a sample, and what is said of them.

    Attributes:
        values: of each sample or seed, in order.
        mean: of them.
        deviation: their standard deviation; 0 of a single one.
    """

    values: tuple[float, ...]
    mean: float
    deviation: float


@dataclass(frozen=True)
class Frechet:
    """A Fréchet distance between features of samples and of a reference set.

    Attributes:
        value: of this method's samples.
        drift: its value less that of the uncached samples.
        low: lower end of the 95 % bootstrap interval of the drift.
        high: upper end.
        samples: how many there were.
    """

    value: float
    drift: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True)
class Cell:
    """One method at one setting.

    Attributes:
        family: whose it is: ``"uncached"``, ``"skipcache"``, ``"fewer steps"``, ``"cache-dit"``,
            ``"diffusers"``.
        method: its name, for example ``"FirstBlockCache"``.
        setting: in words, for example ``"threshold 0.1"``.
        options: exactly what it was given.
        status: ``"ok"``, ``"failed"`` (it ran into an error) or ``"unavailable"`` (it cannot run on
            this model, or its package is not installed).
        message: why, where it is not ``"ok"``.
        seconds: of each measured run: denoising, wall-clock.
        baseline_seconds: of the uncached run in the same turn.
        speedup: median over the turns of baseline_seconds / seconds: wall-clock.
        speedup_low: the least of these ratios.
        speedup_high: the greatest.
        layers_run: blocks that computed anything, over all steps.
        layers_total: those of the uncached run.
        ran: one string a transformer call: a letter a layer, ``"1"`` where it ran and ``"0"`` where
            not.
        cache_bytes: the most bytes the cache held at once, where the method tells.
        peak_bytes: the most memory that the run took beyond the model: of the device on a GPU, of
            the process elsewhere.
        psnr: dB to the uncached samples of the same seeds, from float pictures.
        ssim: likewise; 1 = equal.
        lpips: likewise, where its weights are at hand; 0 = equal.
        latent_error: relative L2 error of the final latents.
        frechet: where a reference set or feature extractor is at hand.
        accuracy: fraction of samples that the task's classifier reads as what was asked for.
        clip_score: mean CLIP score, where a CLIP model is given.
        is_repeatable: whether the same seed gave the same picture twice; None: not tried.
        pictures: files of the samples shown, relative to the results; those of a video are GIFs.
    """

    family: str
    method: str
    setting: str
    options: dict[str, Any] = field(default_factory=dict)
    status: str = "ok"
    message: str = ""
    seconds: tuple[float, ...] = ()
    baseline_seconds: tuple[float, ...] = ()
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    layers_run: int | None = None
    layers_total: int | None = None
    ran: tuple[str, ...] = ()
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    psnr: Spread | None = None
    ssim: Spread | None = None
    lpips: Spread | None = None
    latent_error: Spread | None = None
    frechet: Frechet | None = None
    accuracy: float | None = None
    clip_score: float | None = None
    is_repeatable: bool | None = None
    pictures: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What tells it from the others of a benchmark."""
        return " / ".join([self.family, self.method, self.setting])


@dataclass(frozen=True)
class Results:
    """A benchmark: what was measured on what, and every cell.

    Attributes:
        subject: what was sampled: ``name``, ``pipeline``, ``transformer``, ``layers``, ``steps``,
            ``samples``, ``is_video``, ``captions`` of the pictures, and the call's other arguments.
        machine: ``processor``, ``threads``, ``device``, ``memory_bytes``, ``system``.
        versions: of Python and of the packages that took part.
        command: exact arguments.
        created: ISO 8601, UTC.
        cells: the uncached one first.
        schema: ``SCHEMA``.
    """

    subject: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    command: tuple[str, ...]
    created: str
    cells: tuple[Cell, ...] = ()
    schema: str = SCHEMA

    def save(self, folder: str | Path) -> Path:
        """Writes the JSON and the CSV; what was there is replaced at once or not at all.

        Returns:
            The JSON file.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / RESULTS_FILE
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        _replace(path, text)
        rows = [_row(cell) for cell in self.cells]
        temporary = folder / f"{TABLE_FILE}.part"
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(_row(Cell("", "", ""))))
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, folder / TABLE_FILE)
        return path

    @staticmethod
    def load(path: str | Path) -> Results:
        """Reads a results file, or the one in a folder.

        Raises:
            ConfigError: there is none, it is no JSON, of another schema, or lacks something.
        """
        path = Path(path)
        path = path / RESULTS_FILE if path.is_dir() else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist. Run skipcache bench first.") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path} is no results file: {error}") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ConfigError(
                f"{path} has the schema {schema!r}, and this version of skipcache reads {SCHEMA!r}."
            )
        try:
            cells = tuple(_cell(entry) for entry in data.pop("cells"))
            command = tuple(data.pop("command"))
            return Results(**data, command=command, cells=cells)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path} is incomplete or damaged: {error}") from error


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _cell(entry: dict[str, Any]) -> Cell:
    found: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()
    }
    for name in ("psnr", "ssim", "lpips", "latent_error"):
        if found.get(name) is not None:
            spread = dict(found[name])
            found[name] = Spread(**{**spread, "values": tuple(spread["values"])})
    if found.get("frechet") is not None:
        found["frechet"] = Frechet(**found["frechet"])
    return Cell(**found)


def _row(cell: Cell) -> dict[str, Any]:
    """A line of the CSV: means and spreads, no lists."""
    row: dict[str, Any] = {
        name: getattr(cell, name) for name in ("family", "method", "setting", "status", "message")
    }
    names = ("speedup", "speedup_low", "speedup_high", "layers_run", "layers_total")
    row |= {name: getattr(cell, name) for name in (*names, "cache_bytes", "peak_bytes")}
    for name in ("psnr", "ssim", "lpips", "latent_error"):
        spread = getattr(cell, name)
        row[name] = spread.mean if spread else None
        row[f"{name}_deviation"] = spread.deviation if spread else None
    for name in ("value", "drift", "low", "high", "samples"):
        row[f"frechet_{name}"] = getattr(cell.frechet, name) if cell.frechet else None
    last = ("accuracy", "clip_score", "is_repeatable")
    return row | {name: getattr(cell, name) for name in last}
