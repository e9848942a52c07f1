"""The closed-form fit: skip branches for a frozen model, without training.

Sampling runs with the cache on. At every reuse step the deep span runs besides, so that the true
deep feature is known; it goes into normal equations, and sampling goes on with the estimate. What
is fitted so are the errors that a cached run really makes. Memory does not depend on the number of
samples.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from skipcache.api import apply_skip_cache, remove_skip_cache, skip_cache
from skipcache.branches.fitted import (
    FARTHEST,
    HISTORY,
    Cell,
    FittedBranches,
    bucket_of,
    grouped,
    known_inputs,
    with_base_model,
)
from skipcache.errors import ConfigError
from skipcache.estimators import Refresh, Residual, Tensors
from skipcache.runtime.controller import controller_of
from skipcache.schedules import Schedule
from skipcache.targets import is_module, transformers_of

MIXED_INTERVALS = (2, 3, 4, 5, 6)
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
ROUNDS = 2


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
    sampler: Callable[..., Any] | None = None,
    seed: int = 0,
) -> FittedBranches:
    """Fits skip branches past the deep span on a frozen model, by linear least squares.

    Args:
        pipe: a pipeline with one transformer, or a bare transformer together with ``sampler``.
        calls: keyword arguments of one call of the pipeline each; the last tenth (at least one) is
            held out. A call without a ``generator`` gets one, seeded by its position.
        interval: refresh every so many steps while fitting; default: 2 to 6 in turns.
        schedule: when to refresh, instead of ``interval``.
        front_layers: of the cache that it is for.
        back_layers: likewise.
        rank: of the matrices, by singular values in the metric of the inputs; default: full.
        groups: channel groups that do not see each other; divides the width. With G groups the
            normal equations of width C take 8 * 16 * C^2 / G bytes a distance.
        time_buckets: equal parts of normalised time, each with matrices of its own.
        ridge: relative to the mean of the diagonal; default: the best on the held-out calls.
        sampler: called as ``sampler(**call)`` in place of the pipeline; it must open a
            ``skip_cache_run`` if the cache cannot tell the steps of a run.
        seed: of the generators.

    Returns:
        The fit, for ``apply_skip_cache(pipe, branches=...)``. The pipeline is as it was, with what
        was applied to it.

    Raises:
        ConfigError: a value that cannot be, fewer than two calls, or calls without a reuse step.
        SkipCacheError: as ``apply_skip_cache``.
    """
    asked = [dict(call) for call in calls]
    _check(asked, interval, schedule, rank, groups, time_buckets, ridge)
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
    options: dict[str, Any] = {"front_layers": front_layers, "back_layers": back_layers}
    learner = _Learner(groups, time_buckets)
    with skip_cache(pipe, **options):  # puts back what was applied before
        remove_skip_cache(pipe)
        for number in range(ROUNDS):
            learner.begin()
            for index, call in enumerate(asked):
                learner.is_held_out = index >= len(asked) - held_out
                if schedule is not None:
                    options["schedule"] = schedule
                else:
                    options["interval"] = interval or MIXED_INTERVALS[index % 5]
                apply_skip_cache(pipe, estimator=learner, **options)
                controller = controller_of(transformer)
                assert controller is not None
                controller.slot.witness = learner.observe
                sampler(**_fresh(call))
            learner.solve(rank if number == ROUNDS - 1 else None, ridge)
    if not learner.has_data:
        raise ConfigError(
            "the calls reused nothing, so there is nothing to fit. Use more denoising steps, or a "
            "schedule that leaves steps out."
        )
    made_by = (
        f"fit_skip_branches on {len(asked)} calls (the last {held_out} held out), "
        f"{'schedule given' if schedule is not None else f'interval {interval or MIXED_INTERVALS}'}"
    )
    fit = FittedBranches(
        learner.dim, front_layers, back_layers, *learner.solution(), time_buckets=time_buckets
    )
    return with_base_model(fit, transformer, made_by)


class _Equations:
    """Normal equations of one cell, for fitting and held out, and sums of squares."""

    def __init__(self, groups: int, inputs: int, width: int) -> None:
        self.xx = torch.zeros(2, groups, inputs, inputs, dtype=torch.float64)
        self.xy = torch.zeros(2, groups, inputs, width, dtype=torch.float64)
        self.before = torch.zeros(2, dtype=torch.float64)  # squared error of residual
        self.hold = torch.zeros(2, dtype=torch.float64)  # likewise of the last deep feature
        self.samples = [0, 0]
        self.distances = 0.0

    def error(self, weight: torch.Tensor) -> float:
        """Relative squared error on the held-out part."""
        left = self.before[1] - 2 * (weight * self.xy[1]).sum()
        left = left + (weight * (self.xx[1] @ weight)).sum()
        return float(left / self.hold[1].clamp_min(1e-300))


class _Learner:
    """An estimator that estimates by what it has learnt so far, and is told what was true."""

    history = HISTORY
    needs_shallow = True

    def __init__(self, groups: int, time_buckets: int) -> None:
        self.groups, self.time_buckets = groups, time_buckets
        self.is_held_out = False
        self.dim = 0
        self.equations: dict[tuple[int, int, int], _Equations] = {}
        self.weights: dict[tuple[int, int, int], tuple[torch.Tensor, ...]] = {}
        self.cells: dict[tuple[int, int, int], Cell] = {}
        self._step: tuple[Sequence[Refresh], int, float] | None = None
        self._seen: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def has_data(self) -> bool:
        return bool(self.equations)

    def begin(self) -> None:
        self.equations = {}

    def prepare(self, refreshes: Sequence[Refresh], step: int, time: float) -> tuple[Tensors, ...]:
        self._step = refreshes, step, time
        return Residual().prepare(refreshes, step, time)

    def estimate(self, prepared: tuple[Tensors, ...], shallow: Tensors | None) -> Tensors:
        assert self._step is not None
        refreshes, step, time = self._step
        base = Residual().estimate(prepared, shallow)
        held, then, first = prepared[0][0], prepared[1][0], base[0]
        assert shallow is not None
        now = shallow[0]
        assert held is not None
        assert then is not None
        assert now is not None
        assert first is not None
        self.dim = first.shape[-1]
        if self.dim % self.groups:
            raise ConfigError(f"groups={self.groups} does not divide the width {self.dim}.")
        known = (now.float() - then.float(), *known_inputs(refreshes, step))
        parts = [grouped(part, self.groups) for part in known]
        inputs = torch.cat([*parts, torch.ones_like(parts[0][..., :1])], -1)  # [G, N, D]
        self._seen = inputs, first.float(), held.float()
        weight = self.weights.get(self._key(refreshes, step, time))
        if weight is None:
            return base
        moved = inputs
        for matrix in weight:
            moved = moved @ matrix.to(inputs)
        moved = moved.transpose(0, 1).reshape(first.shape)
        return (first.float() + moved).to(first.dtype), *base[1:]

    def observe(self, true: Tensors) -> None:
        """Told the true deep feature of the step just estimated."""
        assert self._step is not None
        assert self._seen is not None
        assert true[0] is not None
        refreshes, step, time = self._step
        distance = refreshes[-1].time - time
        if not distance > 0:
            return
        inputs, base, last = self._seen
        x, deep = inputs.double(), true[0].double()
        missed = deep - base.double()
        y = grouped(missed, self.groups)
        key = self._key(refreshes, step, time)
        if key not in self.equations:
            self.equations[key] = _Equations(self.groups, x.shape[-1], y.shape[-1])
        sums, part = self.equations[key], int(self.is_held_out)
        sums.xx[part] += (x.transpose(1, 2) @ x).cpu()
        sums.xy[part] += (x.transpose(1, 2) @ y).cpu()
        sums.before[part] += missed.square().sum().cpu()
        sums.hold[part] += (deep - last.double()).square().sum().cpu()
        sums.samples[part] += x.shape[1]
        sums.distances += distance * x.shape[1]

    def solve(self, rank: int | None, ridge: float | None) -> None:
        """Fits every cell, and leaves out those that do not help on the held-out calls."""
        self.weights, self.cells = {}, {}
        for key, sums in self.equations.items():
            if not all(sums.samples):
                continue
            scale = sums.xx[0].diagonal(dim1=1, dim2=2).clamp_min(1e-12)
            found = []
            for candidate in RIDGES if ridge is None else (ridge,):
                metric = sums.xx[0] + torch.diag_embed(candidate * scale + 1e-9 * scale.mean())
                weight = torch.linalg.solve(metric, sums.xy[0])
                found.append((sums.error(weight), candidate, weight, metric))
            _, _, weight, metric = min(found, key=lambda item: item[0])
            factors = _factored(weight, metric, rank)
            whole = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
            before = float(sums.before[1] / sums.hold[1].clamp_min(1e-300))
            after = sums.error(whole)
            if math.isfinite(after) and after < before:
                distance = sums.distances / sum(sums.samples)
                place = (distance, key[2], key[0], sums.samples[0])
                self.cells[key] = Cell(*place, before, after)
                self.weights[key] = tuple(factor.float().contiguous() for factor in factors)

    def solution(self) -> tuple[tuple[Cell, ...], tuple[tuple[torch.Tensor, ...], ...]]:
        order = sorted(self.cells)
        return tuple(self.cells[k] for k in order), tuple(self.weights[k] for k in order)

    def _key(self, refreshes: Sequence[Refresh], step: int, time: float) -> tuple[int, int, int]:
        """Refreshes, distance on a logarithmic grid, bucket."""
        distance = refreshes[-1].time - time
        grid = round(math.log(distance) / math.log(FARTHEST) * 4) if distance > 0 else 0
        return len(refreshes), grid, bucket_of(time, self.time_buckets)


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


def _fresh(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with generators in the state that they were given in, so that rounds agree."""

    def renew(value: Any) -> Any:
        if isinstance(value, torch.Generator):
            return torch.Generator(value.device).set_state(value.get_state())
        if isinstance(value, list) and value and isinstance(value[0], torch.Generator):
            return [renew(item) for item in value]
        return value

    return {name: renew(value) for name, value in call.items()}


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
) -> None:
    if len(calls) < 2:
        raise ConfigError(
            f"{len(calls)} calls are too few: one is held out and at least one is fitted on. Pass "
            "at least two; 16 to 64 samples are usual."
        )
    if interval is not None and schedule is not None:
        raise ConfigError("interval and schedule both say when to refresh. Pass one of them.")
    counts = {"rank": rank, "groups": groups, "time_buckets": time_buckets}
    for name, count in counts.items():
        is_whole = isinstance(count, int) and not isinstance(count, bool) and count >= 1
        if not is_whole and (count is not None or name != "rank"):
            raise ConfigError(f"{name} is {count!r}. It is a whole number from 1.")
    if ridge is not None and not (math.isfinite(ridge) and ridge >= 0):
        raise ConfigError(f"ridge is {ridge!r}. It is a finite number from 0.")
