"""When: every schedule against a slow, literal walk of what its docstring says."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipcache import IntervalSchedule, MaskSchedule, ProbeSchedule, Progress, Schedule
from skipcache.errors import ConfigError

NAN = float("nan")
QUICK = settings(deadline=None, max_examples=100, derandomize=True)

unit_times = st.floats(0.0, 1.0)
any_times = st.lists(unit_times, min_size=1, max_size=40)
falling_times = any_times.map(lambda times: sorted(times, reverse=True))
windows = (
    st.tuples(unit_times, unit_times)
    .filter(lambda pair: pair[0] != pair[1])
    .map(lambda pair: (max(pair), min(pair)))
)
masks = st.sets(st.integers(0, 30), min_size=1, max_size=8)
intervals = st.integers(1, 7)


def walk(schedule: Schedule, times: list[float]) -> tuple[bool, ...]:
    """The run, one question a step, the way a sampler of unknown length has to ask."""
    plan: list[bool] = []
    last_refresh: int | None = None
    for index in range(len(times)):
        since = None if last_refresh is None else index - last_refresh
        plan.append(schedule.is_refresh(Progress(times[: index + 1], since)))
        if plan[-1]:
            last_refresh = index
    return tuple(plan)


def literal_interval(
    times: list[float], interval: int, start: float, stop: float
) -> tuple[bool, ...]:
    """The words of IntervalSchedule's docstring, one by one."""
    plan = []
    is_anything_cached = False
    is_stop_reached = False
    for step_index, t in enumerate(times):
        refresh = False
        if step_index % interval == 0:
            refresh = True
        if not is_anything_cached:
            refresh = True
        if t >= start:
            refresh = True
        if is_stop_reached:
            refresh = True
        if t <= stop:
            is_stop_reached = True
        is_anything_cached = True
        plan.append(refresh)
    return tuple(plan)


def literal_mask(length: int, named: set[int], steps: int | None) -> tuple[bool, ...]:
    """The words of MaskSchedule's docstring: by index, and never served from the cache to
    the end.
    """
    ran = sorted(named | {0})
    longest_reuse = max((late - early - 1 for early, late in pairwise(ran)), default=0)
    plan: list[bool] = []
    for index in range(length):
        refresh = index in named or index == 0
        if steps is not None:
            refresh = refresh or index >= steps
        elif index > max(ran):
            refresh = refresh or index > max(ran) + longest_reuse
        plan.append(refresh)
    return tuple(plan)


def longest_reuse(plan: tuple[bool, ...]) -> int:
    return max(len(stretch) for stretch in "".join("F" if r else "r" for r in plan).split("F"))


@QUICK
@given(any_times, intervals, windows)
def test_interval_follows_the_reference_semantics(times, interval, window):
    """An interval schedule refreshes exactly where a literal reading of its docstring does."""
    schedule = IntervalSchedule(interval, *window)
    assert schedule.plan(times) == literal_interval(times, interval, *window)


@pytest.mark.parametrize(
    ("interval", "start", "stop", "expected"),
    [
        (1, 1.0, 0.0, "FFFFFFFFFFF"),
        (2, 1.0, 0.0, "FrFrFrFrFrF"),
        (3, 1.0, 0.0, "FrrFrrFrrFr"),
        (2, 0.8, 0.0, "FFFrFrFrFrF"),
        (3, 0.8, 0.0, "FFFFrrFrrFr"),
        # the step that reaches stop (index 8 at 0.2, index 7 at 0.3) still follows the interval
        (3, 1.0, 0.2, "FrrFrrFrrFF"),
        (4, 0.9, 0.3, "FFrrFrrrFFF"),
    ],
)
def test_interval_plans_that_were_worked_out_by_hand(interval, start, stop, expected):
    """The interval schedule gives the plans that were derived by hand from the reference code."""
    times = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    plan = IntervalSchedule(interval, start, stop).plan(times)
    assert "".join("F" if refresh else "r" for refresh in plan) == expected


