"""Refreshes that a run adds to its plan, where its outputs are harder to tell than those of the
calibration: against a slow walk over the outputs themselves.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import build, reference, sample, surroundings, transformer_of
from recipes import recipe_for
from skipcache import (
    SkipCacheConfig,
    apply_skip_cache,
    cache_stats,
    remove_skip_cache,
    skip_cache,
    skip_cache_run,
)
from skipcache.errors import ConfigError
from skipcache.recipes.plan import SURPRISING, RecipeEstimator, RecipeSchedule
from skipcache.recipes.recipe import Recipe
from skipcache.recipes.statistics import OutputStatistics
from skipcache.recipes.weights import HISTORY, expected_error, nearest_weights, reuse_weights
from skipcache.runtime.store import Run, relative_errors
from skipcache.schedules import AdaptiveSchedule, Miss

QUICK = settings(deadline=None, max_examples=100, derandomize=True)
NAN = float("nan")
STEPS = 20
FEWER = STEPS - 3
BATCH, SAMPLE = 0, 1  # rows of ``misses``


def even(steps: int) -> tuple[float, ...]:
    return tuple(1 - i / steps for i in range(steps))


def statistics_of(times: tuple[float, ...], level: float = 0.0) -> OutputStatistics:
    """Of smooth trajectories that change most late, around a level of their own."""
    draw = np.random.default_rng(0)
    waves = np.exp(-np.outer(times, 1 + 2 * np.arange(5)))
    outputs = waves @ draw.normal(size=(5, 60)) + 0.01 * draw.normal(size=(len(times), 60))
    outputs += level * draw.normal(size=60)
    steps = len(times)
    effects = np.full(steps, -1 / steps)
    return OutputStatistics(times, outputs @ outputs.T / 60, effects, np.ones(steps), 1.0)


STATISTICS = statistics_of(even(STEPS))
RESTING = statistics_of(even(STEPS), level=10.0)  # outputs that stand still are told well


def letters(plan: Sequence[bool]) -> str:
    return "".join("F" if is_refresh else "r" for is_refresh in plan)


# When a miss adds a refresh

PLANNED = (0, 1, 2, 10)  # of 20 steps: two stretches, after the steps 2 and 10


def schedule_of(adaptive: str, misses: Any = None, speedup: float = 5.0) -> RecipeSchedule:
    """Plans ``PLANNED`` at the steps of ``STATISTICS``."""
    misses = np.ones((2, STEPS)) if misses is None else misses
    known = replace(STATISTICS, misses=misses)
    schedule = RecipeSchedule(known, speedup, 0.0, {4: PLANNED}, adaptive)
    assert isinstance(schedule, AdaptiveSchedule)
    assert schedule.is_adaptive
    return schedule


def missed_by(adaptive: str, step: int, seen: tuple[int, ...], error: float) -> Miss:
    """A miss by that much where ``adaptive`` looks, and by nothing where it does not."""
    return Miss(step, seen, *((error, 0.0) if adaptive == "batch" else (0.0, error)))


def added(schedule: RecipeSchedule, miss: Miss, until: int) -> list[int]:
    """Steps from the miss to that one at which a refresh would be added."""
    steps = range(miss.step + 1, until)
    return [step for step in steps if schedule.adds_refresh(STATISTICS.times, step, miss)]


@pytest.mark.parametrize("adaptive", ["batch", "sample"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_misses_that_are_usual_add_nothing(share, adaptive):
    """Up to what is surprising, the plan is left alone, whatever the other number says."""
    schedule = schedule_of(adaptive)
    usual = SURPRISING * expected_error(STATISTICS, (0, 1), 2)
    assert usual > 0
    for other in (0.0, 1e9):
        errors = (share * usual, other) if adaptive == "batch" else (other, share * usual)
        assert added(schedule, Miss(2, (0, 1), *errors), STEPS) == []


@pytest.mark.parametrize("adaptive", ["batch", "sample"])
@pytest.mark.parametrize(
    ("step", "until", "times", "first"),
    [
        (2, 10, 4.01, 6),  # a stretch of 8, cut at its half
        (2, 10, 16.01, 4),  # at a quarter
        (2, 10, 64.01, 3),
        (2, 10, 1e9, 3),
        (2, 10, math.inf, 3),
        (2, 10, 1.5, 9),  # 8 / 1.22 = 6.5 steps
        (2, 10, 1.01, 10),  # only where the plan refreshes anyway
        (10, STEPS, 4.01, 15),  # a stretch of 10, up to the end
        (10, STEPS, 25.01, 12),
        (6, 10, 4.01, 8),  # after a refresh that was added, what is left of its stretch
    ],
)
def test_a_stretch_is_cut_by_the_root_of_the_surprise(step, until, times, first, adaptive):
    """So many times more than is surprising leaves a root of that of the stretch before the next
    refresh of the plan, and then every step until there is one.
    """
    schedule = schedule_of(adaptive)
    seen = tuple(i for i in PLANNED if i < step)
    usual = SURPRISING * expected_error(STATISTICS, seen, step)
    miss = missed_by(adaptive, step, seen, times * usual)
    assert added(schedule, miss, until) == list(range(first, until))
    assert schedule.plan(STATISTICS.times) == tuple(i in PLANNED for i in range(STEPS))


@QUICK
@given(
    st.sampled_from(["batch", "sample"]),
    st.floats(0.1, 10),
    st.floats(0.1, 10),
    st.floats(0.01, 100),
)
def test_what_is_usual_was_measured_of_the_batch_and_of_its_worst_sample(
    adaptive, whole, worst, times
):
    """``misses`` says how many times more than is told is usual: its first row of the batch, its
    second of the worst sample, each at the step of the refresh.
    """
    misses = np.full((2, STEPS), 1e-9)  # where it is not to be looked at
    misses[:, 2] = whole, worst
    schedule = schedule_of(adaptive, misses)
    row = misses[BATCH if adaptive == "batch" else SAMPLE, 2]
    allowed = SURPRISING * row * expected_error(STATISTICS, (0, 1), 2)
    found = added(schedule, missed_by(adaptive, 2, (0, 1), times * allowed), 10)
    first = 2 + math.ceil(8 / math.sqrt(times) - 1e-9) if times > 1.0 else 10
    assert found == list(range(max(first, 3), 10))


@pytest.mark.parametrize("times", [(), (1.0,), (1.0, 0.5), (NAN, NAN, NAN), (1.0, NAN, 0.5, 0.2)])
def test_short_and_unknown_runs_add_nothing(times):
    """They refresh at every step, and nothing is known of them to compare a miss with."""
    for step in range(len(times) + 1):
        for adaptive in ("batch", "sample"):
            miss = Miss(0, (), math.inf, math.inf)
            assert not schedule_of(adaptive).adds_refresh(times, step, miss)


@pytest.mark.parametrize("adaptive", ["batch", "sample"])
def test_a_miss_that_is_no_number_adds_nothing(adaptive):
    """As of outputs that overflowed: nothing that a refresh would save."""
    schedule = schedule_of(adaptive)
    assert added(schedule, missed_by(adaptive, 2, (0, 1), NAN), STEPS) == []


def test_another_number_of_steps():
    """A run of fewer steps is compared with the statistics at its own times; one of more, between
    whose outputs nothing was measured, is left alone.
    """
    misses = np.ones((2, STEPS))
    misses[:, STEPS // 2 :] = 100.0
    schedule, times = schedule_of("batch", misses), even(FEWER)
    run = schedule.planned(times)
    refreshes = np.flatnonzero(run.plan).tolist()
    early, late = refreshes[1], refreshes[-1]
    assert times[early] > 0.55
    assert times[late] < 0.4
    for step, usual in ((early, 1.0), (late, 100.0)):
        seen = tuple(i for i in range(step) if run.plan[i])[-HISTORY:]
        told = expected_error(STATISTICS.at(times), seen, step)
        steps = range(step + 1, FEWER)
        for share, adds in ((0.99, False), (1e6, True)):
            miss = Miss(step, seen, share * SURPRISING * usual * told, 0.0)
            assert any(schedule.adds_refresh(times, i, miss) for i in steps) == adds
            assert not any(schedule.adds_refresh(even(50), i, miss) for i in range(step + 1, 50))


# What is missed


def numpy_errors(estimate: Any, true: Any) -> tuple[float, float]:
    """Literally; tensors of one number of samples are samples of several parts each."""
    pairs = [
        (guess.double().numpy(), found.double().numpy())
        for guess, found in zip(estimate, true, strict=True)
        if guess is not None and found is not None
    ]
    if len({len(found) for _, found in pairs}) == 1:
        samples = [
            [(guess[i], found[i]) for guess, found in pairs] for i in range(len(pairs[0][0]))
        ]
    else:
        samples = [[pair] for pair in pairs]

    def relative(parts: Any) -> float:
        missed = sum(((guess - found) ** 2).sum() for guess, found in parts)
        size = sum((found**2).sum() for _, found in parts)
        return math.sqrt(missed / size)

    return relative(pairs), max(relative(parts) for parts in samples)


@QUICK
@given(
    st.integers(0, 10_000),
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=3),
    st.sampled_from([None, 1, 4]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_relative_errors_follow_numpy(seed, tails, batch, dtype):
    """Of one or several tensors, of one number of samples or of different ones, with Nones among
    them on either side: the error of all, and of the worst sample.
    """
    draw = torch.Generator().manual_seed(seed)
    shapes = [[i + 1 if batch is None else batch, *tail] for i, tail in enumerate(tails)]
    true = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    estimate = [tensor + torch.randn(tensor.shape, generator=draw).to(dtype) for tensor in true]
    gone = torch.randn(5, 2, generator=draw)
    true, estimate = (None, *true, None, gone), (gone, *estimate, None, None)
    found = relative_errors(estimate, true)
    assert found == pytest.approx(numpy_errors(estimate, true), rel=1e-9)
    assert found[0] <= found[1] * (1 + 1e-9)
    assert all(type(value) is float for value in found)


def test_the_worst_sample_is_found():
    """Its error counts whole, and that of the batch is shared among all."""
    true = torch.ones(4, 3)
    estimate = true.clone()
    estimate[2] = 3.0
    assert relative_errors((estimate,), (true,)) == pytest.approx((1.0, 2.0))
    # One sample in two parts, as of a picture and its sound: neither part is a sample.
    parts = (estimate[2:3], true[:1]), (true[2:3], true[:1])
    assert relative_errors(*parts) == pytest.approx((math.sqrt(2), math.sqrt(2)))


def test_outputs_of_nothing():
    """Nothing is missed of an output that is nothing, if that is what was estimated; if not, it is
    missed by more than any other.
    """
    nothing, something = torch.zeros(2, 3), torch.ones(2, 3)
    assert relative_errors((nothing,), (nothing,)) == (0.0, 0.0)
    assert relative_errors((nothing,), (something,)) == pytest.approx((1.0, 1.0))
    for error in relative_errors((something,), (nothing,)):
        assert math.isfinite(error)
        assert error > 1e100
    half = torch.cat([nothing[:1], something[:1]])
    assert relative_errors((half,), (half,)) == (0.0, 0.0)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_outputs_of_few_dimensions(shape):
    """A number beside the sample (a loss, a scale) or one for each sample is no obstacle."""
    true = torch.ones(3, 4), torch.ones(shape)
    estimate = torch.ones(3, 4), torch.full(shape, 1.5)
    missed, size = (0.25, 13) if shape == () else (0.75, 15)
    assert relative_errors(estimate, true)[0] == pytest.approx(math.sqrt(missed / size))


# What a run notes of it


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_streams_of_a_step_count_as_one(order):
    """In any order, the one that misses most says what it saw and by how much, and the worst
    sample is that of all.
    """
    misses = [
        Miss(4, (0, 2), 0.1, 0.9),
        Miss(4, (1, 2), 0.3, 0.4),
        Miss(4, (2,), 0.2, 0.5),
    ]
    run = Run()
    for index in order:
        run.take(misses[index])
    assert run.misses == [Miss(4, (1, 2), 0.3, 0.9)]


def test_steps_are_kept_apart():
    """A smaller miss at a later step does not make up for the larger one before."""
    earlier, later, same = Miss(4, (0,), 0.3, 0.5), Miss(6, (4,), 0.1, 0.2), Miss(6, (4,), 0.05, 1)
    run = Run()
    for miss in (earlier, later, same):
        run.take(miss)
    assert run.misses == [earlier, Miss(6, (4,), 0.1, 1)]


# In a transformer


@dataclass(frozen=True)
class Sampled:
    """What a transformer is called with in one run, and what it says uncached."""

    calls: list[dict[str, torch.Tensor]]  # step by step, stream by stream
    outputs: list[torch.Tensor]
    streams: int

    @property
    def samples(self) -> np.ndarray:
        """[streams, n, B, elements]."""
        stacked = torch.stack(self.outputs).double().flatten(2)
        return stacked.unflatten(0, (-1, self.streams)).transpose(0, 1).numpy()


@torch.no_grad()
def sampled(times: Sequence[float], jumps: Sequence[Sequence[float]], seed: int = 0) -> Sampled:
    """Inputs that move from step to step: ``jumps`` has a list for each stream, of by how much for
    each sample. Their timestep stays, so that nothing else moves.
    """
    model = transformer_of("dit")
    draw = torch.Generator().manual_seed(seed)
    states = [torch.randn(len(each), 4, 8, 8, generator=draw) for each in jumps]
    calls = []
    for _ in times:
        for stream, each in enumerate(jumps):
            moved = torch.randn(states[stream].shape, generator=draw)
            states[stream] = states[stream] + torch.tensor(each)[:, None, None, None] * moved
            calls.append(
                {
                    "hidden_states": states[stream],
                    "timestep": torch.full((len(each),), 500.0),
                    "class_labels": torch.ones(len(each), dtype=torch.long),
                }
            )
    return Sampled(calls, [model(**call).sample for call in calls], len(jumps))


def config_of(schedule: RecipeSchedule) -> SkipCacheConfig:
    estimator = RecipeEstimator(schedule.statistics)
    return SkipCacheConfig(front_layers=0, back_layers=0, schedule=schedule, estimator=estimator)


@torch.no_grad()
def run_cached(model: Any, given: Sampled, times: Sequence[float]) -> tuple[list[Any], str]:
    """What a transformer with a cache says, and the plan of all its streams."""
    with skip_cache_run(model, given.streams, timesteps=[1000 * time for time in times]):
        outputs = [model(**call).sample for call in given.calls]
        stats = cache_stats(model)
    assert len(stats.streams) == given.streams
    assert len({stream.plan for stream in stats.streams.values()}) == 1
    return outputs, stats.plan


def missed(
    samples: np.ndarray, known: OutputStatistics, seen: Sequence[int], step: int
) -> tuple[float, float, float]:
    """What a refresh is missed by, of the stream where it is most, by the batch and by the worst
    sample; and what is told.
    """
    weights = nearest_weights(known, seen, np.eye(known.steps)[step])
    errors = []
    for stream in samples:
        away = np.einsum("s,sbe->be", weights, stream[list(seen)]) - stream[step]
        each, size = (away**2).sum(1), (stream[step] ** 2).sum(1)
        errors.append((math.sqrt(each.sum() / size.sum()), math.sqrt((each / size).max())))
    whole, worst = np.array(errors).max(0)
    return whole, worst, expected_error(known, seen, step)


def walked(schedule: RecipeSchedule, samples: np.ndarray, times: Sequence[float]) -> str:
    """The plan of a run, literally: after each refresh that is missed by too much, the stretch that
    was planned is cut.
    """
    planned, known = schedule.planned(times).plan, schedule.statistics.at(times)
    n, due = len(times), len(times)
    plan: list[bool] = []
    for step in range(n):
        plan.append(planned[step] or step >= due)
        seen = [i for i in range(step) if plan[i]][-HISTORY:]
        if not plan[step] or not seen:
            continue
        *by, told = missed(samples, known, seen, step)
        row = BATCH if schedule.adaptive == "batch" else SAMPLE
        allowed, due = SURPRISING * known.misses[row, step] * told, n
        if by[row] > allowed:
            end = next((i for i in range(step + 1, n) if planned[i]), n)
            due = step + math.ceil((end - step) * math.sqrt(allowed / by[row]))
    return letters(plan)


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("adaptive", ["batch", "sample"])
def test_a_run_follows_the_slow_walk(adaptive, streams):
    """Over many runs, the plan is what walking over the outputs gives, in all streams of a step;
    it refreshes wherever it was planned, refreshes say what the transformer says, and what is
    reused in between is weighed for the plan that came of it.
    """
    model, more = transformer_of("dit"), []
    for seed in range(12):
        draw = np.random.default_rng(seed)
        times = even(STEPS) if seed % 2 else even(15)
        jumps = draw.choice([0.0, 0.02, 0.5], size=(streams, 3)).tolist()
        given = sampled(times, jumps, seed)
        lowest = (-1.0, 0.5, 4.0)[seed % 3]
        misses = 10 ** draw.uniform(lowest, lowest + 1.5, size=(2, STEPS))
        known = replace((STATISTICS, RESTING)[seed // 6], misses=misses)
        schedule = RecipeSchedule(known, 3.0, 0.0, {}, adaptive)
        with skip_cache(model, config=config_of(schedule)):
            found, plan = run_cached(model, given, times)
        assert plan == walked(schedule, given.samples, times)
        planned = letters(schedule.plan(times))
        assert all(now == "F" for now, was in zip(plan, planned, strict=True) if was == "F")
        more.append(plan.count("F") - planned.count("F"))
        weights = reuse_weights(known.at(times), [letter == "F" for letter in plan])
        for place, output in enumerate(found):
            step, stream = divmod(place, streams)
            if plan[step] == "F":
                assert torch.equal(output, given.outputs[place])
                continue
            reuse = weights[step]
            own = given.outputs[stream::streams]
            pairs = zip(reuse.weights, reuse.refresh_steps, strict=True)
            torch.testing.assert_close(
                output, sum(w * own[i] for w, i in pairs), atol=1e-4, rtol=1e-4
            )
    assert 0 in more
    assert len(set(more)) >= 4  # by how much varies as well


def known_for(
    given: Sampled, schedule: RecipeSchedule, share: float, row: int = BATCH
) -> OutputStatistics:
    """Statistics by which the planned refreshes are missed by so many times what is surprising."""
    plan, known = schedule.plan(RESTING.times), RESTING
    misses = np.ones((2, STEPS))
    for step in range(1, STEPS):
        seen = [i for i in range(step) if plan[i]][-HISTORY:]
        *by, told = missed(given.samples, known, seen, step)
        misses[:, step] = by[row] / (share * SURPRISING * told)
    return replace(known, misses=misses)


def test_a_stream_that_misses_adds_for_all():
    """Where the second of two passes alone is surprising, both refresh more, at the same steps."""
    model, plain = transformer_of("dit"), RecipeSchedule(RESTING, 5.0, 0.0)
    calm, both = (sampled(even(STEPS), [[0.0], [jump]]) for jump in (0.0, 0.5))
    known = known_for(calm, plain, 0.9)
    planned = letters(plain.plan(RESTING.times))
    with skip_cache(model, config=config_of(replace(plain, statistics=known, adaptive="batch"))):
        assert run_cached(model, calm, even(STEPS))[1] == planned
        plan = run_cached(model, both, even(STEPS))[1]
    assert plan.count("F") > planned.count("F")


def test_one_hard_sample_of_a_batch():
    """A sample whose outputs jump is missed among seven that do not: it adds refreshes where
    samples are looked at, and none where batches are.
    """
    model, plain = transformer_of("dit"), RecipeSchedule(RESTING, 5.0, 0.0)
    given = sampled(even(STEPS), [[0.0] * 7 + [0.5]])
    known = known_for(given, plain, 0.95)
    planned = letters(plain.plan(RESTING.times))
    plans = {}
    for adaptive in ("batch", "sample"):
        schedule = replace(plain, statistics=known, adaptive=adaptive)
        with skip_cache(model, config=config_of(schedule)):
            plans[adaptive] = run_cached(model, given, even(STEPS))[1]
    assert plans["batch"] == planned
    assert plans["sample"].count("F") > planned.count("F")


def test_a_run_leaves_nothing_to_the_next():
    """After a run that added refreshes, one that misses little runs as planned, and a run given
    again is the same, bit for bit.
    """
    model, plain = transformer_of("dit"), RecipeSchedule(RESTING, 5.0, 0.0)
    calm, hard = (sampled(even(STEPS), [[jump] * 2]) for jump in (0.0, 0.5))
    known = known_for(calm, plain, 0.9)
    schedule = replace(plain, statistics=known, adaptive="batch")
    planned = letters(plain.plan(RESTING.times))
    with skip_cache(model, config=config_of(schedule)):
        first, plan = run_cached(model, hard, even(STEPS))
        assert plan.count("F") > planned.count("F")
        assert run_cached(model, calm, even(STEPS))[1] == planned
        again, same = run_cached(model, hard, even(STEPS))
    assert same == plan
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("adaptive", [None, "batch"])
def test_where_nothing_is_added_nothing_is_measured(adaptive, monkeypatch):
    """Misses are measured, which waits for the device, only where they may add refreshes, and at
    refreshes alone: not at the first, nor after the last reuse.
    """
    measured = []

    def counted(*args: Any) -> tuple[float, float]:
        measured.append(args)
        return 0.0, 0.0

    monkeypatch.setattr("skipcache.runtime.controller.relative_errors", counted)
    model = transformer_of("dit")
    stored = (0, 1, 4, 8, 12, 16, 18, 19)
    schedule = RecipeSchedule(STATISTICS, 2.5, 0.0, {8: stored}, adaptive)
    given = sampled(even(STEPS), [[0.5]])
    with skip_cache(model, config=config_of(schedule)):
        plan = run_cached(model, given, even(STEPS))[1]
    assert plan == letters([step in stored for step in range(STEPS)])
    assert len(measured) == (0 if adaptive is None else 5)  # 1, 4, 8, 12 and 16


def test_runs_of_unknown_length_are_not_measured(monkeypatch):
    """They have no plan that a refresh could be added to, so the device is not waited for."""
    measured = []

    def counted(*args: Any) -> tuple[float, float]:
        measured.append(args)
        return 0.0, 0.0

    monkeypatch.setattr("skipcache.runtime.controller.relative_errors", counted)
    model, given = transformer_of("dit"), sampled(even(STEPS), [[0.5]])
    schedule = RecipeSchedule(STATISTICS, 2.5, 0.0, {}, "batch")
    with torch.no_grad(), skip_cache(model, config=config_of(schedule)), skip_cache_run(model):
        for call, time in zip(given.calls, even(STEPS), strict=True):
            model(**{**call, "timestep": torch.tensor([1000 * time])})
        assert cache_stats(model).refreshed > 2
    assert measured == []


# In a pipeline


def recipe_that_expects(times: float) -> Recipe:
    """Misses of so many times what is told."""
    found = recipe_for()
    misses = np.full((2, found.steps), times)
    return replace(found, statistics=replace(found.statistics, misses=misses))


@pytest.mark.parametrize("adaptive", ["batch", "sample"])
@pytest.mark.parametrize("steps", [7, 8])
def test_a_recipe_that_expects_too_little(steps, adaptive):
    """In a pipeline, refreshes are added to those planned, and a second run does the same."""
    recipe = recipe_that_expects(1e-6)
    pipe = apply_skip_cache(build("dit"), recipe=recipe)
    plain = sample(pipe, steps)
    planned = cache_stats(pipe).plan
    assert "r" in planned
    apply_skip_cache(pipe, recipe=recipe, adaptive=adaptive)
    found = sample(pipe, steps)
    plan = cache_stats(pipe).plan
    assert plan.count("F") > planned.count("F")
    assert all(now == "F" for now, was in zip(plan, planned, strict=True) if was == "F")
    assert not torch.equal(found, plain)
    other = sample(pipe, steps, seed=1)
    assert not torch.equal(other, found)
    assert torch.equal(sample(pipe, steps), found)
    assert cache_stats(pipe).plan == plan
    remove_skip_cache(pipe)
    assert torch.equal(sample(pipe), reference("dit", estimator=None))


@pytest.mark.parametrize("adaptive", ["batch", "sample"])
def test_a_recipe_that_expects_much(adaptive):
    """Where no miss is surprising, the run is the one without ``adaptive``, bit for bit."""
    recipe = recipe_that_expects(1e6)
    pipe = apply_skip_cache(build("dit"), recipe=recipe)
    plain = sample(pipe, 8)
    planned = cache_stats(pipe).plan
    apply_skip_cache(pipe, recipe=recipe, adaptive=adaptive)
    assert torch.equal(sample(pipe, 8), plain)
    assert cache_stats(pipe).plan == planned


# Asked for


@pytest.mark.parametrize("adaptive", ["Batch", "", "samples", True, False, 1, ["batch"]])
def test_what_cannot_be_adaptive(adaptive):
    """What it is not is refused by name, and the pipeline is as it was."""
    pipe = build("dit")
    before = surroundings(pipe)
    with pytest.raises(ConfigError, match=r"It is 'batch', 'sample' or None") as caught:
        apply_skip_cache(pipe, recipe=recipe_for(), adaptive=adaptive)
    assert f"adaptive is {adaptive!r}" in str(caught.value)
    assert surroundings(pipe) == before


@pytest.mark.parametrize("options", [{}, {"speedup": 2.0}], ids=["alone", "speedup"])
def test_adaptive_without_a_recipe(options):
    """There is nothing to compare a run with: refused, and the pipeline is as it was."""
    pipe = build("dit")
    before = surroundings(pipe)
    with pytest.raises(ConfigError, match=r"calibration of a recipe, and there is none"):
        apply_skip_cache(pipe, adaptive="batch", **options)
    assert surroundings(pipe) == before


@pytest.mark.parametrize(
    "option", [{"interval": 2}, {"estimator": "hold"}, {"config": SkipCacheConfig()}], ids=str
)
def test_no_other_option_beside_adaptive(option):
    """It says what a recipe does, so what says the same is refused beside it, as beside one."""
    pipe = build("dit")
    before = surroundings(pipe)
    with pytest.raises(ConfigError, match="no other option than adapter and adaptive"):
        apply_skip_cache(pipe, adaptive="batch", **option)
    assert surroundings(pipe) == before


def test_a_recipe_is_not_adaptive_by_itself():
    """Unless it is said, a speedup that was asked for is kept."""
    recipe = recipe_for()
    assert not recipe.at(2.0).schedule.is_adaptive
    assert recipe.at(2.0, adaptive="sample").schedule.is_adaptive


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
@pytest.mark.parametrize("is_used", [False, True])
def test_copies_of_a_pipeline(copied, is_used):
    """A copy samples the same and adds the same refreshes, made before a run or after one."""
    recipe = recipe_that_expects(0.05)
    pipe = apply_skip_cache(build("dit"), recipe=recipe, adaptive="batch")
    if is_used:
        sample(pipe, 8)
    twin = copied(pipe)
    found = sample(twin, 8)
    plan = cache_stats(twin).plan
    assert torch.equal(sample(pipe, 8), found)
    assert cache_stats(pipe).plan == plan
    assert plan.count("F") > 3
    remove_skip_cache(twin)
    assert torch.equal(sample(twin), reference("dit", estimator=None))
    assert torch.equal(sample(pipe, 8), found)


@pytest.mark.parametrize(
    ("options", "preset"),
    [({}, "recipe/2x"), ({"speedup": 2.5}, "recipe/2.5x"), ({"speedup": 3}, "recipe/3x")],
    ids=str,
)
@pytest.mark.parametrize("adaptive", [None, "sample"])
def test_the_preset_names_the_speedup(options, preset, adaptive):
    """Before the first run as after it, and no more once it is off or something else is on."""
    pipe = apply_skip_cache(build("dit"), recipe=recipe_for(), adaptive=adaptive, **options)
    assert cache_stats(pipe).preset == preset
    sample(pipe, 8)
    assert cache_stats(pipe).preset == preset
    apply_skip_cache(pipe, interval=2)
    assert cache_stats(pipe).preset != preset
