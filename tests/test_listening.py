"""Effects against runs of the schedulers by hand, over those of diffusers, and what calibration
makes of noise, sizes and stops.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

import pipelines
from skipcache import calibrate, plugins
from skipcache.cli import main
from skipcache.demo import load_pipeline
from skipcache.errors import ConfigError, RecipeFileError, RecipeWarning
from skipcache.plugins import AdapterRegistry
from skipcache.recipes.calibrate import Sampler, _followed
from skipcache.recipes.checkpoint import Checkpoint
from skipcache.recipes.listening import effects_of, listening
from skipcache.recipes.recipe import Recipe
from skipcache.recipes.statistics import OutputStatistics

STEPS = 6


def listened(scheduler, outputs=None, changed=None, by=0.0, **options):
    """A run of one scheduler by hand, [2, 3, 8, 8]; returns it and the outputs.

    Without ``outputs`` these lead to a sample within -1..1, as those of a model do, and so do not
    meet a clip.
    """
    draw = torch.Generator().manual_seed(0)
    aim = torch.randn(2, 3, 8, 8, generator=draw).clamp(-2, 2) / 4
    latents = torch.randn(2, 3, 8, 8, generator=draw)
    scheduler.set_timesteps(STEPS)
    torch.manual_seed(0)  # noise of the scheduler's own
    given, earlier = [], None
    alphas = getattr(scheduler, "alphas_cumprod", None)
    with listening(SimpleNamespace(scheduler=scheduler)) as heard:
        for step, timestep in enumerate(scheduler.timesteps):
            seen = latents
            if hasattr(scheduler, "scale_model_input"):
                seen = scheduler.scale_model_input(latents, timestep)
            if outputs is not None:
                output = outputs[step]
            elif alphas is None:
                output = latents - aim
            else:
                alpha = alphas[int(timestep)]
                output = (seen - alpha.sqrt() * aim) / (1 - alpha).sqrt()
            given.append(output)
            output = output + by * (step == changed)
            if isinstance(scheduler, diffusers.CogVideoXDPMScheduler):
                before = scheduler.timesteps[step - 1] if step else None
                made = scheduler.step(output, earlier, timestep, before, latents, **options)
                latents, earlier = tuple(made) if isinstance(made, tuple) else made.to_tuple()
            else:
                made = scheduler.step(output, timestep, latents, **options)
                latents = made[0] if isinstance(made, tuple) else made.prev_sample
    return heard, given


# With their own settings, clips included: the outputs above do not meet them.
SETTINGS = {
    "CogVideoXDDIMScheduler": [{}],
    "CogVideoXDPMScheduler": [{}],
    "DDIMParallelScheduler": [{}],
    "DDIMScheduler": [{}, {"clip_sample": False}, {"thresholding": True}],
    "DDPMScheduler": [{}, {"thresholding": True}],
    "DEISMultistepScheduler": [{}, {"thresholding": True}],
    "DPMSolverMultistepScheduler": [
        {},
        {"thresholding": True},
        {"algorithm_type": "sde-dpmsolver++"},
        {"solver_order": 3},
    ],
    "DPMSolverSinglestepScheduler": [{"lower_order_final": True}],
    "EulerAncestralDiscreteScheduler": [{}],
    "EulerDiscreteScheduler": [{}],
    "FlowMatchEulerDiscreteScheduler": [{}, {"shift": 3.0}, {"stochastic_sampling": True}],
    "FlowMatchHeunDiscreteScheduler": [{}],
    "HeunDiscreteScheduler": [{"clip_sample": True}],
    "LCMScheduler": [{"clip_sample": True}],
    "PNDMScheduler": [{}, {"skip_prk_steps": True}],
    "SASolverScheduler": [{}],
    "TCDScheduler": [{}],
    "UniPCMultistepScheduler": [{}, {"thresholding": True}],
}
CASES = [(name, settings) for name, several in SETTINGS.items() for settings in several]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda part: str(part).strip("{}"))
def test_effects_are_finite_differences(name, settings):
    """A scheduler run by hand, one output of which is moved a little, moves its last sample by the
    effect of that step.
    """
    kind = getattr(diffusers, name)
    heard, outputs = listened(kind(**settings))
    effects = effects_of(heard)
    assert len(effects) == len(outputs)
    assert np.ptp(effects) > 0
    for step, effect in enumerate(effects):
        more, less = (
            listened(kind(**settings), outputs, step, by)[0].sample.double()
            for by in (0.0005, -0.0005)
        )
        assert float((more - less).mean()) / 0.001 == pytest.approx(
            effect, rel=2e-3, abs=1e-4 * np.abs(effects).max()
        )


@pytest.mark.parametrize("return_dict", [True, False])
def test_what_the_step_before_returned_is_handed_on(return_dict):
    """CogVideoX's DPM solver is given its own last prediction, however it returned it, and no
    tensor of a step is kept beyond the next.
    """
    heard, _ = listened(diffusers.CogVideoXDPMScheduler(), return_dict=return_dict)
    kept = [value for bound in heard.calls for value in bound.arguments.values()]
    assert max(value.numel() for value in kept if isinstance(value, torch.Tensor)) == 1
    plain, _ = listened(diffusers.CogVideoXDPMScheduler())
    assert np.array_equal(effects_of(heard), effects_of(plain))


def test_noise_that_is_given_cancels():
    """Noise for the variance, handed in or drawn from a generator, is no part of an effect."""
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler = DDIMScheduler(clip_sample=False)
    given, _ = listened(scheduler, eta=1.0, variance_noise=noise)
    drawn, _ = listened(scheduler, eta=1.0, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(effects_of(given), effects_of(drawn))


class Own:
    """A scheduler of one's own, which returns an object with the sample in it, if at all."""

    timesteps = torch.tensor([900, 600, 300])

    def step(self, model_output, timestep, sample):
        return SimpleNamespace(prev_sample=sample - model_output * (timestep + 300) / 3000)


