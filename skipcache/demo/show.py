"""Runs the demo: the same samples by several settings, one table, one picture to judge by."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from skipcache import api
from skipcache.demo.model import DEFAULT_TASK, load_pipeline
from skipcache.demo.tasks import Method, task_named
from skipcache.errors import ConfigError
from skipcache.evaluation.metrics import psnr
from skipcache.evaluation.timing import DenoisingTimer, format_table, in_turns
from skipcache.runtime.stats import CacheStats

DIFFERENCE_GAIN = 8
CELL, MARGIN, TITLE, LINE = 96, 132, 22, 14  # pixels
LETTERS = 15  # of a caption that fit over a cell
FRAME_MS = 125


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        task: its name.
        images: samples by method, fp32 [N, F, 32, 32] in 0..1; a picture has one frame.
        seconds: measured denoising times by method.
        stats: what each cached method did; None for an uncached one.
    """

    task: str
    images: dict[str, torch.Tensor]
    seconds: dict[str, list[float]]
    stats: dict[str, CacheStats | None]

    def table(self) -> str:
        """One row a method, as Markdown. Speedup and PSNR are those to its own baseline."""
        rows = []
        for name, method in task_named(self.task).methods.items():
            stats, seconds = self.stats[name], statistics.median(self.seconds[name])
            speedup = statistics.median(self.seconds[method.baseline]) / seconds
            rows.append(
                [
                    name,
                    f"{seconds:.2f}",
                    f"{speedup:.2f}x",
                    f"{stats.layers_run} of {stats.layers_total}" if stats else "all",
                    f"{psnr(self.images[name], self.images[method.baseline]):.1f}"
                    if stats
                    else "-",
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
    task: str = DEFAULT_TASK,
    steps: int = 50,
    seed: int = 0,
    guidance_scale: float | None = None,
    repeats: int | None = None,
    progress: Callable[[], object] | None = None,
    pipeline: Any = None,
) -> DemoResult:
    """Generates the samples of a task by every method, in turns, and measures.

    Args:
        task: one of ``TASKS``.
        steps: denoising steps.
        seed: of the initial noise, the same for every method.
        guidance_scale: classifier-free guidance; above 1 the transformer sees both passes in one
            batch. None: the task's own.
        repeats: measured runs a method, after one warm-up; None: the task's own.
        progress: called after every run; there are ``(repeats + 1) * number_of_methods(task)`` of
            them.
        pipeline: another pipeline of the kind of ``load_pipeline(task=task)``.

    Raises:
        ConfigError: there is no such task.
        SkipCacheError: its model is not there, or cannot be loaded.
    """
    shown = task_named(task)
    guidance = shown.guidance_scale if guidance_scale is None else guidance_scale
    pipelines = {False: load_pipeline(task=task) if pipeline is None else pipeline}
    if any(method.has_branches for method in shown.methods.values()):
        pipelines[True] = load_pipeline(task=task, has_branches=True)
    images: dict[str, torch.Tensor] = {}
    stats: dict[str, CacheStats | None] = {}

    def sample(name: str, method: Method) -> float:
        pipe = pipelines[method.has_branches]
        options = method.options
        with (
            nullcontext() if options is None else api.skip_cache(pipe, **options),
            DenoisingTimer(pipe) as timer,
        ):
            output = pipe(
                **shown.call,
                guidance_scale=guidance,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
                return_dict=False,
            )[0]
            stats[name] = None if options is None else api.cache_stats(pipe)
        # [N, 1, H, W], or [N, F, 1, H, W]
        images[name] = output.float().flatten(1, -3)
        return timer.seconds

    variants = {name: partial(sample, name, method) for name, method in shown.methods.items()}
    seconds = in_turns(variants, shown.repeats if repeats is None else repeats, progress)
    return DemoResult(task, images, seconds, stats)


def number_of_methods(task: str = DEFAULT_TASK) -> int:
    """Methods that the demo compares, the uncached ones included."""
    return len(task_named(task).methods)


def check_picture(path: Path) -> None:
    """Makes the folder of the picture, before anything is sampled.

    Raises:
        ConfigError: no picture can have such a name.
        OSError: the folder cannot be made.
    """
    if path.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(
            f"{path} has no ending of a kind of picture. Use .png, or .gif for moving ones."
        )
    path.parent.mkdir(parents=True, exist_ok=True)


def save_picture(result: DemoResult, path: Path) -> None:
    """Writes a row of samples for each pictured method, and of its amplified differences to its
    baseline. Clips move.
    """
    shown = task_named(result.task)
    rows: list[tuple[str, torch.Tensor]] = []
    for name in shown.pictured:
        baseline = shown.methods[name].baseline
        rows.append((name, result.images[name]))
        if name != baseline:
            difference = (result.images[name] - result.images[baseline]).abs() * DIFFERENCE_GAIN
            rows.append((f"its difference, x{DIFFERENCE_GAIN}", difference.clamp(0, 1)))
    frames = rows[0][1].shape[1]
    first, *others = [_draw_sheet(shown.captions, rows, frame) for frame in range(frames)]
    if others:
        first.save(path, save_all=True, append_images=others, duration=FRAME_MS, loop=0)
    else:
        first.save(path)


def _draw_sheet(
    captions: tuple[str, ...], rows: list[tuple[str, torch.Tensor]], frame: int
) -> Image.Image:
    """One frame of all samples, a column a caption."""
    titles = [textwrap.wrap(caption, LETTERS) for caption in captions]
    top = TITLE + LINE * (max(map(len, titles)) - 1)
    sheet = Image.new("L", (MARGIN + CELL * len(captions), top + CELL * len(rows)), color=255)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(titles):
        draw.multiline_text((MARGIN + column * CELL + 4, 6), "\n".join(lines), fill=0)
    for row, (name, samples) in enumerate(rows):
        position = (4, top + row * CELL + CELL // 2 - 8)
        draw.multiline_text(position, name.replace(", ", ",\n"), fill=0)
        for column, sample in enumerate(samples[:, frame]):
            pixels = (sample * 255).round().to(torch.uint8).numpy()
            cell = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.BICUBIC)
            sheet.paste(cell, (MARGIN + column * CELL, top + row * CELL))
    return sheet
