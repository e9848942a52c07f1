"""What a recipe knows and the weights that follow: both against slow walks over actual outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipcache.errors import ConfigError
from skipcache.estimators import extrapolation_weights
from skipcache.recipes import weights as weights_module
from skipcache.recipes.statistics import OutputStatistics
from skipcache.recipes.weights import (
    MEMORY,
    RIDGE,
    expected_error,
    reuse_weights,
    segment_costs,
)

QUICK = settings(deadline=None, max_examples=60, derandomize=True)
ELEMENTS = 24  # of an output

seeds = st.integers(0, 10_000)


def even(steps: int) -> tuple[float, ...]:
    return tuple(1 - i / steps for i in range(steps))


def statistics_of(
    outputs: np.ndarray, times: Sequence[float], effects: object = None, gains: object = None
) -> OutputStatistics:
    """Of outputs [n, ELEMENTS]; effects and gains of 1 unless given."""
    ones = np.ones(len(times))
    return OutputStatistics(
        tuple(times),
        outputs @ outputs.T / outputs.shape[1],
        ones if effects is None else np.array(effects, dtype=float),
        ones if gains is None else np.array(gains, dtype=float),
        power=1.0,
    )


def drawn(steps: int, seed: int) -> tuple[np.ndarray, OutputStatistics]:
    """Outputs without any order, and what is known of them: the hardest case for an identity."""
    draw = np.random.default_rng(seed)
    outputs = draw.normal(size=(steps, ELEMENTS))
    times = np.sort(draw.uniform(size=steps))[::-1]
    effects, gains = draw.normal(size=steps), draw.uniform(0.5, 2, size=steps)
    return outputs, statistics_of(outputs, times.tolist(), effects, gains)


def polynomial(times: Sequence[float], degree: int, seed: int = 0) -> np.ndarray:
    """Outputs [n, ELEMENTS], each element another polynomial of time."""
    draw = np.random.default_rng(seed).normal(size=(degree + 1, ELEMENTS))
    return np.array([[time**power for power in range(degree + 1)] for time in times]) @ draw


# Statistics


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"covariance": np.eye(3)}, "shapes"),
        ({"covariance": np.ones(4)}, "shapes"),
        ({"effects": np.ones(3)}, "shapes"),
        ({"gains": np.ones((4, 1))}, "shapes"),
        ({"times": (1.0, 0.5)}, "of 2 steps"),
        ({"times": (1.0, 0.7, math.nan, 0.2)}, "not finite"),
        ({"covariance": np.full((4, 4), math.inf)}, "not finite"),
        ({"effects": np.array([1, 1, 1, math.nan])}, "not finite"),
        ({"gains": np.array([1, 1, 1, -math.inf])}, "not finite"),
        ({"power": 0.0}, "no power"),
        ({"power": -1.0}, "no power"),
        ({"power": math.nan}, "no power"),
        ({"power": math.inf}, "not finite"),
    ],
)
def test_statistics_that_cannot_be(change, says):
    """Arrays that do not fit the times, values that are not finite, and no power are refused."""
    good = statistics_of(polynomial(even(4), 2), even(4))
    assert good.steps == 4
    with pytest.raises(ConfigError, match=says):
        replace(good, **change)


def test_statistics_of_one_step_cannot_be():
    """A single step has no neighbour to be estimated from."""
    with pytest.raises(ConfigError, match="of 1 steps"):
        statistics_of(np.ones((1, ELEMENTS)), [1.0])


def test_at_its_own_times_nothing_changes():
    """The run that was measured is looked up, and never interpolated: the object is the same."""
    _, known = drawn(7, 0)
    assert known.at(known.times) is known
    assert known.at([time + 1e-9 for time in known.times]) is known
    moved = list(known.times)
    moved[3] += 1e-4
    assert known.at(moved) is not known


@QUICK
@given(seeds, st.sets(st.integers(0, 8), min_size=2))
def test_at_some_of_its_own_times_moments_are_those_measured(seed, picked):
    """Interpolation gives back, bit for bit, what is known at a time itself."""
    _, known = drawn(9, seed)
    rows = sorted(picked)
    found = known.at([known.times[row] for row in rows])
    assert np.array_equal(found.covariance, known.covariance[np.ix_(rows, rows)])
    assert np.array_equal(found.gains, known.gains[rows])


@QUICK
@given(seeds, st.integers(2, 9), st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_interpolation_is_exact_on_cubics(seed, steps, places):
    """Outputs that are polynomials of time, of degree 3 or as few steps allow, are known at all
    times between the first and the last one.
    """
    times = np.sort(np.random.default_rng(seed).uniform(size=steps) + 0.2 * np.arange(steps))[::-1]
    degree = min(3, steps - 1)
    new = sorted((times[-1] + place * (times[0] - times[-1]) for place in places), reverse=True)
    found = statistics_of(polynomial(times, degree, seed), times.tolist()).at(new)
    wanted = polynomial(new, degree, seed)
    np.testing.assert_allclose(found.covariance, wanted @ wanted.T / ELEMENTS, atol=1e-8)


def test_interpolation_is_not_exact_on_quartics():
    """It is cubic and no more, so that the test above can fail."""
    times, new = even(9), even(13)
    found = statistics_of(polynomial(times, 4), times).at(new)
    wanted = polynomial(new, 4)
    assert np.abs(found.covariance - wanted @ wanted.T / ELEMENTS).max() > 1e-6


def test_interpolation_looks_at_the_two_steps_on_either_side():
    """Between two steps, no others than these and their neighbours matter."""
    _, known = drawn(9, 3)
    new = [(known.times[4] + known.times[5]) / 2, known.times[8]]
    near, far = known.covariance.copy(), known.covariance.copy()
    for moments, rows in ((near, [3, 4, 5, 6]), (far, [0, 1, 2, 7])):
        moments[rows] *= 2
        moments[:, rows] *= 2
    wanted = known.at(new).covariance
    np.testing.assert_allclose(replace(known, covariance=far).at(new).covariance, wanted)
    doubled = replace(known, covariance=near).at(new).covariance
    np.testing.assert_allclose(doubled[0], wanted[0] * (4, 2))


def test_beyond_either_end_the_nearest_step_counts():
    """A run that begins earlier or ends later is not extrapolated into."""
    _, known = drawn(6, 1)
    found = known.at([known.times[0] + 0.5, known.times[-1] - 0.001])
    ends = np.ix_([0, 5], [0, 5])
    assert np.array_equal(found.covariance, known.covariance[ends])
    assert np.array_equal(found.gains, known.gains[[0, 5]])


def test_steps_at_the_same_time():
    """A sampler that looks twice at a time (Heun) is interpolated as if it looked once."""
    times = (1.0, 0.8, 0.8, 0.6, 0.6, 0.3, 0.3, 0.1)
    new = (0.9, 0.8, 0.7, 0.2)
    found = statistics_of(polynomial(times, 3), times).at(new)
    wanted = polynomial(new, 3)
    np.testing.assert_allclose(found.covariance, wanted @ wanted.T / ELEMENTS, atol=1e-9)


@pytest.mark.parametrize("steps", [5, 10, 17, 40])
def test_effects_are_in_proportion_to_the_time_that_a_step_spans(steps):
    """With twice the steps each one counts half, and all together as much as before."""
    times = even(10)
    known = statistics_of(polynomial(times, 2), times, effects=[-0.3] * 10)
    found = known.at(even(steps))
    np.testing.assert_allclose(found.effects, -3.0 / steps)
    uneven = known.at((1.0, 0.7, 0.6, 0.1))
    np.testing.assert_allclose(uneven.effects, [-0.9, -0.3, -1.5, -0.3])


# Weights


def missed_by(
    outputs: np.ndarray, known: OutputStatistics, plan: Sequence[bool], history: int
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Literally: each reuse step fits the last outputs, element by element, to its own true output
    less what is owed per unit of effect; returns the weights, and what is owed in the end.
    """
    owed = np.zeros(ELEMENTS)
    found = {}
    for step, is_refresh in enumerate(plan):
        if step:
            owed = owed * math.exp(-(known.times[step - 1] - known.times[step]) / MEMORY)
        if is_refresh:
            continue
        seen = [i for i in range(step) if plan[i]][-history:]
        target = outputs[step] - owed / known.effects[step]
        sizes = np.sqrt((outputs[seen] ** 2).sum(1))
        rows = np.concatenate([outputs[seen].T, np.diag(math.sqrt(RIDGE) * sizes)])
        found[step] = np.linalg.lstsq(rows, np.append(target, 0 * sizes), rcond=None)[0]
        owed = owed + known.effects[step] * (found[step] @ outputs[seen] - outputs[step])
    return found, owed


