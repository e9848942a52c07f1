"""The cache of one run: per stream, the refreshes kept, what guards them, and their bytes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from skipcache.estimators import Estimator, Refresh, Tensors
from skipcache.runtime.blocklist import FlowLayout
from skipcache.runtime.compiled import outside_graphs
from skipcache.schedules import Miss

MAX_STREAMS = 8  # guidance passes a step; more calls than that get no cache of their own


class Stream:
    """What one guidance pass has cached, and what it did at each step (True = refresh)."""

    def __init__(self, history: int) -> None:
        self.refreshes: deque[Refresh] = deque(maxlen=history)
        self.entered: FlowLayout = ()  # layout of the shallow feature at the last refresh
        self.last_refresh_step = 0
        self.last_step = -1  # at which it was called
        self.change = 0.0  # summed relative change since the last refresh, where a schedule probes
        self.previous: Tensors | None = None  # shallow feature of the last step, likewise
        self.record: list[bool] = []

    @property
    def cache_bytes(self) -> int:
        flows = [refresh.deep for refresh in self.refreshes]
        flows += [refresh.shallow for refresh in self.refreshes if refresh.shallow is not None]
        flows += [self.previous] if self.previous is not None else []
        return sum(t.untyped_storage().nbytes() for flow in flows for t in flow if t is not None)

    def keep(self, refresh: Refresh, entered: FlowLayout) -> None:
        if self.entered != entered:
            self.refreshes.clear()  # of another shape: no history to extrapolate from
        self.refreshes.append(refresh)
        self.entered = entered

    def drop(self) -> None:
        self.refreshes.clear()
        self.previous = None
        self.change = 0.0


class Run:
    """One sampling trajectory. Nothing in it is ever seen by another one.

    Attributes:
        times: normalised times of its steps, as far as known: all of them where a scheduler tells,
            else one more a step.
        plan: which steps refresh, where the schedule could plan ahead.
        estimator: what estimates in it.
        step: index of the current step.
    """

    def __init__(self, times: Sequence[float] = (), *, is_planned: bool = False) -> None:
        self.times: list[float] = list(times)
        self.is_planned = is_planned  # all times are known
        self.plan: tuple[bool, ...] | None = None
        self.estimator: Estimator | None = None
        self.last_reuse: float = math.inf  # nothing is kept from this step on
        self.step = 0
        self.calls: dict[str | None, int] = {}  # calls in the current step, by pass name
        self.last_name: str | None = None
        self.streams: dict[Hashable, Stream] = {}
        self.is_broken = False  # a call of this step raised: whose turn it is cannot be told
        self.peak_bytes = 0
        self.misses: list[Miss] = []  # at its refreshes, where measured
        self.shared: list[tuple[Any, int]] | None = None  # meshes of ranks that decide together

    @property
    def time(self) -> float:
        return self.times[self.step] if self.step < len(self.times) else float("nan")

    def advance(self, step: int) -> None:
        """Moves on to that step, if it is another one."""
        if step != self.step:
            self.step = step
            self.calls = {}
            self.is_broken = False

    def next_stream(self, name: str | None) -> Hashable:
        """The stream of the call under way: its name, or its place among this step's calls."""
        count = self.calls.get(name, 0)
        self.calls[name] = count + 1
        self.last_name = name
        return count if name is None else name if count == 0 else (name, count)

    def stream(self, key: Hashable, history: int) -> Stream | None:
        """The stream's cache; None in a broken step, and past the passes of any guidance scheme."""
        if self.is_broken:
            return None
        if key not in self.streams:
            if len(self.streams) >= MAX_STREAMS:
                return None
            self.streams[key] = Stream(history)
        return self.streams[key]

    def measure(self) -> None:
        """Takes note of the bytes held now."""
        self.peak_bytes = max(self.peak_bytes, sum(s.cache_bytes for s in self.streams.values()))

    def take(self, miss: Miss) -> None:
        """Takes note of a miss: the streams that miss most count for the step."""
        last = self.misses[-1] if self.misses else None
        if last is None or last.step != miss.step:
            self.misses.append(miss)
        else:
            worst = max(last.worst, miss.worst)
            self.misses[-1] = replace(max(last, miss, key=lambda one: one.error), worst=worst)

    def fail(self) -> None:
        """After a call that raised: nothing is kept, and the rest of the step is left alone."""
        self.drop()
        self.is_broken = True

    def drop(self) -> None:
        """Lets go of every cached tensor; the record of what was done stays."""
        for stream in self.streams.values():
            stream.drop()


@outside_graphs
def relative_change(previous: Tensors, current: Tensors) -> float:
    """mean|current - previous| / mean|previous| over all elements of all tensors; a host sync."""
    pairs = [
        (before, now)
        for before, now in zip(previous, current, strict=True)
        if before is not None and now is not None
    ]
    difference = sum((now - before).abs().sum(dtype=torch.float64) for before, now in pairs)
    size = sum(before.abs().sum(dtype=torch.float64) for before, _ in pairs)
    change, scale = torch.stack([torch.as_tensor(difference), torch.as_tensor(size)]).tolist()
    return float(change / scale) if scale > 0 else math.inf if change > 0 else 0.0


@outside_graphs
def relative_errors(estimate: Tensors, true: Tensors) -> tuple[float, float]:
    """|estimate - true| / |true| over all elements of all tensors [B, ...], and that of the worst
    sample; a host sync. Tensors that differ in B hold a sample each; where one has values that are
    no numbers, 0.
    """
    sums = []  # [2, B] each
    for guess, found in zip(estimate, true, strict=True):
        if guess is not None and found is not None and found.numel():
            pair = torch.stack([guess.double() - found, found.double()]).square()
            sums.append(pair.reshape(2, len(found) if found.dim() else 1, -1).sum(2))
    if not sums:
        return 0.0, 0.0
    if len({pair.shape for pair in sums}) == 1:
        samples = torch.stack(sums).sum(0)
    else:
        samples = torch.stack([pair.sum(1) for pair in sums], 1)
    missed, size = torch.cat([samples.sum(1, keepdim=True), samples], 1)
    ratios = (missed / size.clamp_min(1e-300)).sqrt()
    whole, *each = ratios.nan_to_num(nan=0.0, posinf=math.inf).tolist()
    return whole, max(each, default=0.0)
