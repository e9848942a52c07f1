"""Class-to-video Latte: the model (against the reference: test_golden.py), and its pipeline."""

from __future__ import annotations

import inspect
import io
import re
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import export_to_gif

from pipelines import tiny_vae
from skipcache import SkipCacheError
from skipcache.latte_class import LatteClassPipeline, LatteClassTransformer3DModel

FRAMES, CLASSES, STEPS = 3, 5, 4
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "video_length": FRAMES,
    "num_classes": CLASSES,
}


def model_of(**changes) -> LatteClassTransformer3DModel:
    """Tiny; its random modulation leaves every gate open."""
    torch.manual_seed(0)
    return LatteClassTransformer3DModel(**{**SIZES, **changes}).eval()


def video(batch: int = 2, frames: int = FRAMES, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, frames, 8, 8, generator=draw)


def pipe_of(scheduler=None, blocks: int = 2, **changes) -> LatteClassPipeline:
    scheduler = DDIMScheduler(clip_sample=False) if scheduler is None else scheduler
    pipe = LatteClassPipeline(model_of(**changes), tiny_vae(blocks=blocks), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe: LatteClassPipeline, **changes) -> torch.Tensor:
    """The latents that a call ends with."""
    options = {"generator": torch.Generator().manual_seed(0), "class_labels": [1, 3]}
    options |= {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
    return pipe(**{**options, **changes})[0]


# The model.


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_each_video_of_a_batch_is_its_own(frames):
    """Videos of a batch do not mix, with as many frames as the model has or fewer."""
    model, x = model_of(), video(frames=frames)
    t, y = torch.tensor([900, 100]), torch.tensor([1, 4])
    together = model(x, t, y).sample
    assert together.shape == x.shape
    for i in range(2):
        alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1]).sample
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_time_is_attended_over_and_has_positions():
    """A change of the last frame reaches the first, and equal frames get different outputs."""
    model = model_of()
    x = video(1, frames=1).expand(-1, -1, FRAMES, -1, -1).clone()
    t, y = torch.tensor([500]), torch.tensor([1])
    same = model(x, t, y).sample
    assert not torch.allclose(same[:, :, 0], same[:, :, 1], rtol=1e-2)
    x[:, :, -1] += 1.0
    assert not torch.allclose(model(x, t, y).sample[:, :, 0], same[:, :, 0], rtol=1e-2)


@torch.no_grad()
def test_layout_between_layers():
    """Every block, spatial or temporal, takes and returns [B·F, N, C]."""
    model, shapes = model_of(), []
    for block in (*model.transformer_blocks, *model.temporal_transformer_blocks):
        block.register_forward_hook(lambda m, args, out: shapes.append((args[0].shape, out.shape)))
    model(video(), 500, torch.tensor([0, 1]))
    assert shapes == [((2 * FRAMES, 16, 16),) * 2] * 6


@torch.no_grad()
@pytest.mark.parametrize("timestep", [700, 700.0, torch.tensor(700), torch.tensor([700])])
def test_one_timestep_for_all(timestep):
    """A single timestep, number or tensor, stands for the whole batch."""
    model, y = model_of(), torch.tensor([0, 1])
    expected = model(video(), torch.tensor([700, 700]), y).sample
    assert torch.equal(model(video(), timestep, y).sample, expected)
    assert torch.equal(model(video(), timestep, y, return_dict=False)[0], expected)


@torch.no_grad()
def test_conditions_matter():
    """Timestep and class change the output; an unconditional model takes no class."""
    model, x = model_of(), video(1)
    base = model(x, 500, torch.tensor([1])).sample
    assert not torch.allclose(model(x, 600, torch.tensor([1])).sample, base, rtol=1e-2)
    assert not torch.allclose(model(x, 500, torch.tensor([2])).sample, base, rtol=1e-2)
    for num_classes in (None, 0):
        unconditional = model_of(num_classes=num_classes)
        assert unconditional.null_class is None
        assert not [key for key in unconditional.state_dict() if key.startswith("class_embedder")]
        assert torch.isfinite(unconditional(x, 500).sample).all()


@torch.no_grad()
def test_labels_are_dropped_in_training_only():
    """In training mode a label becomes the null class as often as configured; else never."""
    model, x = model_of(class_dropout_prob=1.0), video(1)
    null = model(x, 500, torch.tensor([model.null_class])).sample
    label = torch.tensor([1])
    assert not torch.equal(model(x, 500, label).sample, null)
    assert torch.equal(model.train()(x, 500, label).sample, null)
    assert model_of(class_dropout_prob=0.0).null_class is None


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    """Cast, it computes and answers in the type of its weights."""
    model, y = model_of(), torch.tensor([0, 1])
    expected = model(video(), 500, y).sample
    found = model.to(dtype)(video().to(dtype), 500, y).sample
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)


