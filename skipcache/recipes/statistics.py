"""What a recipe knows of a model: how its outputs at different steps are related, and how far an
error in one of them is carried.

From these alone, schedules are searched and weights are solved for (``skipcache.recipes.weights``),
for any number of steps; no sample is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skipcache.errors import ConfigError
from skipcache.estimators import extrapolation_weights

Array = NDArray[np.float64]

SAME_TIME = 1e-6
LAST_SPAN = 1e-4  # of a last step at time 0, at least


@dataclass(frozen=True, eq=False)
class OutputStatistics:
    """Second moments of the transformer's output along sampling trajectories of n steps.

    Attributes:
        times: normalised time of each step, 1 = noise.
        covariance: [n, n], the mean product of the outputs of two steps, over samples and elements,
            guidance included.
        effects: [n], what the final sample changes by when the output of one step does, all later
            outputs unchanged: the sampler's own arithmetic.
        gains: [n], by how much the model carries such a change further, measured.
        power: mean square of the final sample.
        switches: times at which another transformer takes over (Wan 2.2): the first step below.
        misses: [2, n], by how many times more than the covariance tells an estimate misses what one
            call of the transformer returns (a guidance pass, a variance beside the output),
            measured, of the whole batch and of its worst sample; ones by default.

    Raises:
        ConfigError: sizes that do not match, values that are not finite, or a power that is not
            positive.
    """

    times: tuple[float, ...]
    covariance: Array
    effects: Array
    gains: Array
    power: float
    switches: tuple[float, ...] = ()
    misses: Array = None  # type: ignore[assignment]  # ones, once it is made

    def __post_init__(self) -> None:
        count = len(self.times)
        if self.misses is None:
            object.__setattr__(self, "misses", np.ones((2, count)))
        arrays = (self.covariance, self.effects, self.gains, self.misses)
        shapes = tuple(array.shape for array in arrays)
        if count < 2 or shapes != ((count, count), (count,), (count,), (2, count)):
            raise ConfigError(f"statistics of {count} steps have arrays of shapes {shapes}.")
        parts = (np.array([*self.times, *self.switches, self.power]), *arrays)
        if not all(np.isfinite(part).all() for part in parts) or not self.power > 0:
            raise ConfigError("statistics have values that are not finite, or no power.")

    @property
    def steps(self) -> int:
        """n."""
        return len(self.times)

    @property
    def stages(self) -> list[tuple[int, int]]:
        """[n]: the first step of the transformer that makes the step, and the one after its last:
        nothing that was cached of one transformer serves another.
        """
        counts = [sum(switch > time for switch in self.switches) for time in self.times]
        begins = [i for i, count in enumerate(counts) if i == 0 or count != counts[i - 1]]
        ends = [*begins[1:], self.steps]
        return [
            stage for stage in zip(begins, ends, strict=True) for _ in range(stage[1] - stage[0])
        ]

    def at(self, times: Sequence[float]) -> OutputStatistics:
        """The same at the steps of another run of the sampler.

        Outputs are smooth in time, so their moments are interpolated (cubic). The effects of the
        steps between two times add up to the same, whatever the steps.
        """
        new = tuple(times)
        if len(new) == self.steps and np.allclose(new, self.times, atol=SAME_TIME, rtol=0):
            return self
        matrix = _interpolation(self.times, new)
        rising = np.argsort(self.times, kind="stable")
        known = np.array(self.times)[rising]
        return OutputStatistics(
            new,
            matrix @ self.covariance @ matrix.T,
            _spread_anew(self.effects, self.times, new),
            np.interp(new, known, self.gains[rising]),
            self.power,
            self.switches,
            np.stack([np.interp(new, known, row[rising]) for row in self.misses]),
        )


def _spread_anew(effects: Array, times: Sequence[float], new: Sequence[float]) -> Array:
    """Effects of the steps at ``new``: what their sum up to each time grows by from step to step,
    shared out evenly among steps that share a time.
    """
    edges, groups = _edges(times)
    new_edges, new_groups = _edges(new)
    each = np.bincount(groups, effects)
    # Before the first step, the sum grows as fast as in it.
    known = np.array([edges[0] + 1.0, *edges])
    sums = np.array([-each[0] / (edges[0] - edges[1]), 0.0, *np.cumsum(each)])
    grown = np.diff(np.interp(-new_edges, -known, sums))
    return np.asarray((grown / np.bincount(new_groups))[new_groups])


def _edges(times: Sequence[float]) -> tuple[Array, NDArray[np.intp]]:
    """Distinct times and the one at which the last step ends, and the index of each step's own."""
    known = np.array(times)
    is_next = np.array([False, *(known[:-1] - known[1:] > SAME_TIME)])
    distinct = known[np.array([True, *is_next[1:]])]
    end = min(0.0, float(distinct[-1]) - LAST_SPAN)
    return np.array([*distinct, end]), np.cumsum(is_next)


def _interpolation(times: Sequence[float], new: Sequence[float]) -> Array:
    """[new, n]: weights of values at ``times`` (falling) for cubic interpolation; the nearest value
    beyond either end.
    """
    distinct = [i for i, time in enumerate(times) if i == 0 or time < times[i - 1] - SAME_TIME]
    known = np.array([times[i] for i in distinct])
    matrix = np.zeros((len(new), len(times)))
    for row, time in enumerate(new):
        inside = float(np.clip(time, known[-1], known[0]))
        behind = int(np.searchsorted(-known, -inside, side="right")) - 1
        first = min(max(behind - 1, 0), max(len(known) - 4, 0))
        near = range(first, min(first + 4, len(known)))
        weights = extrapolation_weights([float(known[i]) for i in near], inside)
        for place, weight in zip(near, weights, strict=True):
            matrix[row, distinct[place]] = weight
    return matrix
