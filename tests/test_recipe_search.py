"""When: the search against all schedules that there are."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipcache.errors import ConfigError
from skipcache.recipes.search import (
    REACH,
    best_plans,
    fewest_refreshes,
    plan_error,
    plan_errors,
)
from skipcache.recipes.statistics import OutputStatistics
from skipcache.recipes.weights import segment_costs

QUICK = settings(deadline=None, max_examples=25, derandomize=True)


def statistics_of(steps: int, seed: int, roughness: float = 0.01) -> OutputStatistics:
    """Of trajectories that are sums of waves, and a little noise."""
    draw = np.random.default_rng(seed)
    times = np.sort(draw.uniform(size=steps) + np.arange(steps))[::-1] / steps
    waves = np.cos(np.outer(times, 1 + 2 * np.arange(5)) + draw.uniform(0, 6, size=5))
    outputs = waves @ draw.normal(size=(5, 60))
    outputs += roughness * draw.normal(size=outputs.shape)
    effects = -np.diff([*times, 0.0]) * draw.uniform(0.5, 2, size=steps)
    gains = draw.uniform(0.5, 2, size=steps)
    return OutputStatistics(tuple(times.tolist()), outputs @ outputs.T / 60, effects, gains, 1.0)


def all_plans(steps: int, refreshes: int) -> list[tuple[bool, ...]]:
    """Those that begin with a refresh and reuse no longer than ``REACH``."""
    plans = [
        tuple(step == 0 or step in others for step in range(steps))
        for others in combinations(range(1, steps), refreshes - 1)
    ]
    return [plan for plan in plans if longest_reuse(plan) <= REACH]


def longest_reuse(plan: tuple[bool, ...]) -> int:
    return max(len(stretch) for stretch in "".join("F" if r else "r" for r in plan).split("F"))


@QUICK
@given(st.integers(2, 10), st.integers(0, 10_000), st.sampled_from([0.0, 0.01, 1.0]))
def test_no_schedule_is_better(steps, seed, roughness):
    """Of all schedules of each number of refreshes, none has a lower predicted error."""
    known = statistics_of(steps, seed, roughness)
    found = best_plans(known, range(1, steps + 1))
    assert sorted(found) == list(range(1, steps + 1))
    for refreshes, plan in found.items():
        assert len(plan) == steps
        assert sum(plan) == refreshes
        assert all(isinstance(entry, bool) for entry in plan)
        lowest = min(plan_errors(known, all_plans(steps, refreshes)))
        assert plan_error(known, plan) == pytest.approx(lowest, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("steps", "refreshes"), [(14, 2), (15, 3), (26, 2), (27, 3), (30, 4)])
def test_no_schedule_is_better_where_reuse_is_as_long_as_can_be(steps, refreshes, seed):
    """Where the longest stretch is a bound, the best schedule within it is found."""
    known = statistics_of(steps, seed)
    (plan,) = best_plans(known, [refreshes]).values()
    assert longest_reuse(plan) <= REACH
    assert sum(plan) == refreshes
    lowest = min(plan_errors(known, all_plans(steps, refreshes)))
    assert plan_error(known, plan) == pytest.approx(lowest, rel=1e-9)


def test_refreshes_go_where_outputs_change():
    """Trajectories that stand still but for a few steps are refreshed there."""
    level = np.array([0.0] * 4 + [1.0, -2.0, 3.0] + [4.0] * 5)
    outputs = np.stack([np.ones(12), level], 1)
    times = tuple(1 - i / 12 for i in range(12))
    known = OutputStatistics(times, outputs @ outputs.T, np.full(12, 1 / 12), np.ones(12), 1.0)
    (plan,) = best_plans(known, [4]).values()
    assert {4, 5} < {step for step, is_refresh in enumerate(plan) if is_refresh}
    assert plan_error(known, plan) < 0.1 * plan_error(known, (True, False, False) * 4)


def test_a_plan_costs_what_its_stretches_cost():
    """The error of a plan is the root of the sum over its stretches, each after the gap that was
    there, the longest gap that is tabled standing for longer ones.
    """
    known = statistics_of(17, 4)
    costs = segment_costs(known, REACH)
    plan = tuple(step in (0, 1, 3, 16) for step in range(17))
    squares = costs[0, 0, 0] + costs[1, 1, 1] + costs[3, 2, 12] + costs[16, REACH, 0]
    assert plan_error(known, plan) == pytest.approx(math.sqrt(squares))
    longest = tuple(step in (0, 13, 16) for step in range(17))
    squares = costs[0, 0, 12] + costs[13, REACH, 2] + costs[16, 3, 0]
    assert plan_error(known, longest) == pytest.approx(math.sqrt(squares))
    assert plan_errors(known, [plan, longest]) == [
        plan_error(known, plan),
        plan_error(known, longest),
    ]


def test_never_reusing_is_without_error():
    """A plan of refreshes alone is predicted to lose nothing, and any other to lose something."""
    known = statistics_of(9, 5)
    assert plan_error(known, (True,) * 9) == 0
    assert plan_error(known, (True,) * 8 + (False,)) > 0


@pytest.mark.parametrize("steps", range(2, 60))
def test_fewest_refreshes(steps):
    """So many refreshes can be spread with no stretch above the longest, and one less cannot."""
    fewest = fewest_refreshes(statistics_of(steps, 0))
    spread = tuple(step % (REACH + 1) == 0 for step in range(steps))
    assert sum(spread) == fewest
    assert longest_reuse(spread) <= REACH
    assert (fewest - 1) * (REACH + 1) < steps


@pytest.mark.parametrize("steps", [2, 13, 14, 40])
def test_both_ends_of_what_can_be(steps):
    """The fewest refreshes and all steps are found; one less and one more are refused by name."""
    known = statistics_of(steps, 6)
    fewest = fewest_refreshes(known)
    found = best_plans(known, [steps, fewest, steps])
    assert found[steps] == (True,) * steps
    assert sum(found[fewest]) == fewest
    for refreshes in (fewest - 1, steps + 1, -1):
        with pytest.raises(ConfigError, match=f"from {fewest} to {steps}"):
            best_plans(known, [steps, refreshes])
    assert best_plans(known, []) == {}


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ((True,) * 15, "16 steps"),
        ((True,) * 17, "16 steps"),
        ((), "16 steps"),
        ((False,) * 16, "begins with a refresh"),
        ((False, *(True,) * 15), "begins with a refresh"),
        ((True, *(False,) * 13, True, True), "more than 12"),
        ((True, True, True, *(False,) * 13), "more than 12"),
    ],
)
def test_plans_that_cannot_be(plan, says):
    """Another length, a first step without a refresh and too long a stretch are refused."""
    with pytest.raises(ConfigError, match=says):
        plan_error(statistics_of(16, 7), plan)


# Where another transformer takes over


def with_stages(steps: int, begins: tuple[int, ...], seed: int) -> OutputStatistics:
    """Of trajectories that another transformer makes from each of those steps on; half of the
    switches are at the time of a step, which is still the earlier transformer's.
    """
    known = statistics_of(steps, seed)
    times = known.times
    switches = tuple(
        times[i - 1] if (i + seed) % 2 else (times[i - 1] + times[i]) / 2 for i in begins
    )
    return replace(known, switches=switches)


def begins_with_refreshes(plan: tuple[bool, ...], begins: tuple[int, ...]) -> bool:
    return all(plan[i] for i in begins)


@QUICK
@given(st.integers(3, 10), st.integers(0, 10_000), st.data())
def test_no_schedule_is_better_where_transformers_take_over(steps, seed, data):
    """Each transformer's first step refreshes, and of all schedules of each number of refreshes of
    which that is so, none has a lower predicted error; all others have an infinite one.
    """
    places = st.sets(st.integers(1, steps - 1), min_size=1, max_size=2)
    begins = tuple(sorted(data.draw(places)))
    known = with_stages(steps, begins, seed)
    fewest = 1 + len(begins)
    assert fewest_refreshes(known) == fewest
    found = best_plans(known, range(fewest, steps + 1))
    assert sorted(found) == list(range(fewest, steps + 1))
    for refreshes, plan in found.items():
        assert sum(plan) == refreshes
        assert begins_with_refreshes(plan, begins)
        plans = all_plans(steps, refreshes)
        errors = plan_errors(known, plans)
        for other, error in zip(plans, errors, strict=True):
            assert math.isfinite(error) == begins_with_refreshes(other, begins)
        assert math.isfinite(min(errors))
        assert plan_error(known, plan) == pytest.approx(min(errors), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("steps", "begins", "fewest"),
    [
        (26, (), 2),
        (26, (13,), 2),
        (26, (12,), 3),  # 12 and 14 steps
        (26, (1,), 3),  # 1 and 25
        (27, (13,), 3),
        (39, (13, 26), 3),
        (39, (1, 2), 5),  # 1, 1 and 37
        (40, (20,), 4),
    ],
)
def test_fewest_refreshes_of_several_transformers(steps, begins, fewest):
    """Each transformer needs as many as its own steps do; so many are found, and one less are
    refused by name.
    """
    known = with_stages(steps, begins, 1)
    assert fewest_refreshes(known) == fewest
    (plan,) = best_plans(known, [fewest]).values()
    assert sum(plan) == fewest
    assert longest_reuse(plan) <= REACH
    assert begins_with_refreshes(plan, begins)
    assert math.isfinite(plan_error(known, plan))
    with pytest.raises(ConfigError, match=f"from {fewest} to {steps}"):
        best_plans(known, [fewest - 1])
