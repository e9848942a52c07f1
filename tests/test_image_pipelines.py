"""Image pipelines of diffusers, each with its own scheduler and passes of guidance, through their
adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    BriaPipeline,
    ChromaPipeline,
    CogView4Pipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2Pipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxPipeline,
    HiDreamImagePipeline,
    LongCatImagePipeline,
    Lumina2Pipeline,
    OvisImagePipeline,
    PixArtSigmaPipeline,
    PRXPipeline,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    ZImagePipeline,
)
from diffusers.callbacks import SD3CFGCutoffCallback
from PIL import Image
from torch import nn

from pipelines import ALWAYS_OPEN, surroundings
from skipcache import (
    apply_skip_cache,
    cache_stats,
    is_skip_cached,
    remove_skip_cache,
    skip_cache_run,
)
from skipcache.errors import NotCachingWarning
from skipcache.plugins import resolve_backbone
from skipcache.runtime.controller import controller_of
from tiny import TINY, enliven, randn

STEPS = 7
PLAN = "FrrFrrF"
ALWAYS = {0: 0, 1: 0, 2: 0, 3: 3, 4: 3, 5: 3, 6: 6}  # the step that each one's feature is of


# What the pipelines are made of


def model_of(name: str, **changes: Any) -> nn.Module:
    """The tiny transformer of that class, with some of its configuration changed."""
    model = TINY[name].make()
    return enliven(type(model).from_config({**model.config, **changes})) if changes else model


def kl_vae(blocks: int = 1, latent_channels: int = 4) -> AutoencoderKL:
    """A latent has the size of its image, halved by each block after the first."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=latent_channels,
        shift_factor=0.0,
    ).eval()


one_channel = partial(kl_vae, latent_channels=1)  # 2x2 latents make a token of four
flow = FlowMatchEulerDiscreteScheduler
# As the kin of Flux have it: the larger the picture, the more steps at high noise.
shifting_flow = partial(flow, use_dynamic_shifting=True, shift=3.0)


def made(
    kind: type,
    transformer: str,
    scheduler: Callable[[], Any] = shifting_flow,
    vae: Callable[[], nn.Module] = kl_vae,
    encoders: tuple[str, ...] = ("",),
    changes: dict[str, Any] | None = None,
    **others: Callable[[], Any],
) -> Callable[[], Any]:
    """A function that makes the pipeline, without encoders: the prompts are embedded already."""

    def make() -> Any:
        return kind(
            transformer=model_of(transformer, **(changes or {})),
            scheduler=scheduler(),
            vae=vae(),
            **{f"tokenizer{suffix}": None for suffix in encoders},
            **{f"text_encoder{suffix}": None for suffix in encoders},
            **{name: other() for name, other in others.items()},
        )

    return make


def flux_controlnet(layers: int, single_layers: int, **options: Any) -> Callable[[], Any]:
    """With all weights of the ControlNet drawn: a new one says nothing."""

    def net() -> nn.Module:
        config = dict(model_of("FluxTransformer2DModel").config)
        config |= {"num_layers": layers, "num_single_layers": single_layers, **options}
        return enliven(FluxControlNetModel.from_config(config), seed=1)

    return made(
        FluxControlNetPipeline,
        "FluxTransformer2DModel",
        vae=partial(one_channel, 4),
        encoders=("", "_2"),
        controlnet=net,
    )


def sana_vae() -> AutoencoderDC:
    kinds, sizes, scales = ("ResBlock", "EfficientViTBlock"), (8, 8), ((), (5,))
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=sizes,
        decoder_block_out_channels=sizes,
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    ).eval()


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def flux2_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=4,
    ).eval()


def hidream() -> HiDreamImagePipeline:
    unipc = partial(UniPCMultistepScheduler, prediction_type="flow_prediction")
    pipe = made(
        HiDreamImagePipeline,
        "HiDreamImageTransformer2DModel",
        partial(unipc, use_flow_sigmas=True, flow_shift=3.0),
        encoders=("", "_2", "_3", "_4"),
    )()
    pipe.default_sample_size = 8  # every picture is scaled to that area
    return pipe


