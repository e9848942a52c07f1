"""Finds a recipe from the model itself: a few runs, and no training."""

from __future__ import annotations

import math
import statistics as stats
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipcache.api import skip_cache
from skipcache.branches.files import base_model_of
from skipcache.config import SkipCacheConfig
from skipcache.errors import ConfigError
from skipcache.recipes.checkpoint import Checkpoint, described
from skipcache.recipes.generic import output_in_a_line
from skipcache.recipes.listening import Listened, effects_of, listening
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
from skipcache.recipes.search import REACH, best_plans, fewest_refreshes, plan_error, plan_errors
from skipcache.recipes.statistics import Array, OutputStatistics
from skipcache.recipes.weights import expected_error
from skipcache.runtime.controller import controller_of
from skipcache.schedules import MaskSchedule, Miss
from skipcache.targets import is_module, transformers_of

ELEMENTS = 262_144  # of a call's output that moments are taken of
PROBES = 8  # steps at which an error is made and followed to the end
TIMING_REPEATS = 3
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
    noise = [[state for _, state in states] for states in states_of(asked)]
    noted = [{**call, "noise": states} for call, states in zip(asked, noise, strict=True)]
    kept = Checkpoint(checkpoint, described((base, _scheduler_in_words(pipe)), noted, seed))
    sampler = Sampler(pipe, asked, seed, kept, adapter)
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
        found = _statistics(sampler, [sampler.moments(index) for index in fitted])
        found = _with_gains(sampler, found, probed)
        reuse_cost = _reuse_cost(sampler, found)
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


class Sampler:
    """Runs the calls, always from the same noise, and keeps what was measured."""

    def __init__(
        self,
        pipe: Any,
        calls: Sequence[dict[str, Any]],
        seed: int,
        checkpoint: Checkpoint,
        adapter: Any = None,
    ) -> None:
        self.pipe, self.calls, self.seed, self.checkpoint = pipe, calls, seed, checkpoint
        self.adapter = adapter
        self.states = states_of(calls)
        self.times: tuple[float, ...] = ()
        self.effects: Array | None = None
        self.sample_shape: tuple[int, ...] = ()
        # The last sample of a call, fp32 on the CPU; the last few are kept.
        self.uncached_sample = lru_cache(maxsize=4)(self._sampled)
        self.misses: list[Miss] = []  # of the last run that measured any
        self._progress: Callable[[int, int], object] | None = None
        self._done = self._total = 0

    @contextmanager
    def generators_kept(self) -> Iterator[None]:
        """Puts the generators of the calls back afterwards."""
        given = {each: each.get_state() for call in self.calls for each in _generators(call)}
        try:
            yield
        finally:
            for generator, state in given.items():
                generator.set_state(state)

    def report(self, progress: Callable[[int, int], object] | None, total: int) -> None:
        self._progress, self._total = progress, total

    @property
    def guidance_scale(self) -> float | None:
        given = self.calls[0].get("guidance_scale")
        return float(given) if isinstance(given, (int, float)) else None

    def run(self, index: int, **listening_to: Any) -> Listened:
        """Samples a call."""
        call = dict(self.calls[index])
        for generator, state in self.states[index]:
            generator.set_state(state)
        if call.get("generator") is None:
            call["generator"] = torch.Generator().manual_seed(self.seed + index)
        with (
            listening(self.pipe, **listening_to) as heard,
            torch.no_grad(),
            torch.random.fork_rng(),
        ):
            torch.manual_seed(self.seed + index)  # what draws from no generator of the call
            self.pipe(**call)
        if heard.sample is None:
            raise ConfigError("the pipeline sampled without its scheduler, so nothing was learnt.")
        shape = tuple(heard.sample.shape[1:])
        if self.sample_shape and shape != self.sample_shape:
            raise ConfigError(
                f"call {index} makes samples of {shape} where others are of {self.sample_shape}. "
                "Calibrate each size on its own."
            )
        if self.times and heard.times != self.times:
            raise ConfigError(
                f"call {index} has {len(heard.times)} steps where others have {len(self.times)}, "
                "or other timesteps. Calibrate each number of steps on its own."
            )
        if len(heard.times) < 3:
            raise ConfigError(
                f"the calls make {len(heard.times)} steps. A cache needs at least three."
            )
        self.times, self.sample_shape = heard.times, shape
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, max(self._total, self._done))
        return heard

    def moments(self, index: int) -> Moments:
        """Of an uncached call, measured once."""

        def measure() -> dict[str, Array]:
            picked: list[torch.Tensor] = []
            sizes: list[torch.Size] = []
            by: list[str] = []  # the transformer called last before each step

            def keep(output: torch.Tensor) -> torch.Tensor:
                by.extend(called[-1:])
                called.clear()
                if not picked:
                    draw = torch.Generator().manual_seed(index)
                    chosen = torch.randperm(output.numel(), generator=draw)[:ELEMENTS]
                    picked.append(chosen.sort().values.to(output.device))
                    sizes.append(output.shape)
                if output.shape != sizes[0]:
                    raise ConfigError(
                        f"the scheduler is given outputs of shapes {tuple(sizes[0])} and "
                        f"{tuple(output.shape)} in one run, so they cannot be told from one "
                        "another. There are no recipes for such pipelines."
                    )
                return output.detach().flatten()[picked[0]].float().cpu()

            with _calls_of(self.pipe) as called:
                heard = self.run(index, keep=keep)
            assert heard.sample is not None
            rows = torch.stack(heard.outputs).double()
            of_all = {"effects": effects_of(heard)} if self.effects is None else {}
            return {
                **of_all,
                "times": np.array(heard.times),
                "shape": np.array(heard.sample.shape[1:], dtype=np.float64),
                "covariance": (rows @ rows.T / rows.shape[1]).numpy(),
                "weight": np.array([float(len(heard.sample))]),
                "power": np.array([float(heard.sample.double().square().mean())]),
                "switches": np.array(
                    [
                        (heard.times[i - 1] + heard.times[i]) / 2
                        for i in range(1, len(by))
                        if by[i] != by[i - 1]
                    ]
                ),
            }

        found = self.checkpoint.measured(f"moments.{index}", measure)
        if self.effects is None:
            self.times = tuple(found["times"].tolist())
            self.effects = found["effects"]
            self.sample_shape = tuple(int(size) for size in found["shape"])
        elif tuple(found["times"].tolist()) != self.times:
            raise ConfigError("the calls have different timesteps. Calibrate each on its own.")
        return found

    def _sampled(self, index: int) -> torch.Tensor:
        heard = self.run(index)
        assert heard.sample is not None
        return heard.sample.float().cpu()

    def errors(self, index: int, reference: torch.Tensor, config: SkipCacheConfig) -> list[float]:
        """Relative error of each sample of the call by that configuration."""
        with skip_cache(self.pipe, config=config, adapter=self.adapter):
            heard = self.run(index)
            controllers = map(controller_of, transformers_of(self.pipe).values())
            runs = [each.last_run for each in controllers if each is not None]
            self.misses = [miss for run in runs if run is not None for miss in run.misses]
        assert heard.sample is not None
        return relative_errors(heard.sample.float().cpu(), reference)