def test_interval_without_window_reuses_at_unknown_times():
    """With the widest window, times do not matter and unknown ones do not hinder reuse."""
    schedule = IntervalSchedule(3)
    assert not schedule.needs_times
    assert walk(schedule, [NAN] * 7) == (True, False, False, True, False, False, True)


@pytest.mark.parametrize("window", [(0.9, 0.0), (1.0, 0.1), (0.9, 0.1)])
def test_interval_with_window_never_reuses_on_a_guess(window):
    """Where a window matters, a step of unknown time refreshes."""
    schedule = IntervalSchedule(3, *window)
    assert schedule.needs_times
    assert all(walk(schedule, [NAN] * 7))
    assert walk(schedule, [0.8, 0.7, NAN, 0.5, 0.4]) == (True, False, True, True, False)


@QUICK
@given(
    any_times,
    st.one_of(
        st.builds(lambda n, w: IntervalSchedule(n, *w), intervals, windows),
        st.builds(IntervalSchedule, intervals),
        st.builds(lambda mask: MaskSchedule(tuple(mask)), masks),
        st.builds(lambda mask, more: MaskSchedule(tuple(mask), max(mask) + more), masks, intervals),
        st.builds(MaskSchedule.at_times, st.sets(unit_times, min_size=1, max_size=6)),
    ),
)
def test_plan_is_the_step_by_step_walk(times, schedule):
    """Planning a run ahead gives the same answer, step by step, as asking at every step."""
    plan = schedule.plan(times)
    assert plan == walk(schedule, times)
    assert all(isinstance(refresh, bool) for refresh in plan)
    assert plan[0]


@QUICK
@given(any_times, st.integers(1, 39))
def test_schedules_are_causal(times, cut):
    """What a plan says of a step does not depend on the steps after it."""
    schedules = (
        IntervalSchedule(3, 0.9, 0.2),
        MaskSchedule((0, 2, 7)),
        MaskSchedule.at_times((0.7, 0.3)),
    )
    for schedule in schedules:
        assert schedule.plan(times[:cut]) == schedule.plan(times)[:cut]


@pytest.mark.parametrize(
    "schedule",
    [
        IntervalSchedule(5),
        IntervalSchedule(5, 0.9, 0.1),
        MaskSchedule((9,)),
        MaskSchedule.at_times((0.1,)),
        ProbeSchedule(threshold=5.0),
    ],
)
@pytest.mark.parametrize("times", [[0.5], [0.7, 0.6, 0.5], [NAN, NAN]])
def test_nothing_cached_refreshes(schedule, times):
    """Every schedule refreshes where nothing is cached, at whatever step and time."""
    assert schedule.is_refresh(Progress(times, since_refresh=None))


@QUICK
@given(st.integers(1, 60), masks, st.one_of(st.none(), st.integers(1, 9)))
def test_mask_follows_its_docstring(length, named, more):
    """A mask by index refreshes exactly where a literal reading of its docstring does."""
    steps = None if more is None else max(named) + more
    plan = MaskSchedule(tuple(named), steps).plan([0.5] * length)
    assert plan == literal_mask(length, named, steps)


@QUICK
@given(masks)
def test_mask_shorter_than_the_run_does_not_serve_the_rest_from_the_cache(named):
    """A run longer than its mask ends in refreshes, with no stretch of reuse longer than the mask's
    own.
    """
    plan = MaskSchedule(tuple(named)).plan([0.5] * 200)
    assert all(plan[2 * max(named) + 1 :])
    assert longest_reuse(plan) <= longest_reuse(plan[: max(named) + 1])


def test_mask_with_steps_refreshes_past_that_length():
    """A mask that names its run length reuses up to it, and not one step further."""
    schedule = MaskSchedule((0, 2), steps=5)
    assert schedule.plan([0.5] * 8) == (True, False, True, False, False, True, True, True)
    assert schedule.steps == 5


