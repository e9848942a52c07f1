"""The weights of a reuse step: the linear combination of the last outputs that leaves the least
error in the final sample.

A sampler is linear in the outputs it is given: the final sample is a sum of them, each times its
*effect*. What the reuse steps of a run owe this sum so far is therefore known as a combination of
outputs, and each reuse step takes the combination of cached outputs that comes nearest to the true
output and pays back what is owed (least squares on the covariance of the outputs). Nothing of it
needs a sample or the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from skipcache.recipes.statistics import Array, OutputStatistics

HISTORY = 4  # cached outputs that a reuse step looks at
RIDGE = 1e-5  # of the diagonal: rounding noise of bf16 outputs
MEMORY = 0.3  # normalised time after which an owed error counts 1 / e: the model has reacted to it


@dataclass(frozen=True)
class ReuseWeights:
    """Of one reuse step.

    Attributes:
        refresh_steps: the refreshes looked at, newest last.
        weights: one each.
    """

    refresh_steps: tuple[int, ...]
    weights: tuple[float, ...]


def reuse_weights(
    statistics: OutputStatistics, plan: Sequence[bool], history: int = HISTORY
) -> dict[int, ReuseWeights]:
    """The weights of every reuse step of a plan.

    Args:
        statistics: of the n steps.
        plan: n times whether the step refreshes; the first one does.
        history: how many refreshes a reuse step may look at.
    """
    effects, times, stages = statistics.effects, statistics.times, statistics.stages
    found = {}
    refreshes: list[int] = []
    owed = np.zeros(statistics.steps)
    for step, is_refresh in enumerate(plan):
        if step:
            owed = owed * math.exp((times[step] - times[step - 1]) / MEMORY)
        if is_refresh:
            refreshes.append(step)
            continue
        seen = [refresh for refresh in refreshes if refresh >= stages[step][0]][-history:]
        wanted = -_safely_divided(owed, effects[step])
        wanted[step] += 1.0
        weights = nearest_weights(statistics, seen, wanted)
        owed[seen] += effects[step] * weights
        owed[step] -= effects[step]
        found[step] = ReuseWeights(tuple(seen), tuple(float(weight) for weight in weights))
    return found


def nearest_weights(statistics: OutputStatistics, seen: Sequence[int], wanted: Array) -> Array:
    """The weights of the outputs of the steps ``seen`` whose sum comes nearest to what is wanted.

    Args:
        statistics: of the n steps.
        seen: steps.
        wanted: [n], weights of all outputs.

    Returns:
        One weight a step of ``seen``.
    """
    places = list(seen)
    moments = statistics.covariance[np.ix_(places, places)]
    ridge = np.diag(RIDGE * np.diag(moments) + 1e-300)
    return np.asarray(np.linalg.solve(moments + ridge, statistics.covariance[places] @ wanted))


def expected_error(statistics: OutputStatistics, seen: Sequence[int], step: int) -> float:
    """Of the output of a step, taken from those of the steps ``seen``: relative, root mean square.

    0 where the outputs are nothing.
    """
    missing = -np.eye(statistics.steps)[step]
    missing[list(seen)] += nearest_weights(statistics, seen, -missing)
    square = missing @ statistics.covariance @ missing
    size = statistics.covariance[step, step]
    return math.sqrt(max(0.0, float(square / size))) if size > 0 else 0.0


def segment_costs(statistics: OutputStatistics, reach: int) -> Array:
    """What stretches of reuse cost: squared error of the final sample, as far as can be told.

    A stretch follows the refresh ``r``, the one before which was ``gap`` steps earlier (and the
    one before that as many again), and lasts ``length`` steps; its error is the sum of what it owes
    at its end, times the gain there.

    Args:
        statistics: of the n steps.
        reach: the longest gap and the longest stretch.

    Returns:
        [n, reach + 1, reach + 1], by r, gap and length; gap 0: there was no refresh before r.
        Infinite where it does not fit into the run, or another transformer takes over on the way.
        In units of ``statistics.power``.
    """
    n, covariance, effects = statistics.steps, statistics.covariance, statistics.effects
    costs = np.full((n, reach + 1, reach + 1), np.inf)
    cases = [(r, gap) for r in range(n) for gap in range(1, min(r, reach) + 1)]
    cases = [(0, 0), *cases]
    steps = np.array([r for r, _ in cases])
    gaps = np.array([gap for _, gap in cases])
    seen = np.stack([steps, steps - gaps, steps - 2 * gaps], 1)
    # A refresh that is not there is one more look at the last one: the ridge halves its weight.
    begins, ends_of = np.array(statistics.stages)[steps].T
    seen = np.where((seen < begins[:, None]) | (gaps[:, None] == 0), steps[:, None], seen)
    moments = covariance[seen[:, :, None], seen[:, None, :]]
    diagonal = np.einsum("kii->ki", moments)
    moments = moments + np.eye(3) * (RIDGE * diagonal + 1e-300)[:, None, :]
    owed = np.zeros((len(cases), n))
    costs[steps, gaps, 0] = 0.0
    rows = np.arange(len(cases))
    for length in range(1, reach + 1):
        now = steps + length
        is_inside = now < ends_of
        if not is_inside.any():
            break
        now = np.minimum(now, n - 1)
        effect = effects[now]
        wanted = -owed / np.where(effect == 0, np.inf, effect)[:, None]
        wanted[rows, now] += 1.0
        right = np.einsum("kin,kn->ki", covariance[seen], wanted)
        weights = np.linalg.solve(moments, right[..., None])[..., 0]
        for place in range(3):
            owed[rows, seen[:, place]] += effect * weights[:, place]
        owed[rows, now] -= effect
        ends = np.minimum(now + 1, n - 1)
        error = ((owed @ covariance) * owed).sum(1) * statistics.gains[ends] ** 2
        error = np.maximum(error, 0.0)  # rounding goes below, where outputs are known in full
        costs[steps[is_inside], gaps[is_inside], length] = error[is_inside] / statistics.power
    return costs


def _safely_divided(owed: Array, effect: float) -> Array:
    """Nothing can be paid back by a step without effect."""
    return owed / effect if effect else np.zeros_like(owed)
