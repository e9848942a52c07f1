"""A speedup becomes a plan and its weights, at any number of steps."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import build, reference, sample, transformer_of
from skipcache import (
    Progress,
    Schedule,
    SkipCacheConfig,
    Taylor,
    apply_skip_cache,
    cache_stats,
    remove_skip_cache,
    skip_cache,
    skip_cache_run,
)
from skipcache.errors import RecipeWarning
from skipcache.estimators import Estimator, PlannedEstimator, Refresh
from skipcache.recipes.plan import (
    RecipeEstimator,
    RecipeSchedule,
    refreshes_for,
    speedup_of,
    steps_of,
)
from skipcache.recipes.search import REACH, best_plans
from skipcache.recipes.statistics import OutputStatistics
from skipcache.recipes.weights import reuse_weights

QUICK = settings(deadline=None, max_examples=100, derandomize=True)
NAN = float("nan")


def even(steps: int) -> tuple[float, ...]:
    return tuple(1 - i / steps for i in range(steps))


def statistics_of(times: tuple[float, ...]) -> OutputStatistics:
    """Of smooth trajectories that change most late."""
    draw = np.random.default_rng(0)
    waves = np.exp(-np.outer(times, 1 + 2 * np.arange(5)))
    outputs = waves @ draw.normal(size=(5, 60)) + 0.01 * draw.normal(size=(len(times), 60))
    steps = len(times)
    effects = np.full(steps, -1 / steps)
    return OutputStatistics(times, outputs @ outputs.T / 60, effects, np.ones(steps), 1.0)


STATISTICS = statistics_of(even(20))


def schedule_of(speedup: float = 2.0, reuse_cost: float = 0.0, **options: Any) -> RecipeSchedule:
    return RecipeSchedule(STATISTICS, speedup, reuse_cost, **options)


def letters(plan: tuple[bool, ...]) -> str:
    return "".join("F" if is_refresh else "r" for is_refresh in plan)


# How many refreshes


@pytest.mark.parametrize(
    ("steps", "speedup", "reuse_cost", "refreshes"),
    [
        (20, 1.0, 0.0, 20),
        (20, 2.0, 0.0, 10),
        (20, 2.0, 0.1, 8),  # 8 + 12 * 0.1 = 9.2 of 10; 9 would be 10.1
        (20, 3.0, 0.0, 6),
        (28, 2.0, 0.05, 13),
        (20, 9.0, 0.2, 0),  # reuse alone takes longer
    ],
)
def test_number_of_refreshes(steps, speedup, reuse_cost, refreshes):
    """As worked out by hand: the most refreshes that leave the run as fast as was asked."""
    assert refreshes_for(steps, speedup, reuse_cost) == refreshes
    assert RecipeSchedule(STATISTICS, speedup, reuse_cost).refreshes(steps) == refreshes


@QUICK
@given(st.integers(1, 200), st.floats(0, 0.95), st.data())
def test_speedup_and_refreshes_are_each_others_inverse(steps, reuse_cost, data):
    """Asking for the speedup of so many refreshes gives so many, rounding or not; and what is given
    for any speedup reaches it, which one more refresh would not.
    """
    refreshes = data.draw(st.integers(1, steps))
    speedup = speedup_of(steps, refreshes, reuse_cost)
    assert refreshes_for(steps, speedup, reuse_cost) == refreshes
    asked = data.draw(st.floats(1, speedup))
    most = refreshes_for(steps, asked, reuse_cost)
    assert refreshes <= most <= steps
    assert speedup_of(steps, most, reuse_cost) >= asked * (1 - 1e-6)
    if most < steps:
        assert speedup_of(steps, most + 1, reuse_cost) < asked


# The plan of a recipe


def test_the_run_that_was_calibrated():
    """At its own times the plan is the best that the search finds."""
    schedule = schedule_of(2.0, 0.1)
    run = schedule.planned(STATISTICS.times)
    assert schedule.plan(list(STATISTICS.times)) == run.plan == best_plans(STATISTICS, [8])[8]
    assert schedule.planned(STATISTICS.times) is run  # looked up, not searched for again


@pytest.mark.parametrize("steps", [5, 19, 21, 50])
def test_another_number_of_steps(steps):
    """For any other run the statistics are taken at its times, and the speedup is kept."""
    schedule = schedule_of(2.5)
    run = schedule.planned(even(steps))
    count = steps * 2 // 5
    assert sum(run.plan) == count
    assert run.plan == best_plans(STATISTICS.at(even(steps)), [count])[count]


def test_a_speedup_that_so_few_steps_cannot_have():
    """A run is never planned with less than two refreshes, nor with too long a stretch, and says
    how fast it can be instead.
    """
    with pytest.warns(RecipeWarning, match="speedup=9 is out of reach at 4 steps.* 2.00 times"):
        assert letters(schedule_of(9.0).plan(even(4))).count("F") == 2
    fewest = math.ceil(40 / (REACH + 1))
    with pytest.warns(RecipeWarning, match="out of reach at 40 steps"):
        assert letters(schedule_of(10.0, 0.5).plan(even(40))).count("F") == fewest


def test_stored_plans_take_precedence():
    """A plan that was refined by sampling is used; at other steps or another number of refreshes
    the search tells.
    """
    stored = (0, 1, 2, 3, 4, 5, 6, 7, 8, 17)
    schedule = schedule_of(2.0, plans={10: stored})
    run = schedule.planned(STATISTICS.times)
    assert steps_of(run.plan) == stored
    assert run.plan != best_plans(STATISTICS, [10])[10]
    assert schedule.plan(even(21)) == schedule_of(2.0).plan(even(21))
    moved = (*even(20)[:-1], 0.04)
    assert schedule.plan(moved) == schedule_of(2.0).plan(moved)
    other = schedule_of(4.0, plans={10: stored})
    assert other.plan(STATISTICS.times) == best_plans(STATISTICS, [5])[5]


@pytest.mark.parametrize("times", [(), (1.0,), (1.0, 0.5), (NAN, NAN, NAN), (1.0, NAN, 0.5, 0.2)])
def test_short_and_unknown_runs_never_reuse(times):
    """Below three steps, and where a time is unknown, every step refreshes."""
    run = schedule_of(4.0).planned(times)
    assert run.plan == (True,) * len(times)
    estimator = RecipeEstimator(STATISTICS)
    assert estimator.for_run(times, run.plan) is estimator


def test_three_steps():
    """The shortest run that reuses refreshes twice, and all of it at a speedup of 1."""
    assert sorted(letters(schedule_of(3.0).planned(even(3)).plan)) == ["F", "F", "r"]
    assert schedule_of(1.0).plan(even(3)) == (True, True, True)


def walk(schedule: Schedule, times: tuple[float, ...]) -> tuple[bool, ...]:
    """One question a step, as where the run's length is not known."""
    plan: list[bool] = []
    for index in range(len(times)):
        since = None if not any(plan) else plan[::-1].index(True) + 1
        plan.append(schedule.is_refresh(Progress(times[: index + 1], since)))
    return tuple(plan)


