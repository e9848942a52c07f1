"""A recipe at one speedup, as the two things that a cache asks for: when and what.

Both are looked up by the run's own times, so that one recipe serves any number of steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from skipcache.errors import RecipeWarning
from skipcache.estimators import (
    Refresh,
    Tensors,
    extrapolation_weights,
    weighted_sums,
)
from skipcache.recipes.search import best_plans, fewest_refreshes
from skipcache.recipes.statistics import SAME_TIME, OutputStatistics
from skipcache.recipes.weights import (
    HISTORY,
    ReuseWeights,
    expected_error,
    nearest_weights,
    reuse_weights,
)
from skipcache.schedules import MaskSchedule, Miss, Progress

SURPRISING = 1.3  # times the usual miss, above which refreshes are added
NEARLY = 0.95  # of a speedup: steps are whole
KEPT_RUNS = 32  # whose plans and weights are kept; they are found anew in milliseconds

Key = TypeVar("Key")
Found = TypeVar("Found")


@dataclass(frozen=True, eq=False)
class RecipeSchedule:
    """Refreshes where it loses least, as often as the speedup allows.

    Attributes:
        statistics: of the model.
        speedup: asked for, wall-clock.
        reuse_cost: seconds of a reuse step over those of a refresh.
        plans: number of refreshes to refresh steps, where they were refined at the steps of
            ``statistics``; the search tells for all others.
        adaptive: whether misses add refreshes, those of the ``"batch"`` or of its worst
            ``"sample"``; see ``AdaptiveSchedule``.
    """

    statistics: OutputStatistics
    speedup: float
    reuse_cost: float
    plans: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    adaptive: str | None = None
    _runs: dict[tuple[float, ...], PlannedRun] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    needs_probe = False
    needs_times = True

    @property
    def preset(self) -> str:
        """Its name in ``cache_stats``."""
        return f"recipe/{self.speedup:g}x"

    @property
    def is_adaptive(self) -> bool:
        return self.adaptive is not None

    def plan(self, times: Sequence[float]) -> tuple[bool, ...]:
        run = self.planned(times)
        plan = run.plan
        reached = speedup_of(len(plan), sum(plan), self.reuse_cost) if plan else 1.0
        if run.statistics is not None and reached < NEARLY * self.speedup:
            warnings.warn(
                f"speedup={self.speedup:g} is out of reach at {len(plan)} steps; they can be "
                f"{reached:.2f} times faster.",
                RecipeWarning,
                stacklevel=2,
            )
        return plan

    def is_refresh(self, progress: Progress) -> bool:
        """For runs of unknown length: at the times of the plan that was calibrated."""
        planned = self.planned(self.statistics.times)
        # A little earlier: a model is told its times in fp32.
        times = {min(1.0, planned.times[i] + SAME_TIME) for i in steps_of(planned.plan)}
        return MaskSchedule.at_times(times).is_refresh(progress)

    def adds_refresh(self, times: Sequence[float], step: int, miss: Miss) -> bool:
        """A stretch of reuse is shortened by the root of how many times more than is surprising the
        refresh before it was missed by: what a stretch loses grows with its length squared.
        """
        run = self.planned(times)
        # Interpolated statistics take outputs for more alike than they are.
        if run.statistics is None or len(run.plan) > self.statistics.steps:
            return False
        missed, which = (miss.error, 0) if self.adaptive == "batch" else (miss.worst, 1)
        told = expected_error(run.statistics, miss.seen, miss.step)
        allowed = SURPRISING * float(run.statistics.misses[which, miss.step]) * told
        if missed <= allowed or told == 0:
            return False
        following = (i for i in range(miss.step + 1, len(run.plan)) if run.plan[i])
        stretch = next(following, len(run.plan)) - miss.step
        return step - miss.step >= stretch * math.sqrt(allowed / missed)

    def planned(self, times: Sequence[float]) -> PlannedRun:
        """The plan of a run with these times."""
        key = tuple(times)
        return _kept(self._runs, key, lambda: self._planned(key))

    def refreshes(self, steps: int) -> int:
        """How many of so many steps refresh."""
        return refreshes_for(steps, self.speedup, self.reuse_cost)

    def _planned(self, times: tuple[float, ...]) -> PlannedRun:
        steps = len(times)
        if steps < 3 or not all(map(math.isfinite, times)):
            return PlannedRun(times, (True,) * steps)
        statistics = self.statistics.at(times)
        count = min(steps, max(self.refreshes(steps), fewest_refreshes(statistics), 2))
        if statistics is self.statistics and count in self.plans:
            plan = tuple(step in self.plans[count] for step in range(steps))
        else:
            plan = best_plans(statistics, [count])[count]
        return PlannedRun(times, plan, statistics)


@dataclass(frozen=True)
class PlannedRun:
    """What a run with these times does.

    Attributes:
        times: normalised.
        plan: True = refresh.
        statistics: at these times; None where the run is too short, or has a time that is not
            known.
    """

    times: tuple[float, ...]
    plan: tuple[bool, ...]
    statistics: OutputStatistics | None = None


@dataclass(frozen=True, eq=False)
class RunEstimator:
    """That of one run: the weighted sum of the last outputs that loses least in the final sample.
    Keeps four outputs a stream.

    Where the refreshes are not those planned (a pass was away at one), what comes nearest to the
    output by those that there are.

    Attributes:
        statistics: at the times of the run.
        weights: of the reuse steps of its plan.
    """

    statistics: OutputStatistics
    weights: Mapping[int, ReuseWeights]

    history = HISTORY
    needs_shallow = False

    def prepare(self, refreshes: Sequence[Refresh], step: int, time: float) -> tuple[Tensors, ...]:
        seen = tuple(refresh.step for refresh in refreshes)
        planned = self.weights.get(step)
        if planned is not None and planned.refresh_steps == seen:
            weights = list(planned.weights)
        else:
            output = np.eye(self.statistics.steps)[step]
            weights = nearest_weights(self.statistics, seen, output).tolist()
        return (weighted_sums(weights, [refresh.deep for refresh in refreshes]),)

    def estimate(self, prepared: tuple[Tensors, ...], shallow: Tensors | None) -> Tensors:
        return prepared[0]


@dataclass(frozen=True, eq=False)
class RecipeEstimator:
    """Those of all runs. Where the length of a run is not known, at the steps and times that were
    calibrated that of the calibrated run, at others the line through the last two outputs.

    Attributes:
        statistics: of the model.
        plan: of the run that was calibrated; empty: not known.
    """

    statistics: OutputStatistics
    plan: tuple[bool, ...] = ()
    _runs: dict[tuple[tuple[float, ...], tuple[bool, ...]], RunEstimator] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    history = HISTORY
    needs_shallow = False

    def for_run(
        self, times: Sequence[float], plan: Sequence[bool]
    ) -> RecipeEstimator | RunEstimator:
        """The weights of a run with these times and this plan."""
        if len(plan) < 3 or not all(map(math.isfinite, times)):
            return self

        def made() -> RunEstimator:
            statistics = self.statistics.at(times)
            return RunEstimator(statistics, reuse_weights(statistics, plan))

        return _kept(self._runs, (tuple(times), tuple(plan)), made)

    def prepare(self, refreshes: Sequence[Refresh], step: int, time: float) -> tuple[Tensors, ...]:
        times = self.statistics.times
        if step < len(self.plan) and abs(times[step] - time) <= SAME_TIME:
            run = self.for_run(times, self.plan)
            if run is not self:
                return run.prepare(refreshes, step, time)
        last = refreshes[-2:]
        weights = extrapolation_weights([refresh.step for refresh in last], step)
        return (weighted_sums(weights, [refresh.deep for refresh in last]),)

    def estimate(self, prepared: tuple[Tensors, ...], shallow: Tensors | None) -> Tensors:
        return prepared[0]


def _kept(runs: dict[Key, Found], key: Key, make: Callable[[], Found]) -> Found:
    """What was made for the key, now or before; no more than ``KEPT_RUNS`` are kept."""
    found = runs.get(key)
    if found is None:
        if len(runs) >= KEPT_RUNS:
            runs.clear()
        found = runs[key] = make()
    return found


def refreshes_for(steps: int, speedup: float, reuse_cost: float) -> int:
    """The most refreshes with which a run is that much faster; 0 where none are few enough."""
    left = steps / speedup - steps * reuse_cost
    return max(0, math.floor(left / (1 - reuse_cost) + 1e-9))


def speedup_of(steps: int, refreshes: int, reuse_cost: float) -> float:
    """How much faster a run with so many refreshes is."""
    return float(steps / (refreshes + (steps - refreshes) * reuse_cost))


def steps_of(plan: Sequence[bool]) -> tuple[int, ...]:
    """The steps that refresh."""
    return tuple(int(i) for i in np.flatnonzero(plan))