class EmbeddedLongCatImagePipeline(LongCatImagePipeline):
    """Its own cannot do with embeddings alone: it counts the prompts, of which there are none."""

    def encode_prompt(self, prompt=None, num_images_per_prompt=1, prompt_embeds=None):
        return super().encode_prompt(
            [""] * len(prompt_embeds), num_images_per_prompt, prompt_embeds
        )


# What they are called with

TEXT, WIDTH = 5, 12


def prompts(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A tensor of each shape for the prompt and another for what it is to avoid."""
    drawn = {}
    for seed, sign in ((100, ""), (200, "negative_")):
        for offset, (name, shape) in enumerate(shapes.items()):
            drawn[sign + name] = randn(seed + offset, *shape)
    return drawn


def masks(dtype: torch.dtype, name: str = "prompt_attention_mask") -> dict[str, torch.Tensor]:
    """The last token of the prompt and the last two of the other are padding."""
    ones = torch.ones(1, TEXT, dtype=dtype)
    prompt, negative = ones.clone(), ones.clone()
    prompt[:, -1:], negative[:, -2:] = 0, 0
    return {name: prompt, f"negative_{name}": negative}


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


EMBEDS = prompts(prompt_embeds=(1, TEXT, WIDTH))
POOLED = prompts(prompt_embeds=(1, TEXT, WIDTH), pooled_prompt_embeds=(1, 8))
CONTROL = {**square(64), **POOLED, "control_image": randn(3, 1, 3, 64, 64).sigmoid()}
UNBINNED = {"use_resolution_binning": False}
CLEAN = {**UNBINNED, "clean_caption": False, "negative_prompt": None, **masks(torch.long)}
LLAMA = prompts(
    prompt_embeds_t5=(1, TEXT, WIDTH),
    prompt_embeds_llama3=(4, 1, TEXT, 10),
    pooled_prompt_embeds=(1, 8),
)
TRUE_GUIDANCE, NO_TRUE_GUIDANCE = {"true_cfg_scale": 2.0}, {"true_cfg_scale": 1.0}

NAMED = ("cond", "uncond")
UNNAMED = ("0", "1")
ONE = ("0",)  # no guidance but a distilled one, or both passes in one batch


@dataclass(frozen=True)
class Case:
    """A pipeline, what to call it with, and the passes of a step by the names that the cache gives
    them.

    ``unguided``: what changes in a call without guidance; None where there never is any.
    """

    make: Callable[[], Any]
    call: dict[str, Any]
    passes: tuple[str, ...]
    unguided: dict[str, Any] | None = field(default_factory=lambda: {"guidance_scale": 1.0})


flux = made(
    FluxPipeline,
    "FluxTransformer2DModel",
    vae=one_channel,
    encoders=("", "_2"),
    changes={"guidance_embeds": True},
)
PIPELINES = {
    "flux": Case(flux, {**square(8), **POOLED}, ("cond",), unguided=None),
    "flux_guided": Case(flux, {**square(8), **POOLED, **TRUE_GUIDANCE}, NAMED, NO_TRUE_GUIDANCE),
    # Two residuals for three blocks of each kind: the first serves two of them.
    "flux_controlnet": Case(
        flux_controlnet(2, 2), {**CONTROL, **TRUE_GUIDANCE}, UNNAMED, NO_TRUE_GUIDANCE
    ),
    "flux_controlnet_each": Case(flux_controlnet(3, 3), CONTROL, ONE, unguided=None),
    # This one looks at the picture itself, and its residuals are taken in turn.
    "flux_controlnet_repeating": Case(
        flux_controlnet(2, 0, conditioning_embedding_channels=1, patch_size=2),
        CONTROL,
        ONE,
        unguided=None,
    ),
    "sd3": Case(
        made(
            StableDiffusion3Pipeline,
            "SD3Transformer2DModel",
            partial(flow, shift=3.0),
            encoders=("", "_2", "_3"),
        ),
        {**square(8), **POOLED, "guidance_scale": 3.0},
        ONE,
    ),
    "pixart_sigma": Case(
        made(PixArtSigmaPipeline, "PixArtTransformer2DModel", DPMSolverMultistepScheduler),
        {**square(8), **EMBEDS, **CLEAN},
        ONE,
    ),
    "sana": Case(
        made(
            SanaPipeline,
            "SanaTransformer2DModel",
            partial(
                DPMSolverMultistepScheduler,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=3.0,
            ),
            sana_vae,
        ),
        {**square(32), **EMBEDS, **CLEAN},
        ONE,
    ),
    "qwen_image": Case(
        made(
            QwenImagePipeline,
            "QwenImageTransformer2DModel",
            partial(shifting_flow, shift_terminal=0.02),
            qwen_vae,
        ),
        {**square(16), **EMBEDS, **masks(torch.long, "prompt_embeds_mask"), **TRUE_GUIDANCE},
        NAMED,
        NO_TRUE_GUIDANCE,
    ),
    "chroma": Case(
        made(ChromaPipeline, "ChromaTransformer2DModel", flow, one_channel),
        {**square(8), **EMBEDS, **masks(torch.bool)},
        UNNAMED,
    ),
    "z_image": Case(
        made(ZImagePipeline, "ZImageTransformer2DModel", partial(flow, shift=3.0)),
        {**square(8), **{name: list(embeds) for name, embeds in EMBEDS.items()}},
        ONE,
        unguided={"guidance_scale": 0.0},
    ),
    "lumina2": Case(
        made(Lumina2Pipeline, "Lumina2Transformer2DModel", partial(flow, shift=6.0)),
        {**square(64), **EMBEDS, **masks(torch.bool)},  # always eight pixels to a latent
        UNNAMED,
    ),
    "auraflow": Case(
        made(AuraFlowPipeline, "AuraFlowTransformer2DModel", partial(flow, shift=1.73)),
        {**square(8), **EMBEDS, **masks(torch.long)},
        ONE,
    ),
    "flux2": Case(
        made(Flux2Pipeline, "Flux2Transformer2DModel", vae=flux2_vae),
        {**square(8), "prompt_embeds": EMBEDS["prompt_embeds"]},
        ONE,
        unguided=None,
    ),
    "cogview4": Case(
        made(
            CogView4Pipeline,
            "CogView4Transformer2DModel",
            partial(shifting_flow, base_shift=0.25, max_shift=0.75, time_shift_type="linear"),
            partial(kl_vae, 2),
        ),
        {**square(16), **EMBEDS},
        NAMED,
    ),
    "hidream": Case(hidream, {**square(8), **LLAMA}, ONE),
    "prx": Case(
        made(PRXPipeline, "PRXTransformer2DModel", partial(flow, shift=3.0)),
        {**square(8), **EMBEDS, **masks(torch.bool), **UNBINNED},
        ONE,
    ),
    "bria": Case(
        made(BriaPipeline, "BriaTransformer2DModel", vae=one_channel),
        {**square(8), **EMBEDS},
        ONE,
    ),
    "ovis_image": Case(
        made(OvisImagePipeline, "OvisImageTransformer2DModel", vae=one_channel),
        {**square(8), **EMBEDS, "negative_prompt": None},
        NAMED,
    ),
    "longcat_image": Case(
        made(
            EmbeddedLongCatImagePipeline,
            "LongCatImageTransformer2DModel",
            vae=partial(kl_vae, latent_channels=16),
            changes={"in_channels": 64},
            text_processor=lambda: None,
        ),
        {**square(8), **EMBEDS, "enable_prompt_rewrite": False},
        NAMED,
    ),
}
GUIDED = [name for name, case in PIPELINES.items() if case.unguided is not None]

on_every_pipeline = pytest.mark.parametrize("name", PIPELINES)


def build(name: str) -> Any:
    torch.manual_seed(0)
    pipe = PIPELINES[name].make()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cached(name: str, interval: int = 3) -> Any:
    return apply_skip_cache(build(name), interval=interval, window=ALWAYS_OPEN, estimator="hold")


def sample(pipe: Any, name: str, **changes: Any) -> torch.Tensor:
    """The latents that a call of the pipeline ends with."""
    torch.manual_seed(0)
    options = {
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "return_dict": False,
        "generator": torch.Generator().manual_seed(0),
    }
    latents = pipe(**options, **{**PIPELINES[name].call, **changes})[0]
    assert torch.isfinite(latents).all()
    return latents


@cache
def plain(name: str) -> torch.Tensor:
    """What a fresh pipeline gives without a cache."""
    return sample(build(name), name)


class Watch:
    """Sees what truly happens at the layer where reuse resumes.

    ``sources`` has, for each pass (told by its prompt, numbered in the order of their first calls),
    the step whose deep feature each of its steps went on with. ``strays`` are the reuses of another
    pass's.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sources: list[dict[int, int]] = []
        self.strays: list[tuple[int, int]] = []
        self._step = -1
        self._latents: torch.Tensor | None = None
        self._prompts: list[torch.Tensor] = []
        self._seen: list[tuple[int, int, torch.Tensor]] = []
        path = resolve_backbone(model, None).lists[-1].path
        last = list(model.get_submodule(path)._modules.values())[-1]
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        last.register_forward_pre_hook(self._resume, with_kwargs=True)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = {**dict(enumerate(args)), **kwargs}
        latents = given.get("hidden_states", given.get(0))[0]
        if self._latents is None or not torch.equal(latents, self._latents):
            self._step, self._latents = self._step + 1, latents.clone()
        names = ("encoder_hidden_states", "encoder_hidden_states_t5", 2)  # Z-Image's by position
        prompt = next(given[name] for name in names if name in given)
        prompt = torch.stack(prompt) if isinstance(prompt, list) else prompt
        matches = [i for i, known in enumerate(self._prompts) if _is_same(known, prompt)]
        if not matches:
            self._prompts.append(prompt)
            self.sources.append({})
        self._pass = matches[0] if matches else len(self._prompts) - 1

    def _resume(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        deep = kwargs.get("hidden_states", args[0] if args else None)
        for owner, step, earlier in self._seen:
            if _is_same(earlier, deep):
                if owner != self._pass:
                    self.strays.append((owner, self._pass))
                self.sources[self._pass][self._step] = step
                return
        self._seen.append((self._pass, self._step, deep.clone()))
        self.sources[self._pass][self._step] = self._step


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def plans_of(watch: Watch) -> list[str]:
    return [
        "".join("F" if step == source else "r" for step, source in taken.items())
        for taken in watch.sources
    ]


# A run as it usually is


@on_every_pipeline
def test_plan_of_every_pass(name):
    """Each pass of guidance has a cache of its own, refreshed as scheduled, and goes on with
    nothing but what itself computed at its last refresh.
    """
    pipe = cached(name)
    watch = Watch(pipe.transformer)
    sample(pipe, name)
    passes = PIPELINES[name].passes
    plans = {key: stream.plan for key, stream in cache_stats(pipe).streams.items()}
    assert plans == dict.fromkeys(passes, PLAN)
    assert watch.strays == []
    assert watch.sources == [ALWAYS] * len(passes)


@on_every_pipeline
def test_reuse_is_visible_and_repeatable(name):
    """The output differs from the uncached one, and the same seed gives the same bits again."""
    pipe = cached(name)
    first = sample(pipe, name)
    assert not torch.allclose(first, plain(name), rtol=1e-2)
    assert torch.equal(sample(pipe, name), first)


@on_every_pipeline
def test_never_reusing_is_bit_identical(name):
    """A cache that refreshes at every step changes no bit of the output."""
    pipe = cached(name, interval=1)
    assert torch.equal(sample(pipe, name), plain(name))
    assert cache_stats(pipe).plan == "F" * STEPS


@on_every_pipeline
def test_remove_restores_the_pipeline(name):
    """After removing, the same objects without an attribute of the cache give the same bits as
    before.
    """
    pipe = build(name)
    expected = sample(pipe, name)
    before = surroundings(pipe)
    apply_skip_cache(pipe, interval=3, window=ALWAYS_OPEN, estimator="hold")
    sample(pipe, name)
    assert "step" in vars(pipe.scheduler)
    assert surroundings(pipe) != before
    assert remove_skip_cache(pipe) is True
    assert surroundings(pipe) == before
    assert not {"step", "cache_context"} & {*vars(pipe.scheduler), *vars(pipe.transformer)}
    assert not is_skip_cached(pipe)
    assert torch.equal(sample(pipe, name), expected)


@on_every_pipeline
def test_equal_calls_give_equal_predictions(name):
    """The pipeline's own call of the transformer, made again as a refresh and as a reuse, gives the
    same bits: nothing that it hands over counts twice or is lost, such as a ControlNet's residuals.
    """
    pipe = build(name)
    calls: list[tuple[tuple, dict]] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True
    )
    sample(pipe, name)
    handle.remove()
    args, kwargs = calls[-1]

    def predict() -> torch.Tensor:
        output = pipe.transformer(*args, **kwargs)[0]
        return torch.stack(output) if isinstance(output, list) else output

    with torch.no_grad():
        expected = predict()
        apply_skip_cache(pipe, estimator="hold", interval=3, window=ALWAYS_OPEN)
        with skip_cache_run(pipe.transformer, timesteps=[0.5, 0.4, 0.3]):
            outputs = [predict() for _ in range(3)]
    assert cache_stats(pipe).plan == "Frr"
    assert all(torch.equal(output, expected) for output in outputs)


@pytest.mark.parametrize("name", [name for name in PIPELINES if "controlnet" in name])
def test_controlnet_is_heard(name):
    """What the ControlNet sees changes the output of a cached run."""
    pipe = cached(name)
    other = 1.0 - CONTROL["control_image"]
    assert not torch.allclose(
        sample(pipe, name), sample(pipe, name, control_image=other), rtol=1e-2
    )


# Guidance that changes


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_changed_between_runs(name):
    """With guidance, without and with it again: each run is that of a fresh pipeline, whatever the
    one before had cached.
    """
    unguided = PIPELINES[name].unguided
    pipe, fresh = cached(name), cached(name)
    expected = sample(pipe, name)
    assert torch.equal(sample(pipe, name, **unguided), sample(fresh, name, **unguided))
    assert len(cache_stats(pipe).streams) == 1
    assert cache_stats(pipe).plan == PLAN
    assert torch.equal(sample(pipe, name), expected)


def guided_at(*steps: int) -> Callable:
    """A callback that leaves guidance on at these steps alone (and at the first)."""

    def switch(pipe, i, t, tensors):
        pipe._guidance_scale = 5.0 if i + 1 in steps else 1.0
        return {}

    return switch


CHANGES: dict[str, tuple[str, dict[str, Any], list[dict[int, int]]]] = {
    "lumina2-truncated": (
        "lumina2",
        {"cfg_trunc_ratio": 0.6},
        [ALWAYS, {0: 0, 1: 0, 2: 0, 3: 3}],
    ),
    "chroma-truncated": (
        "chroma",
        {"callback_on_step_end": guided_at(1, 2, 3, 4)},
        [ALWAYS, {0: 0, 1: 0, 2: 0, 3: 3, 4: 3}],
    ),
    "cogview4-truncated": (
        "cogview4",
        {"callback_on_step_end": guided_at(1)},
        [ALWAYS, {0: 0, 1: 0}],
    ),
    # Without guidance the batch is half as large: the step that is the first to be so refreshes.
    "z_image-truncated": (
        "z_image",
        {"cfg_truncation": 0.3},
        [{0: 0, 1: 0, 2: 0, 3: 3}, {4: 4, 5: 4, 6: 6}],
    ),
    "sd3-truncated": (
        "sd3",
        {"callback_on_step_end": SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=3)},
        [{0: 0, 1: 0, 2: 0, 3: 3}, {4: 4, 5: 4, 6: 6}],
    ),
    # A second call, with one of the blocks left out, at some steps only. Where that is the block by
    # which a reuse is guarded, the first of the deep span, there is none.
    "sd3-skipping-in-the-span": (
        "sd3",
        {"skip_guidance_layers": [2], "skip_layer_guidance_stop": 0.8},
        [ALWAYS, {1: 1, 2: 1, 3: 3, 4: 3, 5: 3}],
    ),
    "sd3-skipping-its-entry": (
        "sd3",
        {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.8},
        [ALWAYS, {step: step for step in range(1, 6)}],
    ),
    # The residuals are zero from step 4 on; both passes go on.
    "flux_controlnet-released": (
        "flux_controlnet",
        {"control_guidance_end": 0.6},
        [ALWAYS, ALWAYS],
    ),
}
# Away at steps 2 and 3, and so at the refresh of step 3: made good when it comes back.
CHANGES |= {
    f"{name}-interrupted": (
        name,
        {"callback_on_step_end": guided_at(1, 4, 5, 6)},
        [ALWAYS, {0: 0, 1: 0, 4: 4, 5: 4, 6: 6}],
    )
    for name in ("chroma", "cogview4")
}