def test_mask_order_does_not_matter_and_times_do_not_either():
    """Two masks of the same steps are equal, and a mask by index ignores times."""
    assert MaskSchedule((4, 0, 2)) == MaskSchedule((0, 2, 4))
    assert not MaskSchedule((0, 2)).needs_times
    assert MaskSchedule((0, 2)).plan([NAN] * 4) == MaskSchedule((0, 2)).plan([1.0, 0.7, 0.3, 0.1])


@pytest.mark.parametrize("steps", [8, 20, 50, 137])
def test_at_times_survives_another_step_count(steps):
    """A mask by time refreshes once per named time, at the first step at or below it, for any step
    count.
    """
    named = (0.9, 0.55, 0.3)
    times = [1.0 - index / steps for index in range(steps)]
    schedule = MaskSchedule.at_times(named)
    expected = {0} | {next(i for i, t in enumerate(times) if t <= time) for time in named}
    assert {i for i, refresh in enumerate(schedule.plan(times)) if refresh} == expected
    assert len(expected) == 4
    assert schedule.needs_times


def test_at_times_refreshes_where_time_is_unknown():
    """A mask by time never reuses at a step whose time, or whose predecessor's, is unknown."""
    schedule = MaskSchedule.at_times((0.1,))
    assert walk(schedule, [0.9, 0.8, NAN, 0.6, 0.5]) == (True, False, True, True, False)


@QUICK
@given(falling_times, st.sets(unit_times, min_size=1, max_size=6))
def test_at_times_literally(times, named):
    """On a falling run, a mask by time refreshes at the first step and at each first one reaching a
    time.
    """
    refreshed = {0}
    for time in named:
        reached = [index for index, t in enumerate(times) if t <= time]
        refreshed.update(reached[:1])
    plan = MaskSchedule.at_times(named).plan(times)
    assert {i for i, refresh in enumerate(plan) if refresh} == refreshed


@pytest.mark.parametrize(
    ("change", "expected"),
    [(0.0, False), (0.0999, False), (0.1, True), (3.0, True), (math.inf, True), (NAN, True)],
)
def test_probe_refreshes_once_the_change_reaches_the_threshold(change, expected):
    """A probe schedule refreshes at and above its threshold, and where the change is no number."""
    schedule = ProbeSchedule(threshold=0.1)
    assert schedule.needs_probe
    assert schedule.is_refresh(Progress([0.8, 0.7], 1, change)) is expected


def test_probe_threshold_zero_refreshes_always():
    """A threshold of 0 means that nothing is reused, even where nothing has changed."""
    assert ProbeSchedule(threshold=0).is_refresh(Progress([0.8, 0.7], 1, 0.0))


@pytest.mark.parametrize("longest", [1, 3])
def test_probe_limits_consecutive_reuse(longest):
    """No more than max_consecutive steps in a row are reused, however small the change."""
    schedule = ProbeSchedule(threshold=1.0, max_consecutive=longest)
    plan = walk(schedule, [0.5] * 12)
    assert plan == tuple(index % (longest + 1) == 0 for index in range(12))


def test_probe_respects_its_window():
    """Outside its window a probe schedule refreshes, and where the window matters an unknown time
    does too.
    """
    schedule = ProbeSchedule(threshold=1.0, max_consecutive=9, start=0.8, stop=0.3)
    assert schedule.needs_times
    plan = walk(schedule, [0.9, 0.8, 0.7, 0.6, NAN, 0.3, 0.2])
    assert plan == (True, True, False, False, True, False, True)
    assert not ProbeSchedule().needs_times


def test_probe_cannot_plan_ahead():
    """Only the run tells an adaptive schedule what to do, so it has no plan."""
    assert ProbeSchedule().plan([1.0, 0.5]) is None