def test_runs_of_unknown_length():
    """Asked step by step, it refreshes at the times of the plan that was calibrated: all of it for
    the same times, as often for finer ones, and always where a time is unknown.
    """
    schedule = schedule_of(2.5)
    assert walk(schedule, STATISTICS.times) == schedule.plan(STATISTICS.times)
    assert sum(walk(schedule, even(100))) == sum(schedule.plan(STATISTICS.times))
    assert walk(schedule, (NAN,) * 5) == (True,) * 5


def test_runs_of_unknown_length_where_steps_share_a_time():
    """Steps at the same time, as Heun's, do not stop it from being asked step by step."""
    times = (1.0, *(time for time in (0.8, 0.6, 0.4, 0.2) for _ in range(2)))
    schedule = RecipeSchedule(statistics_of(times), 1.2, 0.0)
    plan = schedule.plan(times)
    assert any(plan[i] and plan[i + 1] and times[i] == times[i + 1] for i in range(8))
    assert walk(schedule, times)[0]


# What is reused


def refreshes_at(steps: tuple[int, ...], times: tuple[float, ...]) -> tuple[Refresh, ...]:
    draw = torch.Generator().manual_seed(0)
    deeps = [torch.randn(2, 3, generator=draw) for _ in steps]
    return tuple(
        Refresh(step, times[step], deep=(deep, None), shallow=None)
        for step, deep in zip(steps, deeps, strict=True)
    )