@pytest.mark.parametrize("change", CHANGES)
def test_guidance_changed_in_the_middle_of_a_run(change):
    """A pass that comes late, drops out or comes back reuses nothing of another pass, and nothing
    older than the schedule allows.
    """
    name, changes, expected = CHANGES[change]
    pipe = cached(name)
    watch = Watch(pipe.transformer)
    first = sample(pipe, name, **changes)
    assert watch.strays == []
    assert watch.sources == expected
    streams = cache_stats(pipe).streams.values()
    assert sum(stream.reused for stream in streams) == "".join(plans_of(watch)).count("r")
    assert torch.equal(sample(pipe, name, **changes), first)


def test_pass_without_the_block_where_reuse_resumes():
    """A pass that leaves out the very block where features are kept runs its other layers at every
    step, says so, and does not disturb the other pass.
    """
    pipe = cached("sd3")
    watch = Watch(pipe.transformer)
    skipping = {"skip_guidance_layers": [3], "skip_layer_guidance_stop": 0.8}
    with pytest.warns(
        NotCachingWarning, match="without running the layer that a reuse would resume at"
    ):
        sample(pipe, "sd3", **skipping)
    assert watch.sources == [ALWAYS, {}]
    assert watch.strays == []
    plans = {name: stream.plan for name, stream in cache_stats(pipe).streams.items()}
    assert plans == {"0": PLAN, "1": "FFFFF"}


