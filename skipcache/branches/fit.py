"""The closed-form fit: skip branches for a frozen model, without training.

The calls are sampled once, uncached, and the features of a sample of their tokens are kept. On them
any schedule can be walked without sampling again: at each reuse step, from noise to clean, ridge
least squares give the matrix that predicts what ``residual`` misses there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from skipcache.api import skip_cache
from skipcache.branches.fitted import FittedBranches, with_base_model
from skipcache.branches.recorder import Recorder
from skipcache.branches.walks import Cells
from skipcache.config import DEFAULT_WINDOW
from skipcache.errors import ConfigError
from skipcache.estimators import Residual
from skipcache.runtime.controller import controller_of
from skipcache.schedules import IntervalSchedule, Schedule
from skipcache.targets import is_module, transformers_of

MIXED = {1: (2, 3, 4, 5, 6), 2: (2, 3)}  # intervals for all steps, and for every other one
RIDGES = (1e-2, 1e-1, 1.0)
WALKING_RIDGE = 0.1


def fit_skip_branches(
    pipe: Any,
    calls: Iterable[Mapping[str, Any]],
    *,
    interval: int | None = None,
    schedule: Schedule | None = None,
    front_layers: int = 1,
    back_layers: int = 1,
    rank: int | None = None,
    full_rank_above: float = 1.0,
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
        full_rank_above: normalised time above which they keep their full rank all the same, for
            early errors count most.
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
    _check(asked, interval, schedule, rank, full_rank_above, groups, time_buckets, ridge, tokens)
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
    recorder = Recorder(max(1, tokens // len(asked)), seed)
    options: dict[str, Any] = {"front_layers": front_layers, "back_layers": back_layers}
    with skip_cache(pipe, interval=1, estimator=Residual(), **options):
        controller = controller_of(transformer)
        assert controller is not None
        for index, call in enumerate(asked):
            recorder.watch(controller, is_held_out=index >= len(asked) - held_out)
            sampler(**call)
    walks = _walks(interval, schedule)
    cells = Cells(groups, time_buckets, WALKING_RIDGE if ridge is None else ridge)
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
    solved = cells.solve(RIDGES if ridge is None else (ridge,), rank, full_rank_above)
    fit = FittedBranches(
        recorder.dim, front_layers, back_layers, *solved, time_buckets=time_buckets
    )
    return with_base_model(fit, transformer, made_by)


def _walks(interval: int | None, schedule: Schedule | None) -> list[tuple[int, Schedule]]:
    """Strides over the steps, and schedules."""
    if schedule is not None:
        return [(1, schedule)]
    if interval is not None:
        return [(1, IntervalSchedule(interval, *DEFAULT_WINDOW))]
    return [
        (stride, IntervalSchedule(mixed, *DEFAULT_WINDOW))
        for stride, intervals in MIXED.items()
        for mixed in intervals
    ]


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
    full_rank_above: float,
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
    if not 0 <= full_rank_above <= 1:
        raise ConfigError(f"full_rank_above is {full_rank_above!r}. It is a time from 0 to 1.")
    if ridge is not None and not (math.isfinite(ridge) and ridge >= 0):
        raise ConfigError(f"ridge is {ridge!r}. It is a finite number from 0.")
