"""Walks schedules over recorded features, and fits a matrix where they reuse.

The target is not the true deep feature alone. What earlier reuse steps of the walk got wrong is
owed, and paid back in equal parts by the reuse steps up to the next refresh; the rest is forgotten
bit by bit. A sampler sums its steps, so errors of one sign pile up, and errors that make up for
each other do not (docs/how-to/fit-branches.md).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from skipcache.branches.fitted import FARTHEST, HISTORY, Cell, bucket_of, grouped, known_inputs
from skipcache.branches.recorder import Features
from skipcache.errors import ConfigError
from skipcache.estimators import Refresh
from skipcache.schedules import Schedule

MEMORY = 0.19  # normalised time after which an owed error counts 1 / e; 0.9 a step of fifty

Key: TypeAlias = tuple[int, int, int]


class Equations:
    """Normal equations of one cell, for fitting (0) and held out (1), and sums of squares.

    Attributes:
        xx: inputs times inputs.
        xy: inputs times what ``residual`` misses, owed errors included.
        xm: inputs times what it misses of the true deep feature alone.
        owed: sum of squares of y.
        missed: likewise of m.
        hold: likewise of what ``hold`` misses.
    """

    def __init__(self, groups: int, inputs: int, width: int) -> None:
        self.xx = torch.zeros(2, groups, inputs, inputs, dtype=torch.float64)
        self.xy, self.xm = torch.zeros(2, 2, groups, inputs, width, dtype=torch.float64)
        self.owed, self.missed, self.hold = torch.zeros(3, 2, dtype=torch.float64)
        self.samples = [0, 0]
        self.distances = self.spacings = 0.0

    def add(self, other: Equations) -> None:
        """Sums both."""
        for name in ("xx", "xy", "xm", "owed", "missed", "hold"):
            getattr(self, name).add_(getattr(other, name))
        self.samples = [own + more for own, more in zip(self.samples, other.samples, strict=True)]
        self.distances += other.distances
        self.spacings += other.spacings

    def take(self, part: int, step: Step, rows: torch.Tensor) -> None:
        """Adds those rows of a step."""
        x, y, missed = step.inputs[:, rows], step.wanted[:, rows], step.missed[:, rows]
        self.xx[part] += x.mT @ x
        self.xy[part] += x.mT @ y
        self.xm[part] += x.mT @ missed
        self.owed[part] += y.square().sum()
        self.missed[part] += missed.square().sum()
        self.hold[part] += step.held[:, rows].square().sum()
        self.samples[part] += len(rows)
        self.distances += step.distance * len(rows)
        self.spacings += step.spacing * len(rows)

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix, and the metric of its inputs."""
        scale = self.xx[0].diagonal(dim1=1, dim2=2).clamp_min(1e-12)
        metric = self.xx[0] + torch.diag_embed(ridge * scale + 1e-9 * scale.mean())
        return torch.linalg.solve(metric, self.xy[0]), metric

    def left(self, weight: torch.Tensor) -> float:
        """Share of y on the held-out part that the weight leaves: below 1 it helps."""
        return float(self._left(weight, self.xy, self.owed) / self.owed[1].clamp_min(1e-300))

    def errors(self, weight: torch.Tensor) -> tuple[float, float]:
        """Squared error of the deep feature on the held-out part without and with the weight,
        relative to that of ``hold``.
        """
        scale = self.hold[1].clamp_min(1e-300)
        after = self._left(weight, self.xm, self.missed)
        return float(self.missed[1] / scale), float(after / scale)

    def _left(self, w: torch.Tensor, xy: torch.Tensor, yy: torch.Tensor) -> torch.Tensor:
        return yy[1] - 2 * (w * xy[1]).sum() + (w * (self.xx[1] @ w)).sum()


@dataclass
class Step:
    """One reuse step of one walk; [G, N, .] in fp64 each.

    Attributes:
        distance: normalised time since the last refresh.
        spacing: that between the last two refreshes; 0 where there is one only.
        inputs: what the matrix looks at.
        wanted: what ``residual`` misses, owed errors included.
        missed: what it misses of the true deep feature.
        held: what ``hold`` misses of it.
    """

    distance: float
    spacing: float
    inputs: torch.Tensor
    wanted: torch.Tensor
    missed: torch.Tensor
    held: torch.Tensor