@pytest.mark.parametrize(
    "schedule",
    [IntervalSchedule(), MaskSchedule((0,)), MaskSchedule.at_times((0.5,)), ProbeSchedule()],
)
def test_schedules_are_immutable_descriptions(schedule):
    """Schedules satisfy the protocol, are hashable, and cannot be changed after validation."""
    assert isinstance(schedule, Schedule)
    assert hash(schedule) == hash(type(schedule)(**vars(schedule)))
    with pytest.raises(AttributeError):
        schedule.start = 0.5


BAD = [
    *(
        (lambda v=v: IntervalSchedule(v), repr(v), "at least 1")
        for v in (0, -1, 1.5, True, "2", None)
    ),
    *(
        (lambda v=v: IntervalSchedule(2, v, 0.0), f"start is {v!r}", "from 0 (clean) to 1")
        for v in (700, 1.5, -0.1, NAN, math.inf, True, "0.9", None)
    ),
    *(
        (lambda v=v: IntervalSchedule(2, 1.0, v), f"stop is {v!r}", "from 0 (clean) to 1")
        for v in (50, -0.1, NAN, False, None)
    ),
    (lambda: IntervalSchedule(2, 0.1, 0.9), "start=0.1, stop=0.9", "greater than stop"),
    (lambda: IntervalSchedule(2, 0.5, 0.5), "start=0.5, stop=0.5", "greater than stop"),
    (lambda: ProbeSchedule(start=0.1, stop=0.9), "start=0.1, stop=0.9", "greater than stop"),
    (lambda: ProbeSchedule(start=700), "start is 700", "from 0 (clean) to 1"),
    *(
        (lambda v=v: ProbeSchedule(threshold=v), f"threshold is {v!r}", "a number from 0")
        for v in (-0.1, NAN, math.inf, True, "0.1", None)
    ),
    *(
        (lambda v=v: ProbeSchedule(max_consecutive=v), f"max_consecutive is {v!r}", "at least 1")
        for v in (0, -1, 1.5, True, None)
    ),
    (lambda: MaskSchedule(), "refresh_steps=()", "at least one refresh step"),
    (lambda: MaskSchedule(()), "refresh_steps=()", "at least one refresh step"),
    (lambda: MaskSchedule.at_times(()), "refresh_times=()", "at least one time"),
    (lambda: MaskSchedule((0,), refresh_times=(0.5,)), "refresh_times=(0.5,)", "not both"),
    *(
        (lambda v=v: MaskSchedule((0, v)), f"refresh step {v!r}", "a whole number from 0")
        for v in (-1, 1.5, 2.0, True, NAN, "3", None)
    ),
    *(
        (lambda v=v: MaskSchedule.at_times((0.9, v)), f"refresh time {v!r}", "from 0 (clean) to 1")
        for v in (NAN, 700, -0.1, math.inf, True, "0.5", None)
    ),
    (lambda: MaskSchedule((0, 3, 3)), "(0, 3, 3)", "named twice"),
    (lambda: MaskSchedule.at_times((0.5, 0.5)), "(0.5, 0.5)", "named twice"),
    (lambda: MaskSchedule((0, 5), steps=5), "steps=5", "from 0 to steps - 1"),
    (lambda: MaskSchedule((0,), steps=0), "steps=0", "from 0 to steps - 1"),
    *(
        (lambda v=v: MaskSchedule((0, 1), steps=v), f"steps={v!r}", "from 0 to steps - 1")
        for v in (7.5, True, "7")
    ),
    # a lone number in place of a tuple
    (lambda: MaskSchedule(3), "3", "Pass a list"),
    (lambda: MaskSchedule.at_times(0.5), "0.5", "Pass a list"),
]


@pytest.mark.parametrize(("build", "asked", "allowed"), BAD)
def test_bad_input_is_refused(build, asked, allowed):
    """A schedule that cannot be raises ConfigError, saying what was asked and what is allowed."""
    with pytest.raises(ConfigError) as caught:
        build()
    assert asked in str(caught.value)
    assert allowed in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("module", ["skipcache.schedules", "skipcache"])
def test_schedules_import_no_torch(module):
    """Neither the schedules nor the package around them import torch."""
    code = f"import sys, {module}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
