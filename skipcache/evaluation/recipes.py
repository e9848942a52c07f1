"""What a recipe is worth on the demo model, part by part, and how well it predicts itself."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from skipcache import api
from skipcache.config import SkipCacheConfig
from skipcache.errors import SkipCacheError
from skipcache.evaluation.fits import call_of, sample_classes
from skipcache.evaluation.metrics import psnr
from skipcache.evaluation.timing import format_table
from skipcache.recipes.generic import output_in_a_line
from skipcache.recipes.plan import refreshes_for, speedup_of, steps_of
from skipcache.recipes.recipe import Recipe, planned, recipe_beside
from skipcache.recipes.refine import refined_plan
from skipcache.recipes.sampler import Sampler, decibels
from skipcache.recipes.search import best_plans, plan_errors
from skipcache.schedules import IntervalSchedule, MaskSchedule

SPEEDUPS = (1.5, 2.0, 3.0)
BRANCH_COST = 0.16  # of a reuse step that runs one layer at either end of eighteen, and the fit
REFINEMENTS = 12
FIRST_SEED = 20_000  # of what plans are refined on; those compared have seeds from 0


def recipe_ablation(seeds: int = 4) -> str:
    """PSNR to the uncached pictures, dB: schedule alone, estimator alone, both, refined, branches.

    Mean and standard deviation over ten classes of each seed, 50 steps; the recipe that comes with
    the demo model.
    """
    pipeline, recipe = _demo()
    uncached = [sample_classes(pipeline, seed, 50) for seed in range(seeds)]
    sampler = Sampler(pipeline, [call_of(50)] * 2, FIRST_SEED)
    rows: dict[str, list[str]] = {}
    for speedup in SPEEDUPS:
        count = refreshes_for(50, speedup, recipe.reuse_cost)
        found = steps_of(planned(recipe, speedup).plan)
        even = tuple(sorted({round(j * 50 / count) for j in range(count)}))
        with api.skip_cache(pipeline, interval=1):
            refined = refined_plan(sampler, recipe, speedup, range(2), REFINEMENTS)
        fewer = refreshes_for(50, speedup, BRANCH_COST)
        branches = best_plans(recipe.statistics, [fewer])[fewer]
        variants = {
            "even schedule, line through two outputs": _line(even),
            "schedule alone": _line(found),
            "estimator alone": recipe.with_plan(even).at(speedup),
            "both: the recipe": recipe.at(speedup),
            f"the recipe, {REFINEMENTS} changes tried closed-loop": recipe.with_plan(
                steps_of(refined)
            ).at(speedup),
            "fitted branches, the recipe's schedule at equal time": SkipCacheConfig(
                schedule=MaskSchedule(steps_of(branches), steps=50)
            ),
        }
        for name, config in variants.items():
            rows.setdefault(name, [name]).append(_quality(pipeline, config, uncached, 50))
    header = ["50 steps", *(f"{speedup:g}x" for speedup in SPEEDUPS)]
    return format_table(header, list(rows.values()))


def recipe_steps(seeds: int = 4) -> str:
    """PSNR to the uncached pictures, dB, of the 50-step recipe at other numbers of steps.

    Beside the best fixed setting that runs as few or more refreshes: an interval over the output,
    or over the fit.
    """
    pipeline, recipe = _demo()
    rows = []
    for steps in (50, 30, 20):
        uncached = [sample_classes(pipeline, seed, steps) for seed in range(seeds)]
        for interval in (2, 3):
            own = _quality(pipeline, recipe.at(float(interval)), uncached, steps)
            ran = refreshes_of(pipeline, recipe.at(float(interval)), steps)
            row = [str(steps), f"{interval:g}x", f"{ran} refreshes", own]
            schedule = IntervalSchedule(interval)
            fixed = {
                "output": SkipCacheConfig(schedule=schedule, front_layers=0, back_layers=0),
                "fit": SkipCacheConfig(schedule=schedule),
                "taylor(2)": SkipCacheConfig(schedule=schedule, estimator="taylor(2)"),
            }
            row += [_quality(pipeline, config, uncached, steps) for config in fixed.values()]
            rows.append(row)
    names = ["output, interval", "fit, interval", "taylor(2), interval"]
    return format_table(["steps", "speedup", "runs", "recipe", *names], rows)


def recipe_adaptive(seeds: int = 4) -> str:
    """PSNR to the uncached pictures, dB, and refreshes: the recipe with and without ``adaptive``.

    Ten classes of each seed, 50 steps; at the guidance that was calibrated, 2, and at others.
    """
    pipeline, recipe = _demo()
    rows = []
    for guidance in (2.0, 1.0, 5.0, 10.0):
        uncached = [sample_classes(pipeline, seed, 50, guidance=guidance) for seed in range(seeds)]
        for speedup in (2.0, 3.0):
            row = [f"{guidance:g}", f"{speedup:g}x"]
            for adaptive in (None, "batch", "sample"):
                refreshed = []
                values = []
                with api.skip_cache(pipeline, config=recipe.at(speedup, adaptive=adaptive)):
                    for seed, references in enumerate(uncached):
                        images = sample_classes(pipeline, seed, 50, guidance=guidance)
                        values += [psnr(a, b) for a, b in zip(images, references, strict=True)]
                        refreshed.append(api.cache_stats(pipeline).refreshed)
                row.append(f"{_spread(values)}, {statistics.mean(refreshed):g}")
            rows.append(row)
    return format_table(["guidance", "speedup", "recipe", "batch", "sample"], rows)


def recipe_prediction(schedules: int = 40, steps: int = 50) -> str:
    """Rank correlation of predicted and measured error over random schedules.

    Measured on held-out samples (sixteen) as the root mean square of the relative error of the last
    latents.
    """
    pipeline, recipe = _demo()
    calls = [{**call_of(steps, 16)}]
    sampler = Sampler(pipeline, calls, FIRST_SEED + 100)
    plans = random_plans(schedules, steps)
    with api.skip_cache(pipeline, interval=1):
        reference = sampler.uncached_sample(0)
        measured = []
        for plan in plans:
            speedup = speedup_of(steps, sum(plan), recipe.reuse_cost)
            config = recipe.with_plan(steps_of(plan)).at(speedup)
            measured.append(_root_mean_square(sampler.errors(0, reference, config)))
    predicted = plan_errors(recipe.statistics, plans)
    rho = rank_correlation(predicted, measured)
    ratios = [found / told for found, told in zip(measured, predicted, strict=True)]
    return (
        f"Spearman {rho:.3f} over {len(plans)} schedules of {min(map(sum, plans))} to "
        f"{max(map(sum, plans))} refreshes; measured over predicted {statistics.median(ratios):.2f}"
        f" (median; {min(ratios):.2f} to {max(ratios):.2f}). Errors "
        f"{decibels([max(measured)])[0]:.0f} to {decibels([min(measured)])[0]:.0f} dB."
    )


def random_plans(count: int, steps: int, seed: int = 0) -> list[tuple[bool, ...]]:
    """Plans of different numbers of refreshes, spaced unevenly at random; no stretch of reuse is
    longer than 12 steps.
    """
    draw = np.random.default_rng(seed)
    plans: list[tuple[bool, ...]] = []
    while len(plans) < count:
        refreshes = int(draw.integers(steps // 4, 3 * steps // 4 + 1))
        bend = draw.uniform(0.7, 1.7)
        places = steps * np.sort(draw.uniform(size=refreshes - 1)) ** bend
        chosen = {0, *(int(place) for place in places)}
        plan = tuple(step in chosen for step in range(steps))
        if np.diff([*steps_of(plan), steps]).max() <= 13 and sum(plan) >= 2:
            plans.append(plan)
    return plans


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort(np.array(values))).astype(float) for values in (left, right)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def refreshes_of(pipeline: Any, config: SkipCacheConfig, steps: int) -> int:
    """Refreshes of a run."""
    with api.skip_cache(pipeline, config=config):
        sample_classes(pipeline, 0, steps, labels=1)
        return api.cache_stats(pipeline).refreshed


def _demo() -> tuple[Any, Recipe]:
    from skipcache.demo import load_pipeline

    pipeline = load_pipeline()
    recipe = recipe_beside(pipeline.transformer)
    if recipe is None:
        raise SkipCacheError("the demo model has no recipe beside it.")
    return pipeline, recipe


def _line(refresh_steps: Sequence[int]) -> SkipCacheConfig:
    return output_in_a_line(MaskSchedule(tuple(refresh_steps), steps=50))


def _quality(
    pipeline: Any, config: SkipCacheConfig, uncached: Sequence[torch.Tensor], steps: int
) -> str:
    values = []
    with api.skip_cache(pipeline, config=config):
        for seed, references in enumerate(uncached):
            images = sample_classes(pipeline, seed, steps)
            values += [psnr(a, b) for a, b in zip(images, references, strict=True)]
    return _spread(values)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"


def _root_mean_square(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
