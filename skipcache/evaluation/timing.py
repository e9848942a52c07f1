"""Wall-clock of what a cache can speed up: the denoising loop, taken in turns so that no variant
has a quieter machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def now(device: torch.device) -> float:
    """Seconds on a monotonic clock, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class DenoisingTimer:
    """Times the denoising loop of a pipeline: from its first transformer call until its autoencoder
    decodes.

    Use as a context manager around one pipeline call; ``seconds`` holds the result.
    """

    def __init__(self, pipeline: Any) -> None:
        self.transformer: nn.Module = pipeline.transformer
        self.decoder: nn.Module = pipeline.vae.decoder
        self.device = next(self.transformer.parameters()).device
        self.seconds = float("nan")
        self._started: float | torch.cuda.Event | None = None
        self._ended: float | torch.cuda.Event | None = None

    def __enter__(self) -> DenoisingTimer:
        self._started = self._ended = None
        self._handles = [
            self.transformer.register_forward_pre_hook(self._start),
            self.decoder.register_forward_pre_hook(self._end),
        ]
        return self

    def _start(self, module: nn.Module, args: Any) -> None:
        if self._started is None:
            self._started = _mark(self.device)

    def _end(self, module: nn.Module, args: Any) -> None:
        if self._ended is None:
            self._ended = _mark(self.device)

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        if self._started is not None:
            ended = self._ended if self._ended is not None else _mark(self.device)
            self.seconds = _seconds_between(self._started, ended)


def _mark(device: torch.device) -> float | torch.cuda.Event:
    """This moment: of the work queued on a GPU, which is not waited for, or of the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds_between(started: float | torch.cuda.Event, ended: float | torch.cuda.Event) -> float:
    if isinstance(started, float) and isinstance(ended, float):
        return ended - started
    assert isinstance(started, torch.cuda.Event)
    assert isinstance(ended, torch.cuda.Event)
    ended.synchronize()
    return float(started.elapsed_time(ended)) / 1e3


def in_turns(
    variants: Mapping[str, Callable[[], float]],
    repeats: int,
    progress: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Runs every variant once, then all again, and so on; what each returns is its measured time.

    Args:
        variants: name to a function that runs the work once and returns its seconds.
        repeats: how often each is run; one more run of each comes first, as warm-up, and is
            dropped.
        progress: called after every run.

    Returns:
        The measured seconds of each variant, in order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            measured = run()
            if turn > 0:
                seconds[name].append(measured)
            if progress is not None:
                progress()
    return seconds


def speedups(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, float]:
    """Seconds of the baseline over those of each variant in the same turn, median over the turns.

    Within a turn they ran one after the other, so that a machine that gets slower or faster over
    minutes changes both.
    """
    return {
        name: statistics.median(
            reference / value for reference, value in zip(seconds[baseline], values, strict=True)
        )
        for name, values in seconds.items()
    }


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, columns padded to line up in a terminal."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        for line in [header, *rows]
    ]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
