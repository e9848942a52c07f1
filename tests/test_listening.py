"""Effects against runs of the schedulers by hand, over those of diffusers."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from skipcache.errors import ConfigError, RecipeWarning
from skipcache.recipes.listening import effects_of, listening

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
