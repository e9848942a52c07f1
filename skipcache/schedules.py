"""When: which steps refresh. Pure functions of time; nothing here knows a model or imports torch.

Times are normalised: the fraction of training noise levels, 1 = pure noise, 0 = clean. A schedule
is *causal*: what it says of a step depends on that step and the ones before it only, so the same
object plans a whole run ahead (``plan``) and decides step by step where the run's length is not
known (``is_refresh``).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, SupportsIndex, TypeGuard, runtime_checkable

from skipcache.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Progress:
    """What a schedule may know of the step it decides on.

    Attributes:
        times: normalised times of the run's steps so far, this one last. An entry is NaN where the
            time is unknown (a bare call without a timestep).
        since_refresh: steps since the last refresh; None when nothing is cached.
        change: relative L1 change of the shallow feature, summed over the steps since the last
            refresh. Zero unless the schedule has ``needs_probe``.
    """

    times: Sequence[float]
    since_refresh: int | None
    change: float = 0.0

    @property
    def index(self) -> int:
        """Index of this step in its run, from 0."""
        return len(self.times) - 1


@dataclass(frozen=True, slots=True)
class Miss:
    """By how much an estimate would have missed what a refresh computed.

    Attributes:
        step: of the refresh.
        seen: the refreshes that the estimate looked at, newest last.
        error: |estimate - computed| / |computed| of the whole batch, of the stream of the step
            where it is largest.
        worst: the same of the sample of the batch where it is largest.
    """

    step: int
    seen: tuple[int, ...]
    error: float
    worst: float


@runtime_checkable
class Schedule(Protocol):
    """Decides which steps refresh. Implementations are immutable and hold no state of a run."""

    @property
    def needs_probe(self) -> bool:
        """Whether decisions need the shallow feature's change (a host sync a step)."""
        ...

    @property
    def needs_times(self) -> bool:
        """Whether decisions depend on normalised times, not only on step indices."""
        ...

    def is_refresh(self, progress: Progress) -> bool:
        """Whether this step refreshes. Where nothing is cached, the runtime does not ask."""
        ...

    def plan(self, times: Sequence[float]) -> tuple[bool, ...] | None:
        """The whole run from its normalised times, True = refresh; None if only the run tells."""
        ...


@runtime_checkable
class AdaptiveSchedule(Schedule, Protocol):
    """A schedule whose plan is a floor: where estimates miss by more than usual, refreshes are
    added to it.
    """

    @property
    def is_adaptive(self) -> bool:
        """Whether it may add any; if not, nothing is measured (a host sync a refresh)."""
        ...

    def adds_refresh(self, times: Sequence[float], step: int, miss: Miss) -> bool:
        """Whether a step that the plan reuses at refreshes after all.

        Args:
            times: normalised times of the run's steps.
            step: this one.
            miss: of the last refresh.
        """
        ...


def _plan_causally(schedule: Schedule, times: Sequence[float]) -> tuple[bool, ...]:
    plan: list[bool] = []
    since_refresh: int | None = None
    for index in range(len(times)):
        refresh = since_refresh is None or schedule.is_refresh(
            Progress(times[: index + 1], since_refresh)
        )
        plan.append(refresh)
        since_refresh = 1 if refresh else (since_refresh or 0) + 1
    return tuple(plan)


def _check_window(start: float, stop: float) -> None:
    for name, value in (("start", start), ("stop", stop)):
        if not _is_number(value) or not 0.0 <= value <= 1.0:
            raise ConfigError(
                f"window {name} is {value!r}. It is a normalised time: a number from 0 (clean) to "
                "1 (pure noise). "
                "A timestep of 1000 training steps divides by 1000: 700 is 0.7."
            )
    if start <= stop:
        raise ConfigError(
            f"window (start={start!r}, stop={stop!r}) is empty or reversed. Sampling runs from 1 "
            "(noise) to 0, so "
            "start must be greater than stop, for example (0.9, 0.05)."
        )