class Walk:
    """One schedule on recorded features: where it refreshes, and what it owes."""

    def __init__(self, features: Features, stride: int, schedule: Schedule, groups: int) -> None:
        self.features, self.groups = features, groups
        self.steps = range(0, len(features.times), stride)
        plan = schedule.plan([features.times[i] for i in self.steps])
        if plan is None:
            raise ConfigError(f"{schedule!r} cannot plan ahead, so nothing can be fitted for it.")
        self.reused: dict[int, int] = {}  # step: reuse steps from it to the next refresh
        left = 0
        for i, is_refresh in reversed(list(zip(self.steps, plan, strict=True))):
            left = 0 if is_refresh else left + 1
            if left:
                self.reused[i] = left
        self.owed = torch.zeros(1, dtype=torch.float64)
        self.owed_at = features.times[0]

    def refreshes(self, step: int) -> list[Refresh]:
        before = [i for i in self.steps if i < step and i not in self.reused]
        times, shallow, deep = self.features.times, self.features.shallow, self.features.deep
        return [Refresh(i, times[i], (deep[i],), (shallow[i],)) for i in before[-HISTORY:]]

    def look(self, step: int, refreshes: Sequence[Refresh]) -> Step:
        """The equations of that step."""
        last, time = refreshes[-1], self.features.times[step]
        then, held = last.shallow, last.deep[0]
        assert then is not None
        assert then[0] is not None
        assert held is not None
        change = self.features.shallow[step].double() - then[0].double()
        deep = self.features.deep[step].double()
        parts = [change, *known_inputs(refreshes, step)]
        inputs = torch.cat([grouped(part.double(), self.groups) for part in parts], -1)
        inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)
        since = grouped(deep - held.double(), self.groups)
        missed = since - grouped(change, self.groups)
        self.owed = self.owed * math.exp((time - self.owed_at) / MEMORY)
        self.owed_at = time
        spacing = refreshes[0].time - last.time
        wanted = missed + self.owed / self.reused[step]
        return Step(last.time - time, spacing, inputs, wanted, missed, since)

    def go(self, step: Step, weight: torch.Tensor) -> None:
        """Goes on with the estimate: what it lacks is owed."""
        self.owed = self.owed + step.missed - step.inputs @ weight


class Cells:
    """The equations of all cells, by bucket, distance and spacing of the refreshes (grids)."""

    def __init__(self, groups: int, time_buckets: int, ridge: float) -> None:
        self.groups, self.time_buckets, self.ridge = groups, time_buckets, ridge
        self.equations: dict[Key, Equations] = {}

    def walk(self, features: Features, schedules: Sequence[tuple[int, Schedule]]) -> None:
        """Walks all schedules side by side, so that those that meet share a matrix."""
        if features.deep[0].shape[-1] % self.groups:
            width = features.deep[0].shape[-1]
            raise ConfigError(f"groups={self.groups} does not divide the width {width}.")
        walks = [Walk(features, stride, when, self.groups) for stride, when in schedules]
        parts = [torch.nonzero(features.is_held_out == held)[:, 0] for held in (False, True)]
        for step, time in enumerate(features.times):
            meeting: dict[Key, list[tuple[Walk, Step]]] = defaultdict(list)
            for walk in walks:
                refreshes = walk.refreshes(step) if step in walk.reused else []
                if refreshes and refreshes[-1].time > time:
                    seen = walk.look(step, refreshes)
                    meeting[self._key(seen, time)].append((walk, seen))
            for key, met in meeting.items():
                self._meet(key, met, parts)

    def _meet(
        self,
        key: Key,
        met: Sequence[tuple[Walk, Step]],
        parts: Sequence[torch.Tensor],
    ) -> None:
        inputs, width = met[0][1].inputs.shape[-1], met[0][1].wanted.shape[-1]
        sums = Equations(self.groups, inputs, width)
        for _, seen in met:
            for part, rows in enumerate(parts):
                sums.take(part, seen, rows)
        weight, _ = sums.solve(self.ridge)
        for walk, seen in met:
            walk.go(seen, weight)
        if key in self.equations:
            self.equations[key].add(sums)
        else:
            self.equations[key] = sums

    def solve(
        self, ridges: Sequence[float], rank: int | None, full_rank_above: float = 1.0
    ) -> tuple[tuple[Cell, ...], tuple[tuple[torch.Tensor, ...], ...]]:
        """Cells and matrices; those that do not help on the held-out calls are left out."""
        cells, matrices = [], []
        for (bucket, _, _), sums in sorted(self.equations.items()):
            if not all(sums.samples):
                continue
            solved = [sums.solve(ridge) for ridge in ridges]
            weight, metric = min(solved, key=lambda pair: sums.left(pair[0]))
            is_early = 1 - (bucket + 1) / self.time_buckets >= full_rank_above
            factors = _factored(weight, metric, None if is_early else rank)
            whole = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
            if sums.left(whole) < 1:
                distance, spacing = (s / sum(sums.samples) for s in (sums.distances, sums.spacings))
                place = (distance, spacing, bucket, sums.samples[0])
                cells.append(Cell(*place, *sums.errors(whole)))
                matrices.append(tuple(factor.float().contiguous() for factor in factors))
        return tuple(cells), tuple(matrices)

    def _key(self, seen: Step, time: float) -> Key:
        return bucket_of(time, self.time_buckets), _grid(seen.distance), _grid(seen.spacing)


def _grid(distance: float) -> int:
    """Distances that are nearly the same get the same number."""
    return round(math.log(distance) / math.log(FARTHEST) * 4) if distance > 0 else -1000


def _factored(
    weight: torch.Tensor, metric: torch.Tensor, rank: int | None
) -> tuple[torch.Tensor, ...]:
    """The best approximation of that rank of what the matrix makes of its inputs."""
    if rank is None or rank >= min(weight.shape[1:]):
        return (weight,)
    root = torch.linalg.cholesky(metric)
    left, size, right = torch.linalg.svd(root.mT @ weight, full_matrices=False)
    scaled = left[..., :rank] * size[..., None, :rank]
    return torch.linalg.solve_triangular(root.mT, scaled, upper=True), right[..., :rank, :]