class Strange(Own):
    def step(self, velocity, timestep, sample):
        return super().step(velocity, timestep, sample)


def test_a_scheduler_of_ones_own():
    """One that knows nothing of diffusers is asked too; one whose arguments have other names is
    refused.
    """
    own, latents = Own(), torch.ones(1, 2)
    with listening(SimpleNamespace(scheduler=own)) as heard:
        for timestep in own.timesteps:
            latents = own.step(latents, timestep, latents).prev_sample
    assert effects_of(heard) == pytest.approx([-0.4, -0.3, -0.2])
    with (
        pytest.raises(ConfigError, match="Strange takes no 'model_output'"),
        listening(SimpleNamespace(scheduler=Strange())),
    ):
        pass


def test_a_step_that_cannot_be_replayed_warns():
    """A variance that the model learns has no place in a unit output: the spans stand in."""
    scheduler = DDPMScheduler(variance_type="learned_range")
    scheduler.set_timesteps(STEPS)
    latents = torch.ones(1, 2, 4, 4)
    with listening(SimpleNamespace(scheduler=scheduler)) as heard:
        for timestep in scheduler.timesteps:
            output = torch.zeros(1, 4, 4, 4)
            latents = scheduler.step(output, timestep, latents).prev_sample
    with pytest.warns(RecipeWarning, match="DDPMScheduler .* the time that each spans"):
        effects = effects_of(heard)
    assert effects == pytest.approx(-np.diff([*heard.times, 0.0]))


# Calibration.


class Flow:
    """A pipeline of one transformer, which does nothing, and a flow."""

    def __init__(self) -> None:
        self.transformer = nn.Identity()
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    def __call__(self, generator, size=4, steps=4, shift=None):
        several = generator if isinstance(generator, list) else [generator]
        latents = torch.cat([torch.randn(1, 2, size, size, generator=one) for one in several])
        if shift is not None:
            self.scheduler.set_shift(shift)
        self.scheduler.set_timesteps(steps)
        for timestep in self.scheduler.timesteps:
            output = self.transformer(latents).sin()
            latents = self.scheduler.step(output, timestep, latents).prev_sample


def call_of(steps: int = STEPS, **more) -> dict:
    call = {"class_labels": [1, 2], "guidance_scale": 2.0, "num_inference_steps": steps}
    return {**call, "output_type": "latent", **more}


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


def test_a_shared_generator_gives_each_call_noise_of_its_own():
    """Two generators of neighbouring seeds, each shared by three calls, give six samples, the same
    whenever they are asked for; the first of each is what one gets without calibration.
    """
    first, second = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    pipe, calls = Flow(), [{"generator": one} for one in (first, first, second, second, first)]
    sampler = Sampler(pipe, calls, 0, Checkpoint(None, ""))
    samples = [sampler.run(index).sample for index in range(5)]
    for one, other in itertools.combinations(samples, 2):
        assert not torch.allclose(one, other, atol=0.1)
    assert torch.equal(sampler.run(1).sample, samples[1])
    alone = Sampler(
        pipe, [{"generator": torch.Generator().manual_seed(1)}], 0, Checkpoint(None, "")
    )
    assert torch.equal(alone.run(0).sample, samples[2])