class _Windowed(Protocol):
    @property
    def start(self) -> float: ...
    @property
    def stop(self) -> float: ...
    @property
    def needs_times(self) -> bool: ...


def _is_outside_window(schedule: _Windowed, times: Sequence[float]) -> bool:
    """Whether the last of ``times`` is at or above ``start``, or an earlier one was at or below
    ``stop``.

    An unknown time (NaN) counts as outside where the window matters: never reuse on a guess.
    """
    if math.isnan(times[-1]):
        return schedule.needs_times
    return times[-1] >= schedule.start or any(time <= schedule.stop for time in times[:-1])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> TypeGuard[SupportsIndex]:
    """Whole numbers, numpy's among them; True and False are none."""
    return isinstance(value, SupportsIndex) and not isinstance(value, bool)


@dataclass(frozen=True)
class IntervalSchedule:
    """Refreshes every ``interval`` steps inside a window of time, and always outside it (the
    paper's schedule).

    A step refreshes when its index is a multiple of ``interval``, when nothing is cached, or when t
    >= ``start``. After the first step with t <= ``stop`` every step refreshes; that step itself
    still follows the interval. These are the semantics of the reference implementation of
    arXiv:2411.17616.

    Attributes:
        interval: at least 1; 1 refreshes always.
        start: normalised time; at and above it everything refreshes. 1.0 lets reuse begin at the
            second step.
        stop: normalised time, below ``start``; after it has been reached everything refreshes.

    Raises:
        ConfigError: an interval below 1, or a window outside 0..1, reversed or not a number.
    """

    interval: int = 2
    start: float = 1.0
    stop: float = 0.0

    needs_probe = False

    def __post_init__(self) -> None:
        if not _is_count(self.interval) or self.interval < 1:
            raise ConfigError(
                f"interval is {self.interval!r}. It is a whole number of steps, at least 1 (1 = "
                "refresh always)."
            )
        _check_window(self.start, self.stop)

    @property
    def needs_times(self) -> bool:
        return self.interval > 1 and (self.start < 1.0 or self.stop > 0.0)

    def is_refresh(self, progress: Progress) -> bool:
        if progress.index % self.interval == 0 or progress.since_refresh is None:
            return True
        return _is_outside_window(self, progress.times)

    def plan(self, times: Sequence[float]) -> tuple[bool, ...]:
        return _plan_causally(self, times)