@QUICK
@given(seeds, st.lists(st.booleans(), min_size=1, max_size=9), st.integers(1, 4))
def test_weights_follow_the_slow_reference(seed, rest, history):
    """Weights from second moments alone are those of a fit to the outputs themselves."""
    plan = (True, *rest)
    outputs, known = drawn(len(plan), seed)
    wanted, _ = missed_by(outputs, known, plan, history)
    found = reuse_weights(known, plan, history)
    assert found.keys() == wanted.keys()
    for step, weights in wanted.items():
        seen = [i for i in range(step) if plan[i]][-history:]
        assert found[step].refresh_steps == tuple(seen)
        np.testing.assert_allclose(found[step].weights, weights, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seen", [1, 2, 3, 4])
def test_outputs_that_are_polynomials_are_reproduced(seen, monkeypatch):
    """With so many refreshes to look at and no noise to expect, a polynomial of that many
    coefficients is extrapolated by Lagrange's weights, in time and not in steps.
    """
    monkeypatch.setattr(weights_module, "RIDGE", 1e-13)
    times = (1.0, 0.95, 0.8, 0.6, 0.35, 0.1)
    plan = tuple(step < seen for step in range(6))
    outputs = polynomial(times, seen - 1)
    found = reuse_weights(statistics_of(outputs, times), plan)
    assert len(found) == 6 - seen
    for step, reuse in found.items():
        lagrange = extrapolation_weights([times[i] for i in range(seen)], times[step])
        np.testing.assert_allclose(reuse.weights, lagrange, rtol=1e-2)
        estimate = np.array(reuse.weights) @ outputs[list(reuse.refresh_steps)]
        np.testing.assert_allclose(estimate, outputs[step], atol=1e-3)


PAYING = (True, True, False, True, False)  # the last step sees a refresh that the third did not


def owed_in_the_end(outputs: np.ndarray, known: OutputStatistics, is_aware: bool) -> float:
    """What ``PAYING`` owes in the end, where its last step knows what the third owes or not."""
    found = reuse_weights(known, PAYING)
    third = np.array(found[2].weights) @ outputs[:2] - outputs[2]
    if not is_aware:
        found = reuse_weights(replace(known, effects=known.effects * (1, 1, 0, 1, 1)), PAYING)
    last = np.array(found[4].weights) @ outputs[[0, 1, 3]] - outputs[4]
    forgotten = math.exp((known.times[4] - known.times[2]) / MEMORY)
    return float(np.linalg.norm(known.effects[2] * third * forgotten + known.effects[4] * last))


@QUICK
@given(seeds)
def test_what_is_owed_grows_less(seed):
    """A reuse step that knows what is owed leaves no more of it than one that does not, whatever
    the outputs are.
    """
    outputs, known = drawn(5, seed)
    aware, unaware = (owed_in_the_end(outputs, known, is_aware) for is_aware in (True, False))
    assert aware <= unaware * (1 + 1e-3)


def test_what_is_owed_is_paid_back(monkeypatch):
    """All of it, where the refreshes seen since can make it up: parabolas, of which two refreshes
    say too little and three say all.
    """
    monkeypatch.setattr(weights_module, "RIDGE", 1e-13)
    outputs = polynomial(even(5), 2)
    known = statistics_of(outputs, even(5), effects=[-0.2, -0.2, -0.2, -0.2, -0.1])
    unaware = owed_in_the_end(outputs, known, is_aware=False)
    assert unaware > 1e-3
    assert owed_in_the_end(outputs, known, is_aware=True) < 1e-3 * unaware


def test_a_step_without_effect_pays_nothing_back():
    """Where a step does not count, its weights are those of its own output alone."""
    _, known = drawn(5, 2)
    silent, debtless, usual = (
        reuse_weights(replace(known, effects=np.array(effects, dtype=float)), PAYING)[4].weights
        for effects in ([1, 1, 1, 1, 0], [1, 1, 0, 1, 1], [1, 1, 1, 1, 1])
    )
    np.testing.assert_allclose(silent, debtless)
    assert not np.allclose(usual, debtless, rtol=1e-2)


# What stretches cost


def stretch_cost(
    outputs: np.ndarray, known: OutputStatistics, r: int, gap: int, length: int, begin: int = 0
) -> float:
    """Literally: three refreshes ``gap`` apart, the last of them at ``r`` and again where there is
    none since ``begin``, and ``length`` reuse steps whose misses add up.
    """
    seen = [i if gap and i >= begin else r for i in (r, r - gap, r - 2 * gap)]
    sizes = np.sqrt((outputs[seen] ** 2).sum(1))
    rows = np.concatenate([outputs[seen].T, np.diag(math.sqrt(RIDGE) * sizes)])
    owed = np.zeros(ELEMENTS)
    for step in range(r + 1, r + length + 1):
        target = outputs[step] - owed / known.effects[step]
        weights = np.linalg.lstsq(rows, np.append(target, 0 * sizes), rcond=None)[0]
        owed = owed + known.effects[step] * (weights @ outputs[seen] - outputs[step])
    gain = known.gains[min(r + length + 1, known.steps - 1)]
    return float((owed**2).mean() * gain**2 / known.power)


@settings(QUICK, max_examples=25)
@given(seeds, st.integers(2, 9), st.data())
def test_segment_costs_follow_the_slow_reference(seed, steps, data):
    """Every stretch that fits into the run costs what walking it costs, and no other is offered."""
    outputs, known = drawn(steps, seed)
    known = replace(known, power=2.5)
    reach = data.draw(st.integers(1, steps - 1))
    costs = segment_costs(known, reach)
    assert costs.shape == (steps, reach + 1, reach + 1)
    for r, gap, length in np.ndindex(costs.shape):
        is_there = (gap == 0) == (r == 0) and gap <= r
        if is_there and r + length < steps:
            wanted = stretch_cost(outputs, known, r, gap, length)
            np.testing.assert_allclose(costs[r, gap, length], wanted, rtol=1e-5, atol=1e-9)
        else:
            assert math.isinf(costs[r, gap, length])


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_no_stretch_costs_less_than_nothing(degree):
    """Not by rounding either, where some effects are large and outputs are known in full: the error
    of a plan would not be a number.
    """
    for seed in range(40):
        draw = np.random.default_rng(seed)
        effects = draw.normal(size=9) * 10.0 ** draw.integers(-3, 4)
        known = statistics_of(polynomial(even(9), degree, seed), even(9), effects).at(even(28))
        assert (segment_costs(known, 12) >= 0).all()


# Where another transformer takes over


@pytest.mark.parametrize(
    ("switches", "begins"),
    [
        ((), [0]),
        ((0.75,), [0, 4]),  # the step at 0.75 is still the earlier one's
        ((0.74,), [0, 4]),
        ((0.76,), [0, 3]),
        ((0.76, 0.74), [0, 3, 4]),
        ((0.74, 0.76), [0, 3, 4]),
        ((0.76, 0.76), [0, 3]),
        ((1.5,), [0]),  # before the run began
        ((0.0,), [0]),  # never
        ((1.0,), [0, 1]),
    ],
)
def test_stages(switches, begins):
    """Every step knows where its transformer's first step is and where its last one was."""
    times = (1.0, 0.9, 0.8, 0.75, 0.7, 0.5, 0.2, 0.1)
    known = replace(statistics_of(polynomial(times, 2), times), switches=switches)
    ends = [*begins[1:], 8]
    wanted = [stage for stage in zip(begins, ends, strict=True) for _ in range(stage[1] - stage[0])]
    assert known.stages == wanted


@pytest.mark.parametrize("steps", [4, 10, 23])
def test_another_run_switches_at_the_same_times(steps):
    """At other steps, transformers take over at the first step below the same times, and what a
    miss is usual to be is interpolated.
    """
    misses = np.stack([np.linspace(1, 2, 9), np.linspace(5, 3, 9)])
    known = replace(drawn(9, 0)[1], times=even(9), switches=(0.6, 0.31), misses=misses)
    found = known.at(even(steps))
    assert found.switches == (0.6, 0.31)
    firsts = [next(i for i, time in enumerate(even(steps)) if time < at) for at in (0.6, 0.31)]
    assert sorted({begin for begin, _ in found.stages}) == [0, *firsts]
    assert found.misses.shape == (2, steps)
    for row, wanted in zip(found.misses, misses, strict=True):
        np.testing.assert_allclose(row, np.interp(even(steps), even(9)[::-1], wanted[::-1]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"switches": (0.5, math.nan)}, "not finite"),
        ({"switches": (math.inf,)}, "not finite"),
        ({"misses": np.ones((1, 4))}, "shapes"),
        ({"misses": np.ones(4)}, "shapes"),
        ({"misses": np.ones((2, 5))}, "shapes"),
        ({"misses": np.array([[1, 1, 1, 1], [1, math.nan, 1, 1]])}, "not finite"),
    ],
)
def test_switches_and_misses_that_cannot_be(change, says):
    """They are refused as the rest is, and misses are as told unless measured."""
    good = statistics_of(polynomial(even(4), 2), even(4))
    assert np.array_equal(good.misses, np.ones((2, 4)))
    with pytest.raises(ConfigError, match=says):
        replace(good, **change)


