"""Runs the demo: the same ten pictures by several settings, one table, one picture to judge by."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw

from skipcache import api
from skipcache.demo.model import CLASS_NAMES, load_pipeline
from skipcache.evaluation.metrics import psnr
from skipcache.evaluation.timing import DenoisingTimer, format_table, in_turns, speedups
from skipcache.runtime.stats import CacheStats

if TYPE_CHECKING:
    from diffusers import DiTPipeline

UNCACHED = "uncached"
SETTINGS: dict[str, dict[str, Any]] = {
    "interval 2 (default)": {},
    "interval 3": {"interval": 3},
    "interval 4": {"interval": 4},
    "interval 2, hold": {"estimator": "hold"},
    "interval 3, hold": {"interval": 3, "estimator": "hold"},
}
PICTURED = (UNCACHED, "interval 2 (default)", "interval 3, hold")
DIFFERENCE_GAIN = 8
CELL, MARGIN, TITLE = 96, 132, 22  # pixels


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        images: pictures by method, fp32 [10, 1, 32, 32] in 0..1.
        seconds: measured denoising times by method.
        stats: what each cached method did; None for the uncached one.
    """

    images: dict[str, torch.Tensor]
    seconds: dict[str, list[float]]
    stats: dict[str, CacheStats | None]

    def table(self) -> str:
        """One row a method, as Markdown."""
        faster = speedups(self.seconds, UNCACHED)
        rows = []
        for name, stats in self.stats.items():
            rows.append(
                [
                    name,
                    f"{statistics.median(self.seconds[name]):.2f}",
                    f"{faster[name]:.2f}x",
                    f"{stats.layers_run} of {stats.layers_total}" if stats else "all",
                    f"{psnr(self.images[name], self.images[UNCACHED]):.1f}" if stats else "-",
                    f"{stats.cache_bytes / 1024:.0f}" if stats else "0",
                ]
            )
        return format_table(
            [
                "method",
                "denoising, s",
                "speedup",
                "layers run",
                "PSNR to uncached, dB",
                "cache, KiB",
            ],
            rows,
        )


def run_demo(
    *,
    steps: int = 50,
    seed: int = 0,
    guidance_scale: float = 2.0,
    repeats: int = 5,
    progress: Callable[[], object] | None = None,
    pipeline: DiTPipeline | None = None,
) -> DemoResult:
    """Generates the ten classes by every setting, in turns, and measures.

    Args:
        steps: denoising steps.
        seed: of the initial noise, the same for every method.
        guidance_scale: classifier-free guidance; above 1 the transformer sees both passes in one
            batch.
        repeats: measured runs a method, after one warm-up.
        progress: called after every run; there are ``(repeats + 1) * number_of_methods()`` of them.
        pipeline: another pipeline of the kind of ``load_pipeline()``.
    """
    pipeline = pipeline if pipeline is not None else load_pipeline()
    images: dict[str, torch.Tensor] = {}
    stats: dict[str, CacheStats | None] = {}

    def sample(name: str) -> float:
        with DenoisingTimer(pipeline) as timer:
            output = pipeline(
                list(range(len(CLASS_NAMES))),
                guidance_scale=guidance_scale,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
            )
        images[name] = output.images.float()
        stats.setdefault(name, None)
        return timer.seconds

    def sample_cached(name: str) -> float:
        with api.skip_cache(pipeline, **SETTINGS[name]):
            seconds = sample(name)
            stats[name] = api.cache_stats(pipeline)
        return seconds

    variants: dict[str, Callable[[], float]] = {UNCACHED: partial(sample, UNCACHED)}
    for name in SETTINGS:
        variants[name] = partial(sample_cached, name)
    seconds = in_turns(variants, repeats, progress)
    return DemoResult(images, seconds, stats)


def number_of_methods() -> int:
    """Methods that the demo compares, the uncached one included."""
    return len(SETTINGS) + 1


def save_picture(result: DemoResult, path: Path) -> None:
    """Writes a PNG: a row of pictures for each method in ``PICTURED``, and of the differences,
    amplified.
    """
    uncached = result.images[UNCACHED]
    rows: list[tuple[str, torch.Tensor]] = []
    for name in PICTURED:
        rows.append((name, result.images[name]))
        if name != UNCACHED:
            difference = (result.images[name] - uncached).abs() * DIFFERENCE_GAIN
            rows.append((f"its difference, x{DIFFERENCE_GAIN}", difference.clamp(0, 1)))
    sheet = Image.new("L", (MARGIN + CELL * len(CLASS_NAMES), TITLE + CELL * len(rows)), color=255)
    draw = ImageDraw.Draw(sheet)
    for column, class_name in enumerate(CLASS_NAMES):
        draw.text((MARGIN + column * CELL + 4, 6), class_name, fill=0)
    for row, (name, pictures) in enumerate(rows):
        draw.multiline_text(
            (4, TITLE + row * CELL + CELL // 2 - 8), name.replace(", ", ",\n"), fill=0
        )
        for column, picture in enumerate(pictures):
            pixels = (picture[0] * 255).round().to(torch.uint8).numpy()
            cell = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.BICUBIC)
            sheet.paste(cell, (MARGIN + column * CELL, TITLE + row * CELL))
    sheet.save(path)