@pytest.mark.parametrize("steps", [20, 31])
def test_planned_weights_are_taken(steps):
    """At every reuse step of a planned run, the sum of the last outputs by its weights."""
    plan, times = schedule_of(2.0).plan(even(steps)), even(steps)
    estimator = RecipeEstimator(STATISTICS).for_run(times, plan)
    planned = reuse_weights(STATISTICS.at(times), plan)
    assert sorted(planned) == [step for step, is_refresh in enumerate(plan) if not is_refresh]
    assert {len(reuse.weights) for reuse in planned.values()} >= {4}
    for step, reuse in planned.items():
        refreshes = refreshes_at(reuse.refresh_steps, times)
        found = estimator.estimate(estimator.prepare(refreshes, step, times[step]), None)
        pairs = zip(reuse.weights, refreshes, strict=True)
        torch.testing.assert_close(found[0], sum(w * r.deep[0] for w, r in pairs))
        assert found[1] is None


def missed_by(weights: Any, steps: tuple[int, ...], step: int) -> float:
    """Square of what a weighted sum of outputs is away from that of the step."""
    away = -np.eye(STATISTICS.steps)[step]
    away[list(steps)] += weights
    return float(away @ STATISTICS.covariance @ away)


def test_other_refreshes_than_planned_are_weighed_anew():
    """Where other steps refreshed than planned, what comes nearest by these: no other weights do,
    and the line through the last two does worse.
    """
    times, plan = STATISTICS.times, schedule_of(2.0).plan(STATISTICS.times)
    estimator = RecipeEstimator(STATISTICS).for_run(times, plan)
    step, reuse = max(reuse_weights(STATISTICS, plan).items())
    planned = reuse.refresh_steps
    for steps in ((planned[0] - 1, *planned[1:]), planned[1:], planned[-2:], planned[-1:]):
        # Refreshes that are unit vectors come back as the weights themselves.
        refreshes = tuple(
            Refresh(own, times[own], (torch.eye(len(steps), dtype=torch.float64)[i],), None)
            for i, own in enumerate(steps)
        )
        (found,) = estimator.prepare(refreshes, step, times[step])[0]
        (line,) = Taylor(1).prepare(refreshes[-2:], step, times[step])[0]
        least = missed_by(found.numpy(), steps, step)
        assert least < missed_by(line.numpy(), steps, step)
        for nudge in np.eye(len(steps)) * 0.05:
            assert least < missed_by(found.numpy() + nudge, steps, step)
            assert least < missed_by(found.numpy() - nudge, steps, step)


def test_runs_of_unknown_length_take_what_was_calibrated():
    """Asked without a run, the estimator takes the calibrated one's weights at its steps and times,
    and at others the line through the last two outputs.
    """
    times, plan = STATISTICS.times, schedule_of(2.0).plan(STATISTICS.times)
    estimator = RecipeEstimator(STATISTICS, plan)
    for step, reuse in reuse_weights(STATISTICS, plan).items():
        refreshes = refreshes_at(reuse.refresh_steps, times)
        found = estimator.prepare(refreshes, step, times[step])
        planned = estimator.for_run(times, plan).prepare(refreshes, step, times[step])
        assert torch.equal(found[0][0], planned[0][0])
        for time in (times[step] - 0.01, NAN):
            found = estimator.prepare(refreshes, step, time)
            line = Taylor(1).prepare(refreshes[-2:], step, time)
            assert torch.equal(found[0][0], line[0][0])