@dataclass(frozen=True)
class MaskSchedule:
    """Refreshes at the steps named, by index here, or by normalised time with
    ``MaskSchedule.at_times``.

    By index, a run longer than the mask was written for is not served from the cache to its end:
    without ``steps``, no stretch of reuse is longer than the longest one between two named steps;
    with ``steps``, every step past that length refreshes. By time, a step refreshes when it is the
    first one at or below a named time, so one mask serves any number of steps. The first step
    always refreshes.

    Attributes:
        refresh_steps: step indices from 0, in any order.
        steps: the run length that the indices were written for, if known.
        refresh_times: normalised times; use ``at_times``.

    Raises:
        ConfigError: a negative, repeated, non-finite or non-integer entry, no entry at all, or an
            index past ``steps``.
    """

    refresh_steps: tuple[int, ...] = ()
    steps: int | None = None
    refresh_times: tuple[float, ...] = ()

    needs_probe = False

    def __post_init__(self) -> None:
        try:
            steps, times = tuple(self.refresh_steps), tuple(self.refresh_times)
        except TypeError:
            raise ConfigError(
                f"refresh steps are {self.refresh_steps!r}, refresh times {self.refresh_times!r}. "
                "Pass a list: MaskSchedule([0, 2, 5]), or MaskSchedule.at_times([0.9, 0.5, 0.1])."
            ) from None
        if bool(steps) == bool(times):
            raise ConfigError(
                "a MaskSchedule needs at least one refresh step, or with MaskSchedule.at_times at "
                "least one time, "
                f"and not both. Found refresh_steps={steps!r}, refresh_times={times!r}."
            )
        for step in steps:
            if not _is_count(step) or step < 0:
                raise ConfigError(
                    f"refresh step {step!r} is not a step index: a whole number from 0."
                )
        for time in times:
            if not _is_number(time) or not 0.0 <= time <= 1.0:
                raise ConfigError(
                    f"refresh time {time!r} is not a normalised time: a number from 0 (clean) to 1 "
                    "(noise)."
                )
        if len(set(steps)) != len(steps) or len(set(times)) != len(times):
            raise ConfigError(f"a step or time is named twice in {steps or times!r}.")
        if self.steps is not None and (
            not steps or not _is_count(self.steps) or max(steps) >= operator.index(self.steps)
        ):
            raise ConfigError(
                f"steps={self.steps!r} does not fit refresh_steps {steps!r}: indices run from 0 to "
                "steps - 1, and a mask by time has no length."
            )
        object.__setattr__(
            self, "refresh_steps", tuple(sorted(operator.index(step) for step in steps))
        )
        object.__setattr__(self, "refresh_times", tuple(sorted(times, reverse=True)))

    @classmethod
    def at_times(cls, refresh_times: Iterable[float]) -> MaskSchedule:
        """Refreshes at the first step at or below each normalised time, whatever the number of
        steps.
        """
        return cls(refresh_times=refresh_times)  # type: ignore[arg-type]  # made a tuple there

    @property
    def needs_times(self) -> bool:
        return bool(self.refresh_times)

    def _covered_steps(self) -> int:
        if self.steps is not None:
            return self.steps
        named = (0, *(step for step in self.refresh_steps if step > 0))
        longest = max((late - early for early, late in pairwise(named)), default=1)
        return named[-1] + longest

    def is_refresh(self, progress: Progress) -> bool:
        if progress.since_refresh is None:
            return True
        if not self.refresh_times:
            return progress.index in self.refresh_steps or progress.index >= self._covered_steps()
        now, before = progress.times[-1], progress.times[-2]
        if math.isnan(now) or math.isnan(before):
            return True
        return any(now <= time < before for time in self.refresh_times)

    def plan(self, times: Sequence[float]) -> tuple[bool, ...]:
        return _plan_causally(self, times)


@dataclass(frozen=True)
class ProbeSchedule:
    """Refreshes when the shallow feature has drifted far enough since the last refresh (adaptive).

    At every step the relative L1 change of the shallow feature, ``mean|f_t - f_prev| /
    mean|f_prev|``, is added up; once the sum reaches ``threshold`` the step refreshes. Measuring it
    costs one host sync a step. The idea of an accumulated change against a threshold is TeaCache's
    (arXiv:2411.19108).

    Attributes:
        threshold: at least 0; 0 refreshes always.
        max_consecutive: the longest stretch of reuse steps.
        start: normalised time at and above which everything refreshes.
        stop: normalised time; after the first step at or below it everything refreshes.

    Raises:
        ConfigError: a threshold that is negative or not a number, ``max_consecutive`` below 1, a
            bad window.
    """

    threshold: float = 0.1
    max_consecutive: int = 4
    start: float = 1.0
    stop: float = 0.0

    needs_probe = True

    def __post_init__(self) -> None:
        if not _is_number(self.threshold) or self.threshold < 0:
            raise ConfigError(
                f"threshold is {self.threshold!r}. It is a relative change: a number from 0 "
                "(refresh always)."
            )
        if not _is_count(self.max_consecutive) or self.max_consecutive < 1:
            raise ConfigError(
                f"max_consecutive is {self.max_consecutive!r}. It is the longest run of reuse "
                "steps, at least 1."
            )
        _check_window(self.start, self.stop)

    @property
    def needs_times(self) -> bool:
        return self.start < 1.0 or self.stop > 0.0

    def is_refresh(self, progress: Progress) -> bool:
        if progress.since_refresh is None or progress.since_refresh > self.max_consecutive:
            return True
        if _is_outside_window(self, progress.times):
            return True
        return not progress.change < self.threshold

    def plan(self, times: Sequence[float]) -> None:
        return None
