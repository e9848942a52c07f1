"""A recipe made by hand, for the tests of recipes."""

from __future__ import annotations

import numpy as np

from pipelines import transformer_of
from skipcache.branches.files import base_model_of
from skipcache.recipes.recipe import Measured, Point, Recipe, RecipeRecord
from skipcache.recipes.statistics import OutputStatistics

STEPS = 8


def recipe_for(kind: str = "dit", seed: int = 0) -> Recipe:
    """A recipe of smooth trajectories that no model has, marked as that tiny transformer's."""
    draw = np.random.default_rng(0)
    times = tuple(1 - i / STEPS for i in range(STEPS))
    outputs = np.exp(-np.outer(times, range(4))) @ draw.normal(size=(4, 40))
    outputs += 0.01 * draw.normal(size=outputs.shape)
    effects, gains = -draw.uniform(0.1, 0.2, STEPS), draw.uniform(0.5, 2, STEPS)
    statistics = OutputStatistics(times, outputs @ outputs.T / 40, effects, gains, 1 / 3)
    record = RecipeRecord(
        base_model_of(transformer_of(kind, seed=seed)),
        {"name": "CallingScheduler", "prediction_type": "epsilon"},
        1.5,
        (4, 8, 8),
        6,
        "made by hand",
    )
    points = (
        Point(1.5, (0, 1, 3, 4, 6), 0.01, Measured(31.5, 0.1, 4), 1.55),
        Point(2.0, (0, 2, 3, 6), 0.02, Measured(25.25, 1 / 7, 4), 1.9),
    )
    return Recipe(statistics, 0.01, points, record)
