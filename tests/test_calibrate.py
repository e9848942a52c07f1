"""Calibration on the demo model: that what is measured is so, and what is found is worth it."""

from __future__ import annotations

import dataclasses
import statistics

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import pipelines
from skipcache import (
    Recipe,
    SkipCacheConfig,
    apply_skip_cache,
    cache_stats,
    calibrate,
    is_skip_cached,
    plugins,
    remove_skip_cache,
    skip_cache,
)
from skipcache.demo import load_pipeline
from skipcache.errors import ConfigError, RecipeFileError, SkipCacheError
from skipcache.evaluation.recipes import random_plans, rank_correlation
from skipcache.plugins import AdapterRegistry
from skipcache.recipes.listening import effects_of, listening
from skipcache.recipes.measure import usual_misses
from skipcache.recipes.plan import steps_of
from skipcache.recipes.recipe import planned
from skipcache.recipes.sampler import Sampler, decibels
from skipcache.recipes.search import plan_errors
from skipcache.recipes.weights import expected_error
from skipcache.schedules import MaskSchedule, Miss

STEPS = 12


def call_of(steps: int = STEPS, labels: int = 3, **more) -> dict:
    return {
        "class_labels": list(range(labels)),
        "guidance_scale": 2.0,
        "num_inference_steps": steps,
        "output_type": "np",
        **more,
    }


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


@pytest.fixture(autouse=True)
def uncached(pipe):
    yield
    remove_skip_cache(pipe)


@pytest.fixture(scope="module")
def recipe(pipe):
    return calibrate(pipe, [call_of()] * 3, speedups=(1.5, 2.5), probes=4)


