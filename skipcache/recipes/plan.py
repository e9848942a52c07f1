"""A recipe at one speedup, as the two things that a cache asks for: when and what.

Both are looked up by the run's own times, so that one recipe serves any number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from skipcache.estimators import (
    Refresh,
    Tensors,
    extrapolation_weights,
    weighted_sums,
)
from skipcache.recipes.search import best_plans, fewest_refreshes
from skipcache.recipes.statistics import SAME_TIME, OutputStatistics
from skipcache.recipes.weights import HISTORY, ReuseWeights, reuse_weights
from skipcache.schedules import MaskSchedule, Progress


@dataclass(frozen=True, eq=False)
class RecipeSchedule:
    """Refreshes where it loses least, as often as the speedup allows.

    Attributes:
        statistics: of the model.
        speedup: asked for, wall-clock.
        reuse_cost: seconds of a reuse step over those of a refresh.
        plans: number of refreshes to refresh steps, where they were refined at the steps of
            ``statistics``; the search tells for all others.
    """

    statistics: OutputStatistics
    speedup: float
    reuse_cost: float
    plans: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    _runs: dict[tuple[float, ...], PlannedRun] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    needs_probe = False
    needs_times = True

    def plan(self, times: Sequence[float]) -> tuple[bool, ...]:
        return self.planned(times).plan

    def is_refresh(self, progress: Progress) -> bool:
        """For runs of unknown length: at the times of the plan that was calibrated."""
        planned = self.planned(self.statistics.times)
        times = {planned.times[i] for i, refreshes in enumerate(planned.plan) if refreshes}
        return MaskSchedule.at_times(times).is_refresh(progress)

    def planned(self, times: Sequence[float]) -> PlannedRun:
        """Plan and weights of a run with these times."""
        key = tuple(times)
        if key not in self._runs:
            self._runs[key] = self._planned(key)
        return self._runs[key]

    def refreshes(self, steps: int) -> int:
        """How many of so many steps refresh."""
        return refreshes_for(steps, self.speedup, self.reuse_cost)

    def _planned(self, times: tuple[float, ...]) -> PlannedRun:
        steps = len(times)
        count = min(steps, max(self.refreshes(steps), fewest_refreshes(steps), 2))
        if steps < 3 or count == steps or not all(map(math.isfinite, times)):
            return PlannedRun(times, (True,) * steps, {})
        statistics = self.statistics.at(times)
        if statistics is self.statistics and count in self.plans:
            plan = tuple(step in self.plans[count] for step in range(steps))
        else:
            plan = best_plans(statistics, [count])[count]
        return PlannedRun(times, plan, reuse_weights(statistics, plan))


@dataclass(frozen=True)
class PlannedRun:
    """What a run with these times does.

    Attributes:
        times: normalised.
        plan: True = refresh.
        weights: of each reuse step.
    """

    times: tuple[float, ...]
    plan: tuple[bool, ...]
    weights: Mapping[int, ReuseWeights]


@dataclass(frozen=True, eq=False)
class RecipeEstimator:
    """The weighted sum of the last outputs that loses least in the final sample. Keeps four outputs
    a stream.

    Where the refreshes are not those that the schedule planned (a run whose length is not known, a
    second transformer that joins late), the line through the last two.

    Attributes:
        schedule: of the same recipe; it knows the weights.
    """

    schedule: RecipeSchedule

    history = HISTORY
    needs_shallow = False

    def prepare(self, refreshes: Sequence[Refresh], step: int, time: float) -> tuple[Tensors, ...]:
        found = self._planned_weights(refreshes, step, time)
        if found is None:
            refreshes = refreshes[-2:]
            found = extrapolation_weights([refresh.step for refresh in refreshes], step)
        return (weighted_sums(found, [refresh.deep for refresh in refreshes]),)

    def estimate(self, prepared: tuple[Tensors, ...], shallow: Tensors | None) -> Tensors:
        return prepared[0]

    def _planned_weights(
        self, refreshes: Sequence[Refresh], step: int, time: float
    ) -> Sequence[float] | None:
        seen = tuple(refresh.step for refresh in refreshes)
        for run in tuple(self.schedule._runs.values()):
            found = run.weights.get(step)
            # By this step's time alone: a run that begins late (image to image) learns so from its
            # second step on, and what its first one kept still has the time of a whole run's.
            if found and found.refresh_steps == seen and abs(run.times[step] - time) <= SAME_TIME:
                return found.weights
        return None


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