def recipe_config(schedule: RecipeSchedule) -> SkipCacheConfig:
    plan = schedule.planned(schedule.statistics.times).plan
    estimator = RecipeEstimator(schedule.statistics, plan)
    assert isinstance(estimator, PlannedEstimator)
    assert isinstance(schedule, Schedule)
    assert isinstance(estimator, Estimator)
    return SkipCacheConfig(front_layers=0, back_layers=0, schedule=schedule, estimator=estimator)


@torch.no_grad()
def test_a_transformer_returns_the_planned_sums():
    """Applied to a transformer, a reuse step returns its planned combination of the outputs of the
    refreshes, and a refresh what the transformer says.
    """
    model, times = transformer_of("dit"), even(8)
    draw = torch.Generator().manual_seed(1)
    calls = [
        {
            "hidden_states": torch.randn(1, 4, 8, 8, generator=draw),
            "timestep": torch.tensor([1000 * time]),
            "class_labels": torch.tensor([1]),
        }
        for time in times
    ]
    plain = [model(**call).sample for call in calls]
    schedule = schedule_of(2.0)
    with (
        skip_cache(model, config=recipe_config(schedule)),
        skip_cache_run(model, timesteps=[1000 * time for time in times]),
    ):
        found = [model(**call).sample for call in calls]
        stats = cache_stats(model)
    run = schedule.planned(times)
    planned = reuse_weights(STATISTICS.at(times), run.plan)
    assert stats.plan == letters(run.plan)
    assert stats.reused == 4
    for step, output in enumerate(found):
        if run.plan[step]:
            assert torch.equal(output, plain[step])
        else:
            reuse = planned[step]
            pairs = zip(reuse.weights, reuse.refresh_steps, strict=True)
            torch.testing.assert_close(output, sum(w * plain[i] for w, i in pairs))


@torch.no_grad()
def test_a_run_of_unknown_length_is_as_good_as_a_planned_one():
    """At the steps that were calibrated, a loop that does not say what comes gives the same."""
    times = STATISTICS.times
    model, found = transformer_of("dit"), []
    draw = torch.Generator().manual_seed(1)
    latents = [torch.randn(1, 4, 8, 8, generator=draw) for _ in times]
    with skip_cache(model, config=recipe_config(schedule_of(2.0))):
        for timesteps in (None, [1000 * time for time in times]):
            with skip_cache_run(model, timesteps=timesteps):
                found.append(
                    [
                        model(
                            hidden_states=one,
                            timestep=torch.tensor([1000 * time]),
                            class_labels=torch.tensor([1]),
                        ).sample
                        for one, time in zip(latents, times, strict=True)
                    ]
                )
            assert cache_stats(model).reused == 10
    torch.testing.assert_close(*found)


def test_a_pipeline_runs_the_plan():
    """In a pipeline with guidance, at two numbers of steps, the stats are those of the plan, and
    what is sampled is not what the line through the last two outputs makes of it.
    """
    schedule = schedule_of(2.0)
    pipe = apply_skip_cache(build("dit"), config=recipe_config(schedule))
    for steps in (8, 13):
        found = sample(pipe, steps)
        run = next(run for run in schedule._runs.values() if len(run.plan) == steps)
        assert cache_stats(pipe).plan == letters(run.plan)
        assert cache_stats(pipe).refreshed == steps // 2
        with skip_cache(pipe, schedule=schedule, estimator="taylor", front_layers=0, back_layers=0):
            assert not torch.allclose(sample(pipe, steps), found, atol=1e-3)
            assert cache_stats(pipe).plan == letters(run.plan)
        assert torch.equal(sample(pipe, steps), found)
    twin = copy.deepcopy(pipe)
    assert torch.equal(sample(twin, 13), found)
    remove_skip_cache(pipe)
    assert torch.equal(sample(pipe), reference("dit", estimator=None))