def test_gradient_checkpointing():
    """With checkpointing the gradients are the same, and blocks run again for them."""
    model, runs = model_of(), []
    model.transformer_blocks[1].register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients():
        model.zero_grad()
        model(video(), 500, torch.tensor([0, 1])).sample.square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    assert len(runs) == 1
    model.enable_gradient_checkpointing()
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert len(runs) == 3


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    """Configuration, weights and position embeddings survive the disk."""
    model = model_of(out_channels=8)
    model.temp_pos_embed += 0.5  # of a checkpoint whose embeddings are not ours
    model.pos_embed.pos_embed += 0.5
    model.save_pretrained(tmp_path)
    loaded = LatteClassTransformer3DModel.from_pretrained(tmp_path)
    assert dict(loaded.config)["video_length"] == FRAMES
    inputs = (video(), 500, torch.tensor([0, 1]))
    assert torch.equal(loaded(*inputs).sample, model(*inputs).sample)


@pytest.mark.parametrize(
    ("changes", "inputs", "message"),
    [
        ({}, (video(frames=4), 1, torch.tensor([0, 1])), "4 frames.*1 to 3"),
        ({}, (video(frames=0), 1, torch.tensor([0, 1])), "0 frames"),
        ({}, (video()[..., :6], 1, torch.tensor([0, 1])), r"\(2, 4, 3, 8, 6\).*\[B, 4, F, 8, 8\]"),
        ({}, (video()[:, :3], 1, torch.tensor([0, 1])), r"\(2, 3, 3, 8, 8\)"),
        ({}, (video()[:, :, 0], 1, torch.tensor([0, 1])), r"\(2, 4, 8, 8\)"),
        ({}, (video(), 1, torch.tensor([0, 6])), r"\[6\] do not exist.*0 to 4 \(5 for no class\)"),
        ({}, (video(), 1, torch.tensor([-1, 0])), r"\[-1\] do not exist"),
        ({}, (video(), 1, torch.tensor([0])), r"\(1,\) of torch.int64.*2 integers"),
        ({}, (video(), 1, torch.tensor([0.0, 1.0])), "torch.float32"),
        ({}, (video(), 1, None), "class_labels are None.*2 integers from 0 to 4"),
        ({"class_dropout_prob": 0.0}, (video(), 1, torch.tensor([0, 5])), r"\[5\].*0 to 4\."),
        ({"num_classes": None}, (video(), 1, torch.tensor([0, 1])), "unconditional"),
    ],
)
def test_bad_input(changes, inputs, message):
    """Latents or labels that the model was not made for are refused by name and number."""
    with pytest.raises(SkipCacheError, match=message):
        model_of(**changes)(*inputs)


def test_patches_must_tile():
    """A size that is no multiple of the patch is refused at construction."""
    with pytest.raises(SkipCacheError, match="sample_size=9 is not a multiple of patch_size=2"):
        model_of(sample_size=9)


# The pipeline.

SCHEDULERS = (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)


@torch.no_grad()
def by_hand(pipe: LatteClassPipeline, guidance_scale: float = 1.0, **step_options) -> torch.Tensor:
    """The sampling loop written out, one transformer call for each guidance pass."""
    model, scheduler = pipe.transformer, pipe.scheduler
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(2, 4, FRAMES, 8, 8, generator=generator) * scheduler.init_noise_sigma
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_options["generator"] = generator
    takes_both = scheduler.config.get("variance_type") == "learned_range"
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(latents, t)
        output = model(x, t, torch.tensor([1, 3])).sample
        noise, variance = output[:, :4], output[:, 4:]
        if guidance_scale > 1:
            null = model(x, t, torch.tensor([CLASSES, CLASSES])).sample[:, :4]
            noise = null + guidance_scale * (noise - null)
        prediction = torch.cat([noise, variance], dim=1) if takes_both else noise
        latents = scheduler.step(prediction, t, latents, **step_options).prev_sample
    return latents


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("out_channels", [4, 8], ids=["fixed-variance", "learned-variance"])
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_samples_as_the_loop_written_out(scheduler, out_channels, guidance_scale):
    """Under every scheduler the videos are those of a plain loop, guided or not, learned variance
    left aside.
    """
    pipe = pipe_of(scheduler(), out_channels=out_channels)
    found = latents_of(pipe, guidance_scale=guidance_scale)
    expected = by_hand(pipe, guidance_scale)
    # Two passes and one of twice the batch differ in the last bits, which solvers amplify.
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found, latents_of(pipe, guidance_scale=2.0), atol=1e-2)


