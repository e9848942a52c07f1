"""Tries schedules near the one that the search finds by sampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skipcache.recipes.plan import steps_of
from skipcache.recipes.recipe import Recipe, planned
from skipcache.recipes.sampler import Sampler, decibels
from skipcache.recipes.search import REACH, plan_errors


def refined_plan(
    sampler: Sampler, recipe: Recipe, speedup: float, calls: Sequence[int], refine: int
) -> tuple[bool, ...]:
    """The plan for a speedup: the one that the search finds, changed as long as sampling by it gets
    better.
    """
    plan = planned(recipe, speedup).plan
    if not refine:
        return plan
    references = {index: sampler.uncached_sample(index) for index in calls}

    def decibels_of(tried: Sequence[bool]) -> float:
        config = recipe.with_plan(steps_of(tried)).at(speedup)
        return decibels(
            [e for index, known in references.items() for e in sampler.errors(index, known, config)]
        )[0]

    best, seen = decibels_of(plan), {plan}
    for _ in range(refine):
        changed = [tried for tried in _changes(plan) if tried not in seen]
        predicted = plan_errors(recipe.statistics, changed)
        if not np.isfinite(predicted).any():
            break
        tried = changed[int(np.argmin(predicted))]
        seen.add(tried)
        reached = decibels_of(tried)
        if reached > best:
            plan, best = tried, reached
    return plan


def _changes(plan: tuple[bool, ...]) -> list[tuple[bool, ...]]:
    """Plans with one refresh moved by a step or two."""
    found = []
    for step in steps_of(plan)[1:]:
        for other in (step - 2, step - 1, step + 1, step + 2):
            if 0 < other < len(plan) and not plan[other]:
                moved = list(plan)
                moved[step], moved[other] = False, True
                stretches = np.diff([*steps_of(moved), len(plan)])
                if stretches.max() <= REACH + 1:
                    found.append(tuple(moved))
    return found