@pytest.mark.parametrize("change", ["lumina2-truncated", "cogview4-truncated"])
def test_pass_that_dropped_out_keeps_no_features(change):
    """After the last reuse of a planned run nothing is held, of a pass that ended early neither."""
    name, changes, _ = CHANGES[change]
    pipe = cached(name)
    sample(pipe, name, **changes)
    streams = controller_of(pipe.transformer).last_run.streams
    assert {key: stream.cache_bytes for key, stream in streams.items()} == dict.fromkeys(streams, 0)


# Keys and values kept by the pipeline


def test_flux2_with_pictures_seen_at_the_first_step_alone():
    """A reference picture's tokens are there at the first step alone, so the second one refreshes;
    keys and values of every layer are kept of them, so reuse works as without a picture.
    """
    make = made(
        Flux2KleinKVPipeline,
        "Flux2Transformer2DModel",
        vae=flux2_vae,
        changes={"guidance_embeds": False},
    )
    picture = Image.fromarray((CONTROL["control_image"][0] * 255).byte().permute(1, 2, 0).numpy())

    def run(pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            image=picture,
            prompt_embeds=EMBEDS["prompt_embeds"],
            num_inference_steps=STEPS,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **square(8),
        ).images

    pipe = make()
    expected = run(pipe)
    apply_skip_cache(pipe, interval=1, window=ALWAYS_OPEN, estimator="hold")
    assert torch.equal(run(pipe), expected)
    apply_skip_cache(pipe, interval=3, window=ALWAYS_OPEN, estimator="hold")
    watch = Watch(pipe.transformer)
    reused = run(pipe)
    assert watch.sources == [{0: 0, 1: 1, 2: 1, 3: 3, 4: 3, 5: 3, 6: 6}]
    assert cache_stats(pipe).plan == "FFrFrrF"
    assert torch.isfinite(reused).all()
    assert not torch.allclose(reused, expected, rtol=1e-2)
    assert remove_skip_cache(pipe)
    assert torch.equal(run(pipe), expected)