def test_learned_variance_reaches_ddpm():
    """DDPM with a learned range gets the unguided variance of the conditional pass beside the
    noise.
    """
    options = {"variance_type": "learned_range", "clip_sample": False}
    pipe = pipe_of(DDPMScheduler(**options), out_channels=8)
    found = latents_of(pipe, guidance_scale=3.0)
    torch.testing.assert_close(found, by_hand(pipe, 3.0), atol=1e-4, rtol=1e-4)
    pipe.scheduler = DDPMScheduler(clip_sample=False)
    assert not torch.allclose(latents_of(pipe, guidance_scale=3.0), found, rtol=1e-2)


def test_variance_setting_left_over_in_a_configuration():
    """A scheduler built from DDPM's configuration that knows no learned variance gets none."""
    config = DDPMScheduler(variance_type="learned_range").config
    pipe = pipe_of(EulerDiscreteScheduler.from_config(config), out_channels=8)
    assert pipe.scheduler.config.variance_type == "learned_range"
    assert latents_of(pipe).shape == (2, 4, FRAMES, 8, 8)


def test_eta_reaches_ddim():
    """η makes DDIM draw noise, from the given generator."""
    pipe = pipe_of()
    found = latents_of(pipe, eta=1.0)
    torch.testing.assert_close(found, by_hand(pipe, eta=1.0), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, latents_of(pipe, eta=0.0), rtol=1e-2)


def test_output_types(tmp_path):
    """Frames as tensors, arrays or pictures are the same videos, ready to be exported."""
    pipe = pipe_of()

    def frames(kind):
        return pipe(
            [1, 3],
            num_inference_steps=2,
            output_type=kind,
            generator=torch.Generator().manual_seed(0),
        ).frames

    tensors, arrays, pictures = frames("pt"), frames("np"), frames("pil")
    assert tensors.shape == (2, FRAMES, 3, 16, 16)
    assert arrays.shape == (2, FRAMES, 16, 16, 3)
    assert torch.equal(tensors.permute(0, 1, 3, 4, 2), torch.from_numpy(arrays))
    assert 0 <= arrays.min() < arrays.max() <= 1
    assert [len(video) for video in pictures] == [FRAMES, FRAMES]
    assert pictures[0][0].size == (16, 16)
    assert abs(pictures[1][2].getpixel((3, 5))[0] / 255 - arrays[1, 2, 5, 3, 0]) < 0.01
    path = export_to_gif(pictures[0], str(tmp_path / "video.gif"))
    assert Path(path).stat().st_size > 0


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_decodes_in_chunks(chunk):
    """However many frames are decoded at a time, the videos are the same."""
    pipe, sizes = pipe_of(), []
    latents = video()
    expected = torch.stack(
        [pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample for x in latents.unbind(2)],
        dim=2,
    )
    pipe.vae.decoder.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    torch.testing.assert_close(pipe.decode_latents(latents, chunk), expected, atol=1e-5, rtol=1e-5)
    assert max(sizes) == min(chunk, 2 * FRAMES)


@pytest.mark.parametrize("labels", [3, (3,), torch.tensor(3), torch.tensor([3])])
def test_labels_of_any_form(labels):
    """A number, a tuple and a tensor say the same as a list."""
    pipe = pipe_of()
    expected = latents_of(pipe, class_labels=[3])
    assert torch.equal(latents_of(pipe, class_labels=labels), expected)
    assert not torch.equal(latents_of(pipe, class_labels=[2]), expected)


