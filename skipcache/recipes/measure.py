"""What a calibration measures of a model."""

from __future__ import annotations

import statistics as stats
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from skipcache.api import skip_cache
from skipcache.recipes.generic import output_in_a_line
from skipcache.recipes.plan import steps_of
from skipcache.recipes.sampler import Moments, Sampler
from skipcache.recipes.search import best_plans, fewest_refreshes
from skipcache.recipes.statistics import Array, OutputStatistics
from skipcache.recipes.weights import expected_error
from skipcache.schedules import MaskSchedule, Miss

PROBES = 8  # steps at which an error is made and followed to the end
TIMING_REPEATS = 3


def statistics_of(sampler: Sampler, moments: Sequence[Moments]) -> OutputStatistics:
    """Of the outputs of several calls, each by the number of its samples."""
    weights = np.array([found["weight"][0] for found in moments])
    weights = weights / weights.sum()
    covariance = sum(w * found["covariance"] for w, found in zip(weights, moments, strict=True))
    power = sum(w * found["power"][0] for w, found in zip(weights, moments, strict=True))
    assert sampler.effects is not None
    ones = np.ones(len(sampler.times))
    switches = tuple(moments[0]["switches"].tolist())
    return OutputStatistics(
        sampler.times, np.asarray(covariance), sampler.effects, ones, float(power), switches
    )


def with_gains(sampler: Sampler, found: OutputStatistics, calls: Sequence[int]) -> OutputStatistics:
    """Makes the error of one reuse at a few steps, and sees how large it is in the end."""
    n = found.steps
    at = probe_steps(n)
    squares = np.zeros((2, len(at)))
    for index in calls:
        for place, step in enumerate(at):
            measure = partial(followed, sampler, index, step, found)
            measured = sampler.checkpoint.measured(f"gain.{index}.{step}", measure)
            squares[:, place] += measured["squares"]
    known = squares[0] > 0
    if not known.any():
        return found
    gains = np.sqrt(squares[1][known] / squares[0][known])
    spread = np.interp(range(n), np.array(at)[known], gains)
    return replace(found, gains=spread)


def probe_steps(steps: int) -> list[int]:
    """The steps at which an error is made, denser early."""
    last = steps - 1
    return sorted({min(last, max(1, round(last * (i / PROBES) ** 1.5))) for i in range(PROBES)})


def followed(sampler: Sampler, index: int, step: int, found: OutputStatistics) -> dict[str, Array]:
    """Squares of the error as the sampler alone would carry it, and as it came out."""
    outputs: list[torch.Tensor] = []
    made: list[torch.Tensor] = []

    def change(now: int, output: torch.Tensor) -> torch.Tensor:
        if now < step:
            outputs[:] = [*outputs[-1:], output]
        if now != step:
            return output
        guess = 2 * outputs[-1] - outputs[0]
        made.append((guess - output).detach().float())
        return guess

    reference = sampler.uncached_sample(index)
    heard = sampler.run(index, change=change)
    assert heard.sample is not None
    carried = float(heard.once(made[0]).double().square().sum()) * found.effects[step] ** 2
    arrived = float((heard.sample.float().cpu() - reference).double().square().sum())
    return {"squares": np.array([carried, arrived])}


def reuse_cost_of(sampler: Sampler, found: OutputStatistics) -> float:
    """Seconds of a reuse step over those of a refresh, medians of runs in turns."""
    n = found.steps
    count = min(n - 1, max(fewest_refreshes(found), 2, n // 4))
    plan = best_plans(found, [count])[count]
    sparse = output_in_a_line(MaskSchedule(steps_of(plan), steps=n))

    def measure() -> dict[str, Array]:
        steps: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(TIMING_REPEATS + 1):
            full = sampler.run(0).seconds
            with skip_cache(sampler.pipe, config=sparse, adapter=sampler.adapter):
                reused = sampler.run(0).seconds
            if turn == 0:
                continue  # warm-up
            steps[True].append(stats.median(np.diff(full)))
            spans = [s for s, is_full in zip(np.diff(reused), plan[1:], strict=True) if not is_full]
            steps[False].append(stats.median(spans))
        ratios = [f / s for s, f in zip(steps[True], steps[False], strict=True)]
        return {"ratio": np.array([stats.median(ratios)])}

    ratio = float(sampler.checkpoint.measured("reuse_cost", measure)["ratio"][0])
    return min(0.95, max(0.0, ratio))


def usual_misses(statistics: OutputStatistics, misses: Iterable[Miss]) -> Array:
    """[2, n]: by how many times more than the statistics tell estimates miss, of a batch and of its
    worst sample: geometric means of each step, in between along a line.
    """
    ratios: dict[int, list[tuple[float, float]]] = {}
    for miss in misses:
        told = expected_error(statistics, miss.seen, miss.step)
        if told > 0 and miss.error > 0:
            ratios.setdefault(miss.step, []).append((miss.error / told, miss.worst / told))
    if not ratios:
        return np.ones((2, statistics.steps))
    steps = sorted(ratios)
    means = np.array([np.log(ratios[step]).mean(0) for step in steps])
    every = range(statistics.steps)
    spread: Array = np.exp(np.stack([np.interp(every, steps, column) for column in means.T]))
    return spread