def sample(pipe, steps: int = STEPS, seed: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(pipe(**call_of(steps), generator=generator).images)


def error_of(pipe, config: SkipCacheConfig, reference: torch.Tensor, steps: int = STEPS) -> float:
    with skip_cache(pipe, config=config):
        difference = sample(pipe, steps) - reference
    return float(difference.norm() / reference.norm())


def line_at(refresh_steps, steps: int = STEPS) -> SkipCacheConfig:
    schedule = MaskSchedule(tuple(refresh_steps), steps=steps)
    return SkipCacheConfig(front_layers=0, back_layers=0, schedule=schedule, estimator="taylor")


SCHEDULERS = {
    "ddim": lambda config: DDIMScheduler.from_config(config),
    "dpm++ 2m": lambda config: DPMSolverMultistepScheduler.from_config(config),
    "unipc": lambda config: UniPCMultistepScheduler.from_config(config),
    "deis": lambda config: DEISMultistepScheduler.from_config(config),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_effects_are_the_derivative_of_the_sampler(pipe, name):
    """An output changed at one step changes the last sample by its effect times the change, where
    the model is not asked again: every later output is put back to what it was.
    """
    own = pipe.scheduler
    pipe.scheduler = SCHEDULERS[name](own.config)
    try:
        kept: list[torch.Tensor] = []
        with listening(pipe, keep=lambda output: kept.append(output) or output) as heard:
            sample(pipe, 8)
        effects = effects_of(heard)
        for step in (0, 3, 7):
            given = [*kept[:step], kept[step] + 1, *kept[step + 1 :]]
            with listening(pipe, change=lambda now, _, given=given: given[now]) as changed:
                sample(pipe, 8)
            moved = (changed.sample - heard.sample).double()
            expected = torch.full_like(moved, effects[step])
            assert torch.allclose(moved, expected, atol=2e-3)
        assert np.abs(effects).min() > 0
    finally:
        pipe.scheduler = own


def test_effects_of_flow_matching():
    """Of Euler steps along a flow, each output counts as much as sigma falls."""

    class Loop:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    loop, latents = Loop(), torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    loop.scheduler.set_timesteps(7)
    with listening(loop) as heard:
        for timestep in loop.scheduler.timesteps:
            latents = loop.scheduler.step(latents.sin(), timestep, latents).prev_sample
    assert np.allclose(effects_of(heard), loop.scheduler.sigmas.diff().numpy(), atol=1e-6)
    assert heard.times[0] == pytest.approx(1.0)


def test_effects_of_a_sampler_with_noise_of_its_own(pipe):
    """Noise that the scheduler draws cancels: DDIM at eta 0 and 1 differ, and both are measured to
    the last digits of fp32, twice alike.
    """
    found = []
    for eta in (0.0, 1.0, 1.0):
        with listening(pipe) as heard:
            sample(pipe, 6)
        for bound in heard.calls:
            bound.arguments["eta"] = eta
        found.append(effects_of(heard))
    plain, noisy, again = found
    assert np.array_equal(noisy, again)
    assert np.abs(noisy).max() < 10
    assert not np.allclose(plain, noisy, rtol=1e-2)


def test_listening_leaves_no_trace(pipe):
    """The scheduler's class and attributes are the same after listening, also after an error, and
    the sample is bit-identical while it is listened to.
    """
    before = sample(pipe)
    scheduler, attributes = pipe.scheduler, set(vars(pipe.scheduler))
    with listening(pipe) as heard:
        assert torch.equal(sample(pipe), before)
    assert len(heard.times) == STEPS
    with pytest.raises(RuntimeError, match="stop"), listening(pipe):
        raise RuntimeError("stop")
    assert type(pipe.scheduler) is DDIMScheduler
    assert pipe.scheduler is scheduler
    assert set(vars(scheduler)) == attributes


def test_a_recipe_beats_the_line_by_far(pipe, recipe):
    """At the steps that it was calibrated at, on noise it has not seen, the recipe's error is less
    than half of what even refreshes and a line through two outputs make, at as many refreshes.
    """
    reference = sample(pipe)
    for speedup in (1.5, 2.5):
        plan = planned(recipe, speedup).plan
        even = sorted({round(j * STEPS / sum(plan)) for j in range(sum(plan))})
        own = error_of(pipe, recipe.at(speedup), reference)
        with skip_cache(pipe, config=recipe.at(speedup)):
            sample(pipe)
            assert cache_stats(pipe).plan == "".join("F" if p else "r" for p in plan)
        assert own < 0.5 * error_of(pipe, line_at(even), reference)


def test_it_serves_other_numbers_of_steps(pipe, recipe):
    """At nine and at eighteen steps, which it was not calibrated at, it is still nearer than
    the line on the same schedule.
    """
    for steps in (9, 18):
        reference = sample(pipe, steps)
        with skip_cache(pipe, recipe=recipe, speedup=2.0):
            sample(pipe, steps)
            plan = cache_stats(pipe).plan
        refreshes = [i for i, letter in enumerate(plan) if letter == "F"]
        own = error_of(pipe, recipe.at(2.0), reference, steps)
        assert own < error_of(pipe, line_at(refreshes, steps), reference, steps)


def test_what_is_measured_is_what_sampling_gives(pipe, recipe):
    """The figure of a point is the mean over held-out samples of what one sees when applying it."""
    with listening(pipe) as heard:
        sample(pipe, seed=2)  # the third call's
    with skip_cache(pipe, recipe=recipe, speedup=1.5), listening(pipe) as cached:
        sample(pipe, seed=2)
    difference = (cached.sample - heard.sample).double().flatten(1).norm(dim=1)
    errors = difference / heard.sample.double().flatten(1).norm(dim=1)
    assert len(errors) == 3  # though guidance carries each sample twice
    [point] = [point for point in recipe.points if point.speedup == 1.5]
    assert point.measured.samples == 3
    assert point.measured.decibels == pytest.approx(decibels(errors.tolist())[0], abs=1e-3)


def test_predicted_and_measured_errors_rank_alike(pipe, recipe):
    """Over forty random schedules predicted and measured error correlate by rank, 0.8 or more."""
    plans = random_plans(40, STEPS, seed=3)
    sampler = Sampler(pipe, [call_of()], 50)
    with skip_cache(pipe, interval=1):
        reference = sampler.uncached_sample(0)
        measured = []
        for plan in plans:
            changed = recipe.with_plan(steps_of(plan))
            speedup = STEPS / (sum(plan) + (STEPS - sum(plan)) * recipe.reuse_cost)
            assert planned(changed, speedup).plan == plan
            found = sampler.errors(0, reference, changed.at(speedup))
            measured.append(statistics.fmean(e * e for e in found) ** 0.5)
    assert rank_correlation(plan_errors(recipe.statistics, plans), measured) >= 0.8


def test_calibration_leaves_the_pipeline_as_it_was(pipe):
    """The same sample after as before; a cache that was applied is applied again."""
    before = sample(pipe)
    calibrate(pipe, [call_of(6)] * 2, speedups=(1.5,), probes=1)
    assert not is_skip_cached(pipe)
    assert torch.equal(sample(pipe), before)
    apply_skip_cache(pipe, interval=3)
    sample(pipe)
    plan = cache_stats(pipe).plan
    calibrate(pipe, [call_of(6)] * 2, speedups=(1.5,), probes=1)
    sample(pipe)
    assert cache_stats(pipe).plan == plan != "F" * STEPS


def test_one_that_was_stopped_goes_on(pipe, tmp_path):
    """Stopped in the middle, it goes on with what it had: the same statistics as in one go, and
    fewer runs. Other calls are refused. The file is the caller's to delete.
    """
    calls = [call_of(8, 2)] * 3
    whole = calibrate(pipe, calls, speedups=(1.5,), probes=1)
    file = tmp_path / "state" / "calibration.safetensors"
    runs = []

    def stop(done: int, total: int) -> None:
        runs.append(done)
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, calls, speedups=(1.5,), probes=1, checkpoint=file, progress=stop)
    assert not is_skip_cached(pipe)
    assert file.exists()
    with pytest.raises(RecipeFileError, match="another calibration"):
        calibrate(pipe, [call_of(8, 3)] * 3, speedups=(1.5,), checkpoint=file)
    again: list[int] = []
    resumed = calibrate(
        pipe,
        calls,
        speedups=(1.5,),
        probes=1,
        checkpoint=file,
        progress=lambda done, total: again.append(total),
    )
    in_one_go: list[int] = []
    calibrate(pipe, calls, speedups=(1.5,), probes=1, progress=lambda d, t: in_one_go.append(t))
    assert len(again) < len(in_one_go)
    assert np.array_equal(resumed.statistics.covariance, whole.statistics.covariance)
    assert np.array_equal(resumed.statistics.gains, whole.statistics.gains)
    assert file.exists()


def test_noise_that_differs_between_the_halves_of_a_doubled_batch(pipe):
    """Guidance carries two copies along; DDPM gives each noise of its own, and the first counts
    in every run alike.
    """
    own = pipe.scheduler
    pipe.scheduler = diffusers.DDPMScheduler.from_config(own.config)
    try:
        found = calibrate(pipe, [call_of(6, 2)] * 2, speedups=(1.5,), probes=1)
        assert found.points[0].measured.samples == 2
        with listening(pipe) as heard:
            sample(pipe, 6)
        assert heard.is_doubled
        assert len(heard.sample) == 3
    finally:
        pipe.scheduler = own


def test_usual_misses(pipe, recipe):
    """What estimates on the held-out calls missed, over what the statistics tell: both are of a
    size, and a batch's worst sample misses more than the whole.
    """
    misses = recipe.statistics.misses
    assert misses.shape == (2, STEPS)
    assert 0.2 < misses[0].min() < misses[0].max() < 5
    assert (misses[1] >= misses[0]).all()
    known = recipe.statistics
    told = [expected_error(known, seen, step) for seen, step in (((0,), 1), ((0, 1), 4))]
    found = usual_misses(
        known,
        [
            Miss(1, (0,), 2 * told[0], 4 * told[0]),
            Miss(1, (0,), 8 * told[0], 4 * told[0]),
            Miss(4, (0, 1), told[1], 16 * told[1]),
        ],
    )
    assert found[:, [0, 1, 4, STEPS - 1]] == pytest.approx(np.array([[4, 4, 1, 1], [4, 4, 16, 16]]))
    assert found[0, 2] == pytest.approx(4 ** (2 / 3))  # geometric, a third of the way
    assert (usual_misses(known, []) == 1).all()


def test_an_adaptive_run_of_the_calibrated_kind_is_left_alone(pipe, recipe):
    """On a seed that was not calibrated nothing is added; had the calibration missed by a third as
    much, something would be.
    """
    known = recipe.statistics
    strict = dataclasses.replace(
        recipe, statistics=dataclasses.replace(known, misses=known.misses / 3)
    )
    refreshed = []
    for found, adaptive in (
        (recipe, None),
        (recipe, "batch"),
        (recipe, "sample"),
        (strict, "batch"),
        (strict, "sample"),
    ):
        with skip_cache(pipe, recipe=found, speedup=2.5, adaptive=adaptive):
            sample(pipe)
            refreshed.append(cache_stats(pipe).refreshed)
    assert refreshed[0] == refreshed[1] == refreshed[2] < min(refreshed[3:])


def test_refining_never_makes_it_worse_where_it_tries(pipe):
    """With changes tried by sampling, the plan is as good or better on the calls it was tried on,
    and has as many refreshes.
    """
    plain = calibrate(pipe, [call_of(10, 2)] * 2, speedups=(2.0,), probes=1)
    tried = calibrate(pipe, [call_of(10, 2)] * 2, speedups=(2.0,), probes=1, refine=4)
    tried = dataclasses.replace(tried, reuse_cost=plain.reuse_cost)  # timings differ
    sampler = Sampler(pipe, [call_of(10, 2)], 0)
    with skip_cache(pipe, interval=1):
        reference = sampler.uncached_sample(0)
        levels = [
            decibels(sampler.errors(0, reference, found.at(2.0)))[0] for found in (plain, tried)
        ]
    refreshes = [len(found.points[0].refresh_steps) for found in (plain, tried)]
    assert abs(refreshes[0] - refreshes[1]) <= 1  # a speedup in between may round either way
    if refreshes[0] == refreshes[1]:
        assert levels[1] >= levels[0] - 1e-6


def test_a_recipe_survives_its_files(pipe, recipe, tmp_path):
    """Applied from its folder, it samples bit-identically to the one in memory."""
    recipe.save_pretrained(tmp_path)
    with skip_cache(pipe, recipe=recipe, speedup=2.0):
        expected = sample(pipe)
    with skip_cache(pipe, recipe=str(tmp_path), speedup=2.0):
        assert torch.equal(sample(pipe), expected)
    assert Recipe.from_pretrained(tmp_path).points == recipe.points


@pytest.mark.parametrize(
    ("calls", "options", "message"),
    [
        ([call_of()], {}, "too few"),
        ([call_of(6), call_of(8), call_of(6)], {"speedups": (1.5,)}, "timesteps"),
        ([call_of(6)] * 2, {"speedups": (50.0,)}, "out of reach. The highest"),
        ([call_of(6)] * 2, {"speedups": (0.5,)}, "from 1"),
        ([call_of(6)] * 2, {"speedups": ()}, "empty"),
        ([call_of(6)] * 2, {"speedups": 2.0}, "Name several"),
        ([call_of(1)] * 2, {}, "make 1 steps. A cache needs at least three"),
        ([call_of(2)] * 2, {}, "make 2 steps"),
        ([call_of(6)] * 2, {"adapter": "nonsense"}, "nonsense"),
        ([call_of(6)] * 2, {"probes": 0}, "probes"),
        ([call_of(6)] * 2, {"refine": -1}, "refine"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(pipe, calls, options, message):
    """Each says what was wrong, and the pipeline is left uncached."""
    with pytest.raises(SkipCacheError, match=message):
        calibrate(pipe, calls, **{"probes": 1, **options})
    assert not is_skip_cached(pipe)
    assert type(pipe.scheduler) is DDIMScheduler


def test_a_bare_transformer_is_refused(pipe):
    """A recipe needs the scheduler, so a module alone says so at once."""
    with pytest.raises(ConfigError, match="pipeline"):
        calibrate(pipe.transformer, [call_of()] * 2)


@pytest.mark.parametrize("shared", [True, False])
def test_who_shares_a_generator_is_part_of_a_calibration(pipe, tmp_path, shared):
    """One that was stopped does not go on with calls that share a generator where they had their
    own, though these began alike; with the same it does.
    """

    def calls_with(is_shared):
        one, other = (torch.Generator().manual_seed(3) for _ in range(2))
        several = (one, one if is_shared else other)
        return [call_of(6, 2, generator=each) for each in several]

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    options = {"speedups": (1.5,), "probes": 1, "checkpoint": tmp_path / "kept"}
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, calls_with(shared), progress=stop, **options)
    with pytest.raises(RecipeFileError, match="another calibration"):
        calibrate(pipe, calls_with(not shared), **options)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, calls_with(shared), progress=stop, **options)


def test_sizes_are_looked_at_before_anything_is_sampled(pipe):
    """What the calls say themselves is compared at once, and one of a kind with its neighbours."""
    with pytest.raises(ConfigError, match=r"height \(64, 128\)"):
        calibrate(pipe, [call_of(height=64), call_of(), call_of(height=128)])
    runs = []
    with pytest.raises(ConfigError, match=r"num_inference_steps \(6, 8\)"):
        calibrate(pipe, [call_of(6), call_of(8)], progress=lambda done, _: runs.append(done))
    assert runs == []


@pytest.mark.parametrize(
    ("speedups", "message"),
    [
        (np.array([[1.5, 2.0]]), "Name several"),
        (np.array(2.0), "Name several"),
        (np.array([0.5]), "from 1"),
        ("2", "from 1"),
        ([True], "from 1"),
        ([float("nan")], "from 1"),
    ],
    ids=repr,
)
def test_speedups_that_are_none(pipe, speedups, message):
    """They are refused before anything is sampled, and never with numpy's own words."""
    runs = []
    with pytest.raises(ConfigError, match=message):
        calibrate(pipe, [call_of()] * 2, speedups=speedups, progress=lambda *_: runs.append(1))
    assert runs == []


def test_speedups_of_numpy(pipe):
    """An array and its elements serve like numbers."""
    calls = [call_of(6, 2)] * 2
    for speedups in (np.array([1.5, 2.0]), [np.float32(1.5), np.int64(2)], torch.tensor([1.5, 2])):
        recipe = calibrate(pipe, calls, speedups=speedups, probes=1)
        assert [point.speedup for point in recipe.points] == [1.5, 2.0]
        assert {type(point.speedup) for point in recipe.points} == {float}


def test_a_guessed_adapter_is_asked_again_after_a_stop(monkeypatch, tmp_path):
    """With adapter="auto" the recipe says how many layers there are, also where all that remained
    to be done was the judging.
    """
    monkeypatch.setattr(plugins, "_default", AdapterRegistry())
    pipe = pipelines.build("dit")
    calls = [{**pipelines.inputs_of("dit", seed=seed), "generator": None} for seed in (0, 1)]
    options = {"speedups": (1.0,), "probes": 1, "adapter": "auto"}
    file = tmp_path / "kept"
    whole = calibrate(pipe, calls, checkpoint=file, **options)
    assert whole.record.layers == pipelines.LAYERS
    resumed = calibrate(pipe, calls, checkpoint=file, **options)
    assert resumed.record == whole.record