def begins_of(known: OutputStatistics) -> list[int]:
    """Literally: of each step, the first one that as many switches lie above."""
    above = [sum(time < switch for switch in known.switches) for time in known.times]
    return [above.index(count) for count in above]


@QUICK
@given(seeds, st.integers(2, 11), st.data())
def test_no_weights_of_another_transformers_outputs(seed, steps, data):
    """A reuse step looks at refreshes of its own transformer only, and weighs them as a fit to the
    outputs themselves does that owes what the other one left.
    """
    outputs, known = drawn(steps, seed)
    at = data.draw(st.lists(st.sampled_from(known.times), min_size=1, max_size=2))
    known = replace(known, switches=tuple(at))
    begins = begins_of(known)
    drawn_plan = data.draw(st.lists(st.booleans(), min_size=steps, max_size=steps))
    plan = [refreshes or step == begins[step] for step, refreshes in enumerate(drawn_plan)]
    found, owed = reuse_weights(known, plan), np.zeros(ELEMENTS)
    assert sorted(found) == [step for step in range(steps) if not plan[step]]
    for step in range(steps):
        if step:
            owed = owed * math.exp(-(known.times[step - 1] - known.times[step]) / MEMORY)
        if plan[step]:
            continue
        seen = [i for i in range(begins[step], step) if plan[i]][-4:]
        assert found[step].refresh_steps == tuple(seen)
        target = outputs[step] - owed / known.effects[step]
        sizes = np.sqrt((outputs[seen] ** 2).sum(1))
        rows = np.concatenate([outputs[seen].T, np.diag(math.sqrt(RIDGE) * sizes)])
        wanted = np.linalg.lstsq(rows, np.append(target, 0 * sizes), rcond=None)[0]
        np.testing.assert_allclose(found[step].weights, wanted, rtol=1e-6, atol=1e-8)
        owed = owed + known.effects[step] * (wanted @ outputs[seen] - outputs[step])


