"""The sampler of a calibration: its noise, its sizes, and errors that are followed to the end."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from skipcache.demo import load_pipeline
from skipcache.errors import ConfigError
from skipcache.recipes.listening import listening
from skipcache.recipes.measure import followed
from skipcache.recipes.sampler import Sampler
from skipcache.recipes.statistics import OutputStatistics

STEPS = 6


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


def test_a_shared_generator_gives_each_call_noise_of_its_own():
    """Two generators of neighbouring seeds, each shared by three calls, give six samples, the same
    whenever they are asked for; the first of each is what one gets without calibration.
    """
    first, second = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    pipe, calls = Flow(), [{"generator": one} for one in (first, first, second, second, first)]
    sampler = Sampler(pipe, calls, 0)
    samples = [sampler.run(index).sample for index in range(5)]
    for one, other in itertools.combinations(samples, 2):
        assert not torch.allclose(one, other, atol=0.1)
    assert torch.equal(sampler.run(1).sample, samples[1])
    alone = Sampler(pipe, [{"generator": torch.Generator().manual_seed(1)}], 0)
    assert torch.equal(alone.run(0).sample, samples[2])


def test_a_generator_that_is_named_twice_in_a_call():
    """The call begins as it does without calibration, and the second sample has noise that
    follows.
    """
    pipe, own = Flow(), torch.Generator().manual_seed(7)
    with listening(pipe) as heard:
        pipe(generator=[own, own])
    own.manual_seed(7)
    sampler = Sampler(pipe, [{"generator": [own, own]}], 0)
    for _ in range(2):
        assert torch.equal(sampler.run(0).sample, heard.sample)


@pytest.mark.parametrize("shift", [None, 5.0])
@pytest.mark.parametrize("measured", [True, False])
def test_calls_of_other_sizes(shift, measured):
    """The size is what the message names, also where larger samples have other times; whether the
    call is one of those fitted or held out.
    """
    own = torch.Generator().manual_seed(0)
    calls = [{"generator": own}, {"generator": own, "size": 8, "shift": shift}]
    sampler = Sampler(Flow(), calls, 0)
    sampler.moments(0)
    with pytest.raises(ConfigError, match=r"call 1 makes samples of \(2, 8, 8\).*\(2, 4, 4\)"):
        (sampler.moments if measured else sampler.uncached_sample)(1)


def test_an_error_at_the_last_step_arrives_as_it_was_made():
    """Where each half of a doubled batch has noise of its own, what is made and what arrives are
    counted over the same samples: at the last step, which no model answers, they are equal.
    """
    pipe = load_pipeline()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    call = {"class_labels": [1, 2], "num_inference_steps": STEPS, "output_type": "latent"}
    sampler = Sampler(pipe, [{**call, "guidance_scale": 2.0}], 0)
    found = sampler.moments(0)
    ones = np.ones(STEPS)
    known = OutputStatistics(sampler.times, found["covariance"], sampler.effects, ones, 1.0)
    carried, arrived = followed(sampler, 0, STEPS - 1, known)["squares"]
    assert arrived == pytest.approx(carried, rel=1e-2)
    assert found["weight"].tolist() == [2]
    # Whatever becomes of the halves later on, they were the same to begin with.
    uneven = torch.arange(4.0).reshape(4, 1, 1, 1)
    heard = sampler.run(0, change=lambda step, output: output + uneven * (step == 3))
    assert len(heard.sample) == 2
