"""A speedup for models without a recipe."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import build, reference, sample
from skipcache import Progress, apply_skip_cache, cache_stats, skip_cache
from skipcache.errors import ConfigError
from skipcache.recipes.generic import BentSchedule, generic_config
from skipcache.recipes.plan import steps_of

QUICK = settings(deadline=None, max_examples=100, derandomize=True)
NAN = float("nan")


def even(steps: int) -> tuple[float, ...]:
    return tuple(1 - i / steps for i in range(steps))


def letters(plan: tuple[bool, ...]) -> str:
    return "".join("F" if is_refresh else "r" for is_refresh in plan)


def walk(schedule: BentSchedule, times: tuple[float, ...]) -> tuple[bool, ...]:
    """One question a step, as where the run's length is not known."""
    plan: list[bool] = []
    for index in range(len(times)):
        since = None if not any(plan) else plan[::-1].index(True) + 1
        plan.append(schedule.is_refresh(Progress(times[: index + 1], since)))
    return tuple(plan)


@QUICK
@given(st.integers(1, 120), st.floats(1, 4), st.floats(1, 3))
def test_bent_plans(steps, speedup, bend):
    """A plan is as long as the run, begins with a refresh, and has one in ``speedup`` of them but
    at least two, with stretches that never get shorter by more than what rounding makes.
    """
    plan = BentSchedule(speedup, bend).plan(even(steps))
    assert len(plan) == steps
    assert plan[0]
    assert sum(plan) == max(min(2, steps), math.floor(steps / speedup + 1e-9))
    spacings = np.diff([*steps_of(plan)])
    assert all(later >= earlier - 1 for earlier, later in itertools.pairwise(spacings))


@pytest.mark.parametrize(
    ("steps", "speedup", "bend", "plan"),
    [
        (10, 2.0, 1.0, "FrFrFrFrFr"),
        (12, 3.0, 1.0, "FrrFrrFrrFrr"),
        (12, 3.0, 2.0, "FFrFrrrFrrrr"),  # 12 (j / 4)^2: 0, 0.75, 3, 6.75
        (16, 4.0, 1.3, "FrrFrrFrrrrFrrrr"),  # 16 (j / 4)^1.3: 0, 2.6, 6.5, 11.01
        (3, 1.0, 1.3, "FFF"),
        (7, 4.0, 1.6, "FrFrrrr"),  # 7 / 4 is one, and a line takes two: 0, 2.3
        (2, 4.0, 1.3, "FF"),
        (1, 4.0, 1.3, "F"),
        (0, 4.0, 1.3, ""),
    ],
)
def test_bent_plans_that_were_worked_out_by_hand(steps, speedup, bend, plan):
    """Refreshes at the steps n (j / m) ^ bend, rounded."""
    assert letters(BentSchedule(speedup, bend).plan(even(steps))) == plan


def test_bent_stretches_grow():
    """Above a bend of 1 the last stretches are longer than the first ones."""
    steps = steps_of(generic_config(3.0).schedule.plan(even(60)))
    spacings = np.diff([*steps, 60])
    assert spacings[0] <= 2
    assert spacings[-1] >= 4


def test_bent_runs_of_unknown_length():
    """Asked step by step, it refreshes every so many steps, rounded up."""
    assert letters(walk(BentSchedule(2.0), (NAN,) * 6)) == "FrFrFr"
    assert letters(walk(BentSchedule(2.5), (NAN,) * 7)) == "FrrFrrF"
    assert letters(walk(BentSchedule(1.0), (NAN,) * 3)) == "FFF"


@pytest.mark.parametrize("speedup", [0.99, 0, -2, 4.01, math.inf, NAN, True, "2", None, 2j])
def test_speedups_without_a_recipe_that_cannot_be(speedup):
    """What is no factor from 1 to 4 is refused by name, with a way to go further."""
    with pytest.raises(ConfigError, match="from 1 to 4; calibrate one") as caught:
        generic_config(speedup)
    assert f"speedup is {speedup!r}" in str(caught.value)


def test_a_speedup_without_a_recipe():
    """``speedup`` alone runs the bent plan on the transformer's output, extrapolated in a line; 1
    changes no bit, and what cannot be leaves the pipeline as it was.
    """
    pipe = apply_skip_cache(build("dit"), speedup=3)
    found = sample(pipe, 12)
    assert cache_stats(pipe).plan == letters(BentSchedule(3.0).plan(even(12)))
    assert cache_stats(pipe).preset == "line/3x"
    assert cache_stats(pipe).layers_run == cache_stats(pipe).layers_total // 3
    same = {"schedule": BentSchedule(3.0), "estimator": "taylor"}
    with skip_cache(pipe, front_layers=0, back_layers=0, **same):
        assert torch.equal(sample(pipe, 12), found)
    with pytest.raises(ConfigError):
        apply_skip_cache(pipe, speedup=5)
    assert torch.equal(sample(pipe, 12), found)
    apply_skip_cache(pipe, speedup=1)
    assert torch.equal(sample(pipe), reference("dit", estimator=None))