def test_several_videos_of_a_label():
    """Videos of one label follow each other, and a list of generators gives each its own noise."""
    pipe = pipe_of()

    def generators(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    found = latents_of(pipe, num_videos_per_label=2, generator=generators(range(4)))
    assert found.shape[0] == 4
    for i, label in enumerate([1, 1, 3, 3]):
        alone = latents_of(pipe, class_labels=label, generator=generators([i])[0])
        torch.testing.assert_close(found[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_unconditional():
    """A model without classes samples as many videos as asked for."""
    pipe = pipe_of(num_classes=None)
    found = latents_of(pipe, class_labels=None, num_videos_per_label=3)
    assert found.shape == (3, 4, FRAMES, 8, 8)
    assert torch.isfinite(found).all()


def test_fewer_frames_and_given_latents():
    """A shorter video, and one from given noise, which is scaled as the scheduler wants it."""
    pipe = pipe_of(EulerDiscreteScheduler())
    assert latents_of(pipe, video_length=2).shape[2] == 2
    noise = torch.randn(2, 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(latents_of(pipe, latents=noise), latents_of(pipe))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, HeunDiscreteScheduler])
def test_progress_bar_counts_steps(scheduler):
    """The bar counts steps, not calls, and ends full."""
    pipe, written = pipe_of(scheduler()), io.StringIO()
    pipe.set_progress_bar_config(disable=False, file=written, mininterval=0, ascii=True)
    latents_of(pipe)
    assert re.search(rf"100%.* {STEPS}/{STEPS} ", written.getvalue())


def test_callback_sees_and_changes_latents():
    """The callback is called after each step, its latents are taken over, and it may interrupt."""
    pipe, seen = pipe_of(), []

    def zero_at_last(pipe, i, t, tensors):
        seen.append((i, int(t), tensors["latents"].shape))
        if i == STEPS - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    assert latents_of(pipe, callback_on_step_end=zero_at_last).abs().max() == 0
    shape = (2, 4, FRAMES, 8, 8)
    assert seen == [(i, int(t), shape) for i, t in enumerate(pipe.scheduler.timesteps)]
    assert pipe.num_timesteps == STEPS

    def stop(pipe, i, t, tensors):
        seen.append(i)
        pipe._interrupt = True
        return tensors

    seen.clear()
    latents_of(pipe, callback_on_step_end=stop)
    assert seen == [0]


def test_pipeline_saved_and_loaded(tmp_path):
    """A saved pipeline is found again by its class names and samples the same videos."""
    pipe = pipe_of(out_channels=8)
    expected = latents_of(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = LatteClassPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is LatteClassTransformer3DModel
    assert torch.equal(latents_of(loaded), expected)
    half = LatteClassPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert latents_of(half).dtype == torch.bfloat16
    frames = half(1, num_inference_steps=1, output_type="np").frames
    assert frames.shape == (1, FRAMES, 16, 16, 3)


LEARNED = {"variance_type": "learned_range"}


@pytest.mark.parametrize(
    ("changes", "call", "message"),
    [
        ({}, {"class_labels": None}, "class_labels are missing. Pass integers from 0 to 4, or 5"),
        ({}, {"class_labels": [1, 6]}, "class label 6 does not exist"),
        ({}, {"class_labels": -1}, "class label -1"),
        ({}, {"class_labels": [1.5]}, r"class label 1\.5"),
        ({}, {"class_labels": "13"}, "class label '1'"),
        ({}, {"class_labels": []}, "class_labels are empty"),
        ({"num_classes": None}, {"class_labels": [1]}, "unconditional"),
        ({"num_classes": None}, {"class_labels": None, "guidance_scale": 4.0}, "no null class"),
        ({"class_dropout_prob": 0.0}, {"guidance_scale": 4.0}, "no null class"),
        ({}, {"video_length": 4}, "video_length=4.*1 to 3"),
        ({}, {"video_length": 0}, "video_length=0"),
        ({}, {"height": 32}, "height=32, width=16.*16 by 16"),
        ({}, {"num_videos_per_label": 0}, "num_videos_per_label=0"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps=0"),
        ({}, {"decode_chunk_size": 0}, "decode_chunk_size=0"),
        ({}, {"output_type": "mp4"}, "output_type='mp4'"),
        ({}, {"latents": video(1)}, r"\(1, 4, 3, 8, 8\).*\(2, 4, 3, 8, 8\)"),
        ({}, {"generator": [torch.Generator()]}, "1 generators for 2 videos"),
        ({}, {"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\] do not exist"),
        ({"scheduler": DDPMScheduler(**LEARNED)}, {}, "predicts no variance"),
        (
            {"scheduler": DPMSolverMultistepScheduler(**LEARNED), "out_channels": 8},
            {},
            "keeps three channels.*variance_type=.*None",
        ),
    ],
)
def test_bad_call(changes, call, message):
    """What model or scheduler cannot serve is refused before the transformer is called."""
    pipe, calls = pipe_of(**changes), []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(SkipCacheError, match=message):
        latents_of(pipe, **call)
    assert not calls