@contextmanager
def _calls_of(pipe: Any) -> Iterator[list[str]]:
    """Names of the pipeline's transformers, one a call."""
    called: list[str] = []
    handles = [
        transformer.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, transformer in transformers_of(pipe).items()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _scheduler_in_words(pipe: Any) -> str:
    scheduler = getattr(pipe, "scheduler", None)
    settings = dict(getattr(scheduler, "config", None) or {})
    return f"{type(scheduler).__name__} {sorted(settings.items(), key=repr)}"


def _generators(call: Mapping[str, Any]) -> list[torch.Generator]:
    given = call.get("generator")
    several = given if isinstance(given, (list, tuple)) else [given]
    return [generator for generator in several if isinstance(generator, torch.Generator)]


def states_of(
    calls: Sequence[Mapping[str, Any]],
) -> list[list[tuple[torch.Generator, torch.Tensor]]]:
    """Of each call, its generators and the states that it begins with."""
    uses: Counter[torch.Generator] = Counter()
    states = []
    for call in calls:
        generators = list(dict.fromkeys(_generators(call)))
        states.append([(each, _state_for(each, uses[each])) for each in generators])
        uses.update(generators)
    return states


def _state_for(generator: torch.Generator, use: int) -> torch.Tensor:
    """The generator's own for its first use; for later ones, seeded by so many draws from it."""
    state = generator.get_state()
    if use == 0:
        return state
    fresh = torch.Generator(generator.device)
    fresh.set_state(state)
    seeds = torch.randint(2**62, (use,), generator=fresh, device=generator.device)
    return fresh.manual_seed(int(seeds[-1])).get_state()


Moments = Mapping[str, Array]


def relative_errors(samples: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """|sample - reference| / |reference| of each [B, ...]."""
    difference = (samples - reference).double().flatten(1).norm(dim=1)
    ratio: list[float] = (difference / reference.double().flatten(1).norm(dim=1)).tolist()
    return ratio


def decibels(errors: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of the signal-to-error ratio, dB."""
    values = [-20 * math.log10(max(error, 1e-9)) for error in errors]
    return stats.mean(values), stats.pstdev(values)


def _statistics(sampler: Sampler, moments: Sequence[Moments]) -> OutputStatistics:
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


def _with_gains(
    sampler: Sampler, found: OutputStatistics, calls: Sequence[int]
) -> OutputStatistics:
    """Makes the error of one reuse at a few steps, and sees how large it is in the end."""
    n = found.steps
    at = probe_steps(n)
    squares = np.zeros((2, len(at)))
    for index in calls:
        for place, step in enumerate(at):
            measure = partial(_followed, sampler, index, step, found)
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


def _followed(sampler: Sampler, index: int, step: int, found: OutputStatistics) -> dict[str, Array]:
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


def _reuse_cost(sampler: Sampler, found: OutputStatistics) -> float:
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
