"""The closed-form fit: skip branches for a frozen model, without training.

The calls are sampled once, uncached, and the features of a sample of their tokens are kept. On them
any schedule can be walked without sampling again: at each reuse step, from noise to clean, ridge
least squares give the matrix that predicts what ``residual`` misses there.

The target is not the true deep feature alone. What earlier reuse steps of the walk got wrong is
owed, and paid back in equal parts by the reuse steps up to the next refresh; the rest is forgotten
bit by bit. A sampler sums its steps, so errors of one sign pile up, and errors that make up for
each other do not (docs/how-to/fit-branches.md).
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from skipcache.api import skip_cache
from skipcache.branches.fitted import (
    FARTHEST,
    Cell,
    FittedBranches,
    bucket_of,
    grouped,
    known_inputs,
    with_base_model,
)
from skipcache.errors import ConfigError
from skipcache.estimators import Refresh, Residual, Tensors
from skipcache.runtime.controller import Controller, controller_of
from skipcache.runtime.store import Stream
from skipcache.schedules import IntervalSchedule, Schedule
from skipcache.targets import is_module, transformers_of

MIXED = {1: (2, 3, 4, 5, 6), 2: (2, 3)}  # intervals for all steps, and for every other one
RIDGES = (1e-2, 1e-1, 1.0)
WALKING_RIDGE = 0.1
MEMORY = 0.19  # normalised time after which an owed error counts 1 / e; 0.9 a step of fifty


def fit_skip_branches(
    pipe: Any,
    calls: Iterable[Mapping[str, Any]],
    *,
    interval: int | None = None,
    schedule: Schedule | None = None,
    front_layers: int = 1,
    back_layers: int = 1,
    rank: int | None = None,
    groups: int = 1,
    time_buckets: int = 1,
    ridge: float | None = None,
    tokens: int = 8192,
    sampler: Callable[..., Any] | None = None,
    seed: int = 0,
) -> FittedBranches:
    """Fits skip branches past the deep span on a frozen model, by linear least squares.

    Args:
        pipe: a pipeline with one transformer, or a bare transformer together with ``sampler``.
        calls: keyword arguments of one call of the pipeline each; the last tenth (at least one) is
            held out. A call without a ``generator`` gets one, seeded by its position.
        interval: fit for a refresh every so many steps; default: for 2 to 6, and for half as many
            steps as well.
        schedule: fit for this one instead.
        front_layers: of the cache that it is for.
        back_layers: likewise.
        rank: of the matrices, by singular values in the metric of the inputs; default: full.
        groups: channel groups that do not see each other; divides the width.
        time_buckets: equal parts of normalised time, each with matrices of its own; as many as
            there are steps give the best fit and the largest file.
        ridge: relative to the diagonal; default: the best on the held-out calls.
        tokens: how many tokens are kept of each guidance pass, shared out among the calls; the
            memory, 2 x steps x tokens x C values a pass, so does not grow with the number of calls.
        sampler: called as ``sampler(**call)`` in place of the pipeline; it must open a
            ``skip_cache_run`` if the cache cannot tell the steps of a run.
        seed: of the generators, and of the choice of tokens.

    Returns:
        The fit, for ``apply_skip_cache(pipe, branches=...)``. The pipeline is as it was, with what
        was applied to it.

    Raises:
        ConfigError: a value that cannot be, fewer than two calls, or calls without a reuse step.
        SkipCacheError: as ``apply_skip_cache``.
    """
    asked = [dict(call) for call in calls]
    _check(asked, interval, schedule, rank, groups, time_buckets, ridge, tokens)
    transformers = transformers_of(pipe)
    if len(transformers) != 1:
        raise ConfigError(
            f"the pipeline has {len(transformers)} transformers: {', '.join(transformers)}. Pass "
            "one of them, and a sampler that runs the pipeline."
        )
    transformer = next(iter(transformers.values()))
    if sampler is None:
        if is_module(pipe):
            raise ConfigError("a bare transformer is fitted from a sampler: pass sampler=...")
        sampler = pipe
    _add_generators(asked, sampler, seed)
    held_out = max(1, len(asked) // 10)
    recorder = _Recorder(max(1, tokens // len(asked)), seed)
    options: dict[str, Any] = {"front_layers": front_layers, "back_layers": back_layers}
    with skip_cache(pipe, interval=1, estimator=Residual(), **options):
        controller = controller_of(transformer)
        assert controller is not None
        for index, call in enumerate(asked):
            recorder.watch(controller, is_held_out=index >= len(asked) - held_out)
            sampler(**call)
    walks = _walks(interval, schedule)
    cells = _Cells(groups, time_buckets, WALKING_RIDGE if ridge is None else ridge)
    for features in recorder.features():
        cells.walk(features, walks)
    if not cells.equations:
        raise ConfigError(
            "the schedule reuses nothing in these calls, so there is nothing to fit. Use more "
            "denoising steps, or a schedule that leaves steps out."
        )
    made_by = (
        f"fit_skip_branches on {len(asked)} calls (the last {held_out} held out), "
        f"{'schedule given' if schedule is not None else f'interval {interval or MIXED[1]}'}"
    )
    solved = cells.solve(RIDGES if ridge is None else (ridge,), rank)
    fit = FittedBranches(
        recorder.dim, front_layers, back_layers, *solved, time_buckets=time_buckets
    )
    return with_base_model(fit, transformer, made_by)


def _walks(interval: int | None, schedule: Schedule | None) -> list[tuple[int, Schedule]]:
    """Strides over the steps, and schedules."""
    if schedule is not None:
        return [(1, schedule)]
    if interval is not None:
        return [(1, IntervalSchedule(interval, 0.98, 0.02))]
    return [
        (stride, IntervalSchedule(mixed, 0.98, 0.02))
        for stride, intervals in MIXED.items()
        for mixed in intervals
    ]


@dataclass
class _Features:
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
class _Trajectory:
    """Of one stream of one run: times, and rows of the features at each."""

    picked: torch.Tensor
    is_held_out: bool
    times: list[float] = field(default_factory=list)
    shallow: list[torch.Tensor] = field(default_factory=list)
    deep: list[torch.Tensor] = field(default_factory=list)


class _Recorder:
    """Keeps the same tokens of every step of a run."""

    def __init__(self, tokens: int, seed: int) -> None:
        self.tokens, self.dim = tokens, 0
        self.draw = torch.Generator().manual_seed(seed)
        self.trajectories: list[_Trajectory] = []
        self._current: dict[Stream, _Trajectory] = {}

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
            self._current[stream] = _Trajectory(picked, is_held_out)
            self.trajectories.append(self._current[stream])
        kept = self._current[stream]
        kept.times.append(time)
        for rows, feature in ((kept.shallow, shallow), (kept.deep, deep)):
            rows.append(feature.reshape(count, -1)[kept.picked.to(feature.device)].cpu())

    def features(self) -> list[_Features]:
        """The runs of equal times side by side."""
        alike: dict[tuple[float, ...], list[_Trajectory]] = defaultdict(list)
        for trajectory in self.trajectories:
            alike[tuple(trajectory.times)].append(trajectory)
        found = []
        for times, group in alike.items():
            held_out = [torch.full((len(t.picked),), t.is_held_out) for t in group]
            shallow = [torch.cat(rows) for rows in zip(*(t.shallow for t in group), strict=True)]
            deep = [torch.cat(rows) for rows in zip(*(t.deep for t in group), strict=True)]
            found.append(_Features(times, shallow, deep, torch.cat(held_out)))
        return found


_Key: TypeAlias = tuple[int, int, int]


class _Equations:
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

    def add(self, other: _Equations) -> None:
        """Sums both."""
        for name in ("xx", "xy", "xm", "owed", "missed", "hold"):
            getattr(self, name).add_(getattr(other, name))
        self.samples = [own + more for own, more in zip(self.samples, other.samples, strict=True)]
        self.distances += other.distances
        self.spacings += other.spacings

    def take(self, part: int, step: _Step, rows: torch.Tensor) -> None:
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
class _Step:
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


class _Walk:
    """One schedule on recorded features: where it refreshes, and what it owes."""

    def __init__(self, features: _Features, stride: int, schedule: Schedule, groups: int) -> None:
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
        return [Refresh(i, times[i], (deep[i],), (shallow[i],)) for i in before[-2:]]

    def look(self, step: int, refreshes: Sequence[Refresh]) -> _Step:
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
        return _Step(last.time - time, spacing, inputs, wanted, missed, since)

    def go(self, step: _Step, weight: torch.Tensor) -> None:
        """Goes on with the estimate: what it lacks is owed."""
        self.owed = self.owed + step.missed - step.inputs @ weight


class _Cells:
    """The equations of all cells, by bucket, distance and spacing of the refreshes (grids)."""

    def __init__(self, groups: int, time_buckets: int, ridge: float) -> None:
        self.groups, self.time_buckets, self.ridge = groups, time_buckets, ridge
        self.equations: dict[_Key, _Equations] = {}

    def walk(self, features: _Features, schedules: Sequence[tuple[int, Schedule]]) -> None:
        """Walks all schedules side by side, so that those that meet share a matrix."""
        if features.deep[0].shape[-1] % self.groups:
            width = features.deep[0].shape[-1]
            raise ConfigError(f"groups={self.groups} does not divide the width {width}.")
        walks = [_Walk(features, stride, when, self.groups) for stride, when in schedules]
        parts = [torch.nonzero(features.is_held_out == held)[:, 0] for held in (False, True)]
        for step, time in enumerate(features.times):
            meeting: dict[_Key, list[tuple[_Walk, _Step]]] = defaultdict(list)
            for walk in walks:
                refreshes = walk.refreshes(step) if step in walk.reused else []
                if refreshes and refreshes[-1].time > time:
                    seen = walk.look(step, refreshes)
                    meeting[self._key(seen, time)].append((walk, seen))
            for key, met in meeting.items():
                self._meet(key, met, parts)

    def _meet(
        self,
        key: _Key,
        met: Sequence[tuple[_Walk, _Step]],
        parts: Sequence[torch.Tensor],
    ) -> None:
        inputs, width = met[0][1].inputs.shape[-1], met[0][1].wanted.shape[-1]
        sums = _Equations(self.groups, inputs, width)
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
        self, ridges: Sequence[float], rank: int | None
    ) -> tuple[tuple[Cell, ...], tuple[tuple[torch.Tensor, ...], ...]]:
        """Cells and matrices; those that do not help on the held-out calls are left out."""
        cells, matrices = [], []
        for (bucket, _, _), sums in sorted(self.equations.items()):
            if not all(sums.samples):
                continue
            solved = [sums.solve(ridge) for ridge in ridges]
            weight, metric = min(solved, key=lambda pair: sums.left(pair[0]))
            factors = _factored(weight, metric, rank)
            whole = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
            if sums.left(whole) < 1:
                distance, spacing = (s / sum(sums.samples) for s in (sums.distances, sums.spacings))
                place = (distance, spacing, bucket, sums.samples[0])
                cells.append(Cell(*place, *sums.errors(whole)))
                matrices.append(tuple(factor.float().contiguous() for factor in factors))
        return tuple(cells), tuple(matrices)

    def _key(self, seen: _Step, time: float) -> _Key:
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


def _add_generators(calls: list[dict[str, Any]], sampler: Callable[..., Any], seed: int) -> None:
    function = sampler if inspect.isroutine(sampler) else type(sampler).__call__
    if "generator" not in inspect.signature(function).parameters:
        return
    for index, call in enumerate(calls):
        call.setdefault("generator", torch.Generator().manual_seed(seed + index))


def _check(
    calls: list[dict[str, Any]],
    interval: int | None,
    schedule: Schedule | None,
    rank: int | None,
    groups: int,
    time_buckets: int,
    ridge: float | None,
    tokens: int,
) -> None:
    if len(calls) < 2:
        raise ConfigError(
            f"{len(calls)} calls are too few: one is held out and at least one is fitted on. Pass "
            "at least two; 16 to 64 samples are usual."
        )
    if interval is not None and schedule is not None:
        raise ConfigError("interval and schedule both say when to refresh. Pass one of them.")
    counts = {"rank": rank, "groups": groups, "time_buckets": time_buckets, "tokens": tokens}
    for name, count in counts.items():
        is_whole = isinstance(count, int) and not isinstance(count, bool) and count >= 1
        if not is_whole and (count is not None or name != "rank"):
            raise ConfigError(f"{name} is {count!r}. It is a whole number from 1.")
    if ridge is not None and not (math.isfinite(ridge) and ridge >= 0):
        raise ConfigError(f"ridge is {ridge!r}. It is a finite number from 0.")