@settings(QUICK, max_examples=25)
@given(seeds, st.integers(3, 9), st.data())
def test_segment_costs_across_a_switch(seed, steps, data):
    """A stretch ends where another transformer takes over, and what that one has cached begins
    anew: a refresh of the one before counts as one more look at the last.
    """
    outputs, known = drawn(steps, seed)
    known = replace(known, switches=(data.draw(st.sampled_from(known.times[:-1])),))
    begins = begins_of(known)
    costs = segment_costs(known, steps - 1)
    for r, gap, length in np.ndindex(costs.shape):
        is_there = (gap == 0) == (r == 0) and gap <= r and r + length < steps
        if is_there and begins[r + length] == begins[r]:
            wanted = stretch_cost(outputs, known, r, gap, length, begins[r])
            np.testing.assert_allclose(costs[r, gap, length], wanted, rtol=1e-5, atol=1e-9)
        else:
            assert math.isinf(costs[r, gap, length])


# What is told of an estimate


@QUICK
@given(seeds, st.integers(3, 9), st.data())
def test_expected_errors_follow_the_slow_reference(seed, steps, data):
    """The relative error of a fit of a step's output by those seen, element by element."""
    outputs, known = drawn(steps, seed)
    step = data.draw(st.integers(1, steps - 1))
    seen = sorted(data.draw(st.sets(st.integers(0, step - 1), min_size=1, max_size=4)))
    sizes = np.sqrt((outputs[seen] ** 2).sum(1))
    rows = np.concatenate([outputs[seen].T, np.diag(math.sqrt(RIDGE) * sizes)])
    weights = np.linalg.lstsq(rows, np.append(outputs[step], 0 * sizes), rcond=None)[0]
    away = weights @ outputs[seen] - outputs[step]
    wanted = np.linalg.norm(away) / np.linalg.norm(outputs[step])
    assert expected_error(known, seen, step) == pytest.approx(wanted, rel=1e-6)
    assert expected_error(replace(known, power=7.0), tuple(seen), step) == pytest.approx(wanted)


def test_of_nothing_nothing_is_expected_to_be_missed():
    """Outputs of zeros are told without an error, from zeros and from others."""
    outputs = polynomial(even(5), 2)
    outputs[3] = 0.0
    assert expected_error(statistics_of(outputs, even(5)), (0, 1), 3) == 0.0
    assert expected_error(statistics_of(outputs, even(5)), (0, 3), 4) > 0.0
    assert expected_error(statistics_of(0 * outputs, even(5)), (0, 1), 2) == 0.0


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_what_is_known_in_full_is_expected_exactly(degree):
    """A polynomial by as many outputs as it has coefficients: nothing but the ridge is missed, and
    never the root of something below zero.
    """
    for seed in range(20):
        known = statistics_of(polynomial(even(6), degree, seed), even(6))
        error = expected_error(known, range(degree + 1), degree + 1)
        assert 0.0 <= error < 0.05
