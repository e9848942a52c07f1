"""Records features of uncached runs, a sample of tokens each."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch

from skipcache.estimators import Tensors
from skipcache.runtime.controller import Controller
from skipcache.runtime.store import Stream


@dataclass
class Features:
    """What is kept of the runs with the same times.

    Attributes:
        times: normalised, one a step.
        shallow: of each step, rows [N, C].
        deep: likewise.
        is_held_out: bool [N].
    """

    times: tuple[float, ...]
    shallow: list[torch.Tensor]
    deep: list[torch.Tensor]
    is_held_out: torch.Tensor


@dataclass
class Trajectory:
    """Of one stream of one run: times, and rows of the features at each."""

    picked: torch.Tensor
    is_held_out: bool
    times: list[float] = field(default_factory=list)
    shallow: list[torch.Tensor] = field(default_factory=list)
    deep: list[torch.Tensor] = field(default_factory=list)


class Recorder:
    """Keeps the same tokens of every step of a run."""

    def __init__(self, tokens: int, seed: int) -> None:
        self.tokens, self.dim = tokens, 0
        self.draw = torch.Generator().manual_seed(seed)
        self.trajectories: list[Trajectory] = []
        self._current: dict[Stream, Trajectory] = {}

    def watch(self, controller: Controller, *, is_held_out: bool) -> None:
        """Is shown the features of the next run."""
        self._current = {}

        def witness(shallow: Tensors, deep: Tensors) -> None:
            now = controller.current
            if now is not None and math.isfinite(now[0].time):
                self._keep(now[1], now[0].time, shallow[0], deep[0], is_held_out)

        controller.slot.witness = witness

    def _keep(
        self,
        stream: Stream,
        time: float,
        shallow: torch.Tensor | None,
        deep: torch.Tensor | None,
        is_held_out: bool,
    ) -> None:
        assert shallow is not None
        assert deep is not None
        self.dim = deep.shape[-1]
        count = deep.numel() // self.dim
        if stream not in self._current:
            picked = torch.randperm(count, generator=self.draw)[: self.tokens].sort().values
            self._current[stream] = Trajectory(picked, is_held_out)
            self.trajectories.append(self._current[stream])
        kept = self._current[stream]
        kept.times.append(time)
        for rows, feature in ((kept.shallow, shallow), (kept.deep, deep)):
            rows.append(feature.reshape(count, -1)[kept.picked.to(feature.device)].cpu())

    def features(self) -> list[Features]:
        """The runs of equal times side by side."""
        alike: dict[tuple[float, ...], list[Trajectory]] = defaultdict(list)
        for trajectory in self.trajectories:
            alike[tuple(trajectory.times)].append(trajectory)
        found = []
        for times, group in alike.items():
            held_out = [torch.full((len(t.picked),), t.is_held_out) for t in group]
            shallow = [torch.cat(rows) for rows in zip(*(t.shallow for t in group), strict=True)]
            deep = [torch.cat(rows) for rows in zip(*(t.deep for t in group), strict=True)]
            found.append(Features(times, shallow, deep, torch.cat(held_out)))
        return found
