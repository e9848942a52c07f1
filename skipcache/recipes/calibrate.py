"""Finds a recipe from the model itself: a few runs, and no training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from skipcache.api import skip_cache
from skipcache.branches.files import base_model_of
from skipcache.errors import ConfigError
from skipcache.recipes.measure import (
    TIMING_REPEATS,
    probe_steps,
    reuse_cost_of,
    statistics_of,
    usual_misses,
    with_gains,
)
from skipcache.recipes.plan import speedup_of, steps_of
from skipcache.recipes.recipe import (
    Measured,
    Point,
    Recipe,
    RecipeRecord,
    check_speedup,
    describe_scheduler,
    planned,
)
from skipcache.recipes.refine import refined_plan
from skipcache.recipes.sampler import Sampler, decibels
from skipcache.recipes.search import plan_error
from skipcache.recipes.statistics import Array
from skipcache.runtime.controller import controller_of
from skipcache.schedules import Miss
from skipcache.targets import is_module, transformers_of

NOTHING_SURPRISES = 1e9  # times the usual miss
ALIKE = ("num_inference_steps", "height", "width", "num_frames", "video_length")  # of all calls


def calibrate(
    pipe: Any,
    calls: Iterable[Mapping[str, Any]],
    *,
    speedups: Sequence[float] = (1.5, 2.0, 3.0),
    probes: int = 16,
    refine: int = 0,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    adapter: Any = None,
    progress: Callable[[int, int], object] | None = None,
) -> Recipe:
    """Measures how a model's outputs are related along sampling, and finds from it the recipe that
    is so much faster and loses least.

    The calls are sampled uncached (the last tenth, at least one, is held out for judging); then a
    small error is made at each of a few steps and followed to the end. Everything else is solved
    for, and checked on the held-out calls at the speedups asked for.

    Args:
        pipe: a diffusers pipeline.
        calls: keyword arguments of one call of the pipeline each, all of the same number of steps.
            A call without a ``generator`` gets one, seeded by its position. One that several calls
            share begins the first as it is, and each further one seeded by a draw from it. Sixteen
            samples or more in all are usual.
        speedups: wall-clock factors to find and measure a point of the recipe at. Others can be
            asked of the recipe as well.
        probes: on so many samples, rounded up to whole calls, errors are followed to the end.
        refine: for each speedup, how many changed schedules are tried by sampling.
        checkpoint: file to keep measurements in; a calibration that was stopped goes on from it.
            It stays: delete it when the recipe is saved.
        seed: of the generators.
        adapter: as for ``apply_skip_cache``.
        progress: called with runs done and runs in all.

    Returns:
        The recipe. The pipeline and its generators are as they were.

    Raises:
        ConfigError: fewer than two calls, calls of different numbers of steps, of less than three,
            or of different sizes, a speedup that the model cannot reach, or a pipeline without a
            scheduler.
        SkipCacheError: as ``apply_skip_cache``.
    """
    asked = [dict(call) for call in calls]
    speedups = _factors(speedups)
    _check(pipe, asked, probes, refine)
    transformer = next(iter(transformers_of(pipe).values()))
    base = base_model_of(transformer)
    sampler = Sampler(pipe, asked, seed, adapter)
    sampler.keep_in(checkpoint, base)
    held_out = range(len(asked) - max(1, len(asked) // 10), len(asked))
    fitted = range(held_out.start)
    with (
        sampler.generators_kept(),
        # Bit-identical to no cache; refuses what cannot be cached.
        skip_cache(pipe, interval=1, adapter=adapter),
    ):
        probed = fitted[: math.ceil(probes / int(sampler.moments(0)["weight"][0]))]
        sampler.report(
            progress,
            len(asked)  # those held out are sampled once too
            + (1 + len(probe_steps(len(sampler.times)))) * len(probed)
            + 2 * (1 + TIMING_REPEATS)
            + len(speedups) * ((1 + refine) * len(probed) * bool(refine) + len(held_out)),
        )
        found = statistics_of(sampler, [sampler.moments(index) for index in fitted])
        found = with_gains(sampler, found, probed)
        reuse_cost = reuse_cost_of(sampler, found)
        record = RecipeRecord(
            base,
            describe_scheduler(pipe.scheduler),
            sampler.guidance_scale,
            sampler.sample_shape,
            0,  # seen below
            f"calibrate on {len(asked)} calls (the last {len(held_out)} held out), seed {seed}",
        )
        recipe = Recipe(found, reuse_cost, (), record)
        for speedup in speedups:
            recipe.at(speedup)  # refuses what cannot be reached, before the rest is measured
        for speedup in speedups:
            plan = refined_plan(sampler, recipe, speedup, probed, refine)
            recipe = recipe.with_plan(steps_of(plan))
        points, misses = _measured(sampler, recipe, speedups, held_out)
        cached = controller_of(transformer)  # one that guesses has seen a forward by now
        assert cached is not None
    record = replace(record, layers=cached.bound.depth)
    return Recipe(replace(found, misses=misses), reuse_cost, points, record)


def _measured(
    sampler: Sampler, recipe: Recipe, speedups: Sequence[float], held_out: Sequence[int]
) -> tuple[tuple[Point, ...], Array]:
    """What the recipe is worth on the calls held out, and by how much estimates miss there."""
    unsurprised = np.full_like(recipe.statistics.misses, NOTHING_SURPRISES)
    watched = replace(recipe, statistics=replace(recipe.statistics, misses=unsurprised))
    misses: list[Miss] = []
    errors: dict[float, list[float]] = {speedup: [] for speedup in speedups}
    for index in held_out:
        reference = sampler.uncached_sample(index)
        for speedup, found in errors.items():
            config = watched.at(speedup, adaptive="batch")
            found += sampler.errors(index, reference, config)
            misses += sampler.misses
    points = []
    for speedup, found in errors.items():
        plan = planned(recipe, speedup).plan
        points.append(
            Point(
                float(speedup),
                steps_of(plan),
                plan_error(recipe.statistics, plan),
                Measured(*decibels(found), len(found)),
                speedup_of(recipe.steps, sum(plan), recipe.reuse_cost),
            )
        )
    return tuple(points), usual_misses(recipe.statistics, misses)


def _factors(speedups: Any) -> tuple[float, ...]:
    """Any numbers, numpy's among them."""
    try:
        found = tuple(getattr(speedup, "item", lambda own=speedup: own)() for speedup in speedups)
    except (TypeError, ValueError):
        raise ConfigError(f"speedups is {speedups!r}. Name several, such as (1.5, 2.0).") from None
    if not found:
        raise ConfigError("speedups is empty. Name at least one, such as 2.0.")
    for speedup in found:
        check_speedup(speedup)
    return found


def _check(pipe: Any, calls: Sequence[Mapping[str, Any]], probes: int, refine: int) -> None:
    if is_module(pipe) or not transformers_of(pipe):
        raise ConfigError("a recipe is calibrated on a pipeline, with its scheduler and its calls.")
    if len(calls) < 2:
        raise ConfigError(
            f"{len(calls)} calls are too few: one is held out and at least one is measured. Pass "
            "at least two; 16 samples or more in all are usual."
        )
    for name in ALIKE:
        given = {repr(call[name]): None for call in calls if call.get(name) is not None}
        if len(given) > 1:
            raise ConfigError(
                f"calls that differ in {name} ({', '.join(given)}) have other timesteps or sizes. "
                "Calibrate each kind on its own."
            )
    for name, count, least in (("probes", probes, 1), ("refine", refine, 0)):
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise ConfigError(f"{name} is {count!r}. It is a whole number from {least}.")