def test_a_generator_that_is_named_twice_in_a_call():
    """The call begins as it does without calibration, and the second sample has noise that
    follows.
    """
    pipe, own = Flow(), torch.Generator().manual_seed(7)
    with listening(pipe) as heard:
        pipe(generator=[own, own])
    own.manual_seed(7)
    sampler = Sampler(pipe, [{"generator": [own, own]}], 0, Checkpoint(None, ""))
    for _ in range(2):
        assert torch.equal(sampler.run(0).sample, heard.sample)


@pytest.mark.parametrize("shared", [True, False])
def test_who_shares_a_generator_is_part_of_a_calibration(pipe, tmp_path, shared):
    """One that was stopped does not go on with calls that share a generator where they had their
    own, though these began alike; with the same it does.
    """

    def calls_with(is_shared):
        one, other = (torch.Generator().manual_seed(3) for _ in range(2))
        return [call_of(generator=one), call_of(generator=one if is_shared else other)]

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


@pytest.mark.parametrize("shift", [None, 5.0])
@pytest.mark.parametrize("measured", [True, False])
def test_calls_of_other_sizes(shift, measured):
    """The size is what the message names, also where larger samples have other times; whether the
    call is one of those fitted or held out.
    """
    own = torch.Generator().manual_seed(0)
    calls = [{"generator": own}, {"generator": own, "size": 8, "shift": shift}]
    sampler = Sampler(Flow(), calls, 0, Checkpoint(None, ""))
    sampler.moments(0)
    with pytest.raises(ConfigError, match=r"call 1 makes samples of \(2, 8, 8\).*\(2, 4, 4\)"):
        (sampler.moments if measured else sampler.uncached_sample)(1)


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
    calls = [call_of()] * 2
    for speedups in (np.array([1.5, 2.0]), [np.float32(1.5), np.int64(2)], torch.tensor([1.5, 2])):
        recipe = calibrate(pipe, calls, speedups=speedups, probes=1)
        assert [point.speedup for point in recipe.points] == [1.5, 2.0]
        assert {type(point.speedup) for point in recipe.points} == {float}


def test_an_error_at_the_last_step_arrives_as_it_was_made(pipe):
    """Where each half of a doubled batch has noise of its own, what is made and what arrives are
    counted over the same samples: at the last step, which no model answers, they are equal.
    """
    own = pipe.scheduler
    pipe.scheduler = DDPMScheduler.from_config(own.config, clip_sample=False)
    try:
        sampler = Sampler(pipe, [call_of()], 0, Checkpoint(None, ""))
        found = sampler.moments(0)
        ones = np.ones(STEPS)
        known = OutputStatistics(sampler.times, found["covariance"], sampler.effects, ones, 1.0)
        carried, arrived = _followed(sampler, 0, STEPS - 1, known)["squares"]
        assert arrived == pytest.approx(carried, rel=1e-2)
        assert found["weight"].tolist() == [2]
        # Whatever becomes of the halves later on, they were the same to begin with.
        uneven = torch.arange(4.0).reshape(4, 1, 1, 1)
        heard = sampler.run(0, change=lambda step, output: output + uneven * (step == 3))
        assert len(heard.sample) == 2
    finally:
        pipe.scheduler = own


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


# The command.

COMMAND = ["calibrate", "demo", "--steps", "6", "--samples", "4", "--speedup", "1.5", "--device"]


def test_measurements_outlive_a_recipe_that_cannot_be_saved(tmp_path, monkeypatch, capsys):
    """They stay until the recipe is there, so that the next try goes on from them."""
    out = tmp_path / "recipe"
    command = [*COMMAND, "cpu", "--batch-size", "2", "--out", str(out)]
    save = Recipe.save_pretrained

    def fail(recipe, folder):
        raise RecipeFileError(f"{folder} cannot be written: no space left on device")

    monkeypatch.setattr(Recipe, "save_pretrained", fail)
    assert main(command) == 1
    assert "no space left" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["calibration.safetensors"]
    monkeypatch.setattr(Recipe, "save_pretrained", save)
    assert main(command) == 0
    assert {path.name for path in out.iterdir()} == {"recipe.json", "recipe.safetensors"}
    assert "Use it: apply_skip_cache" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "goes_on"), [("calibrate", True), ("explain", False)])
def test_ctrl_c_is_one_line(command, goes_on, monkeypatch, capsys):
    """No traceback; the exit status is that of an interrupt."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("skipcache.evaluation.bench.subjects.load_subject", interrupt)
    monkeypatch.setattr(Recipe, "from_pretrained", interrupt)
    assert main([command, "demo"]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert "stopped" in line
    assert ("same command goes on where it was" in line) == goes_on
