"""When: the schedule of so many refreshes that loses least, by dynamic programming.

What a stretch of reuse costs depends on where it begins, how long it is and how far apart the two
refreshes before it were (``skipcache.recipes.weights.segment_costs``), so the best schedule is a
shortest path over pairs of refreshes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from skipcache.errors import ConfigError
from skipcache.recipes.statistics import Array, OutputStatistics
from skipcache.recipes.weights import segment_costs

REACH = 12  # the longest stretch of reuse


def best_plans(
    statistics: OutputStatistics, refreshes: Iterable[int]
) -> dict[int, tuple[bool, ...]]:
    """The best plan of each number of refreshes.

    Args:
        statistics: of the n steps.
        refreshes: from ``fewest_refreshes(statistics)`` to n each.

    Returns:
        Number of refreshes to n times whether the step refreshes.

    Raises:
        ConfigError: a number that cannot be.
    """
    wanted = sorted(set(refreshes))
    n = statistics.steps
    if not wanted:
        return {}
    fewest = fewest_refreshes(statistics)
    if wanted[0] < fewest or wanted[-1] > n:
        raise ConfigError(
            f"{wanted} refreshes in {n} steps cannot be: there are from {fewest} to {n} of them."
        )
    reach = min(REACH, n - 1)
    costs = segment_costs(statistics, reach)
    # best[r, gap]: least cost up to refresh r, the k-th, with the one before it gap steps earlier.
    best = np.full((n, reach + 2), np.inf)
    best[0, 0] = 0.0
    history: list[Array] = [np.full((n, reach + 2), -1)]
    plans = {}
    for count in range(1, wanted[-1] + 1):
        if count in wanted:
            plans[count] = _traced(best, costs, history, count)
        following = np.full_like(best, np.inf)
        came_from = np.full((n, reach + 2), -1)
        for length in range(reach + 1):
            gap = length + 1  # to the next refresh
            if gap > n - 1:
                break
            costing = _with_gaps(costs, length)[: n - gap]
            through = best[: n - gap] + costing
            choice = through.argmin(1)
            value = through[np.arange(n - gap), choice]
            following[gap:, gap] = value
            came_from[gap:, gap] = choice
        best = following
        history.append(came_from)
    return plans


def fewest_refreshes(statistics: OutputStatistics) -> int:
    """The smallest number of refreshes that a run of these steps can do with."""
    return sum(-(-(end - begin) // (REACH + 1)) for begin, end in set(statistics.stages))


def plan_error(statistics: OutputStatistics, plan: Sequence[bool]) -> float:
    """As ``plan_errors``, of one plan."""
    return plan_errors(statistics, [plan])[0]


def plan_errors(statistics: OutputStatistics, plans: Iterable[Sequence[bool]]) -> list[float]:
    """The predicted errors of the final sample, relative to its size (root mean square).

    Raises:
        ConfigError: a plan does not begin with a refresh, is of another length, or reuses longer
            than ``REACH`` steps in a row. Where another transformer reuses what it never made, the
            error is infinite.
    """
    n = statistics.steps
    reach = min(REACH, n - 1)
    costs = segment_costs(statistics, reach)
    errors = []
    for plan in plans:
        steps = [i for i, is_refresh in enumerate(plan) if is_refresh]
        if len(plan) != n or not steps or steps[0] != 0:
            raise ConfigError(f"a plan of {n} steps that begins with a refresh is needed: {plan}.")
        stretches = np.diff([*steps, n])
        if stretches.max() > reach + 1:
            raise ConfigError(f"{plan} reuses more than {reach} steps in a row.")
        total, before = 0.0, 0
        for step, stretch in zip(steps, stretches, strict=True):
            total += float(_with_gaps(costs, int(stretch) - 1)[step, before])
            before = int(stretch)
        errors.append(float(np.sqrt(total)))
    return errors


def _with_gaps(costs: Array, length: int) -> Array:
    """[n, reach + 2]: the costs of a stretch by gap; the longest gap counts as the one below."""
    found: Array = np.concatenate([costs[:, :, length], costs[:, -1:, length]], 1)
    return found


def _traced(best: Array, costs: Array, history: list[Array], count: int) -> tuple[bool, ...]:
    """The plan of the cheapest way to the end from the ``count``-th refresh."""
    n, reach = len(best), costs.shape[1] - 1
    ends = np.full_like(best, np.inf)
    for step in range(n):
        length = n - 1 - step
        if length <= reach:
            ends[step] = best[step] + _with_gaps(costs, length)[step]
    step, gap = (int(i) for i in np.unravel_index(ends.argmin(), ends.shape))
    plan = [False] * n
    for came_from in reversed(history[:count]):
        plan[step] = True
        before = int(came_from[step, gap])
        step, gap = step - gap, before
    return tuple(plan)
