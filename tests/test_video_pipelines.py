"""Real video pipelines of diffusers, tiny and with random weights, under the adapters that claim
them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AllegroPipeline,
    AnyFlowFARPipeline,
    AnyFlowPipeline,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLMagvit,
    AutoencoderKLWan,
    AutoencoderOobleck,
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    EasyAnimatePipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXPipeline,
    MochiPipeline,
    SkyReelsV2Pipeline,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from pipelines import ALWAYS_OPEN, block_lists, surroundings
from skipcache import (
    apply_skip_cache,
    cache_stats,
    calibrate,
    is_skip_cached,
    remove_skip_cache,
)
from skipcache.branches.files import base_model_of
from skipcache.errors import ConfigError
from skipcache.recipes.recipe import Recipe, RecipeRecord, describe_scheduler, planned
from skipcache.recipes.statistics import OutputStatistics
from skipcache.recipes.weights import reuse_weights
from tiny import TINY, enliven, randn

pytestmark = [
    # Mochi's attention asks for an autocast that the CPU has not.
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    # Of the decoder of Stable Audio.
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
]

STEPS, INTERVAL = 7, 3
PLAN = "FrrFrrF"
HOLD = {"window": ALWAYS_OPEN, "estimator": "hold"}

NO_TEXT: dict[str, Any] = {"tokenizer": None, "text_encoder": None}
GUIDED = {"guidance_scale": 3.0}
SIZE = {"height": 32, "width": 32, "num_frames": 5}


@dataclass(frozen=True)
class Case:
    """One pipeline.

    ``make()`` builds it, and ``inputs()`` says what to call it with, but for steps, seed and output
    type. ``plans`` has the plan of each guidance pass, by the name that the stats give it, and
    ``unguided`` what to change for a call without guidance.
    """

    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    plans: dict[str, str]
    unguided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})


def same_plan(*streams: str) -> dict[str, str]:
    return dict.fromkeys(streams, PLAN)


def prompts(*shape: int, masks: bool = False) -> dict[str, torch.Tensor]:
    """Embeddings of a prompt and of its negative."""
    made = {"prompt_embeds": randn(1, *shape), "negative_prompt_embeds": randn(2, *shape)}
    if masks:
        mask = torch.ones(shape[:2], dtype=torch.long)
        mask[:, -1] = 0
        made |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return made


# Wan and its kin.

COND_UNCOND = ("cond", "uncond")


def unipc() -> UniPCMultistepScheduler:
    """As in the released Wan."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def wan_vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def wan(**parts: Any) -> WanPipeline:
    transformer = TINY["WanTransformer3DModel"].make()
    return WanPipeline(vae=None, scheduler=unipc(), transformer=transformer, **NO_TEXT, **parts)


def wan_22() -> WanPipeline:
    second = enliven(WanTransformer3DModel(**TINY["WanTransformer3DModel"].make().config), seed=1)
    return wan(transformer_2=second, boundary_ratio=0.75)


def wan_vace() -> WanVACEPipeline:
    config = dict(TINY["WanVACETransformer3DModel"].make().config)
    # Two videos of four channels, and a mask of 8 x 8 pixels for each latent one.
    model = enliven(WanVACETransformer3DModel(**{**config, "vace_in_channels": 72}))
    return WanVACEPipeline(vae=wan_vae(), scheduler=unipc(), transformer=model, **NO_TEXT)


def wan_v2v() -> WanVideoToVideoPipeline:
    transformer = TINY["WanTransformer3DModel"].make()
    return WanVideoToVideoPipeline(
        vae=wan_vae(), scheduler=unipc(), transformer=transformer, **NO_TEXT
    )


def skyreels() -> SkyReelsV2Pipeline:
    transformer = TINY["SkyReelsV2Transformer3DModel"].make()
    return SkyReelsV2Pipeline(vae=None, scheduler=unipc(), transformer=transformer, **NO_TEXT)


def chronoedit() -> ChronoEditPipeline:
    config = dict(TINY["ChronoEditTransformer3DModel"].make().config)
    # The latents, what they are to agree with, and four channels of a mask; and a picture's tokens.
    config |= {"in_channels": 12, "image_dim": 8, "added_kv_proj_dim": 24}
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    square = {"height": 8, "width": 8}
    torch.manual_seed(0)
    return ChronoEditPipeline(
        vae=wan_vae(),
        scheduler=unipc(),
        transformer=enliven(ChronoEditTransformer3DModel(**config)),
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessor(size=square, crop_size=square),
        **NO_TEXT,
    )


def wan_inputs() -> dict[str, Any]:
    return {**SIZE, **GUIDED, **prompts(1, 5, 10)}


def wan_v2v_inputs() -> dict[str, Any]:
    video = randn(3, 1, 5, 3, 32, 32).clamp(-1, 1) / 2 + 0.5
    inputs = {**wan_inputs(), "video": video, "strength": 0.9}  # six steps of seven
    del inputs["num_frames"]
    return inputs


def chronoedit_inputs() -> dict[str, Any]:
    return {
        **SIZE,
        **GUIDED,
        **prompts(1, 512, 10),  # what goes before the tokens of the picture is always that long
        "image": Image.new("RGB", (32, 32), (200, 90, 10)),
        "num_frames": 9,
        "enable_temporal_reasoning": True,
        "num_temporal_reasoning_steps": 4,
    }


# Others with two passes or more.


def hunyuan_video() -> HunyuanVideoPipeline:
    return HunyuanVideoPipeline(
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=TINY["HunyuanVideoTransformer3DModel"].make(),
        text_encoder_2=None,
        tokenizer_2=None,
        **NO_TEXT,
    )


def hunyuan_video_inputs() -> dict[str, Any]:
    return {
        **SIZE,
        **prompts(1, 5, 10, masks=True),
        "pooled_prompt_embeds": randn(3, 1, 6),
        "negative_pooled_prompt_embeds": randn(4, 1, 6),
        "true_cfg_scale": 2.0,
    }


def hunyuan_video_15(**guidance: Any) -> HunyuanVideo15Pipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    )
    config = dict(TINY["HunyuanVideo15Transformer3DModel"].make().config)
    # The latents, those of a picture, and its mask.
    model = enliven(HunyuanVideo15Transformer3DModel(**{**config, "in_channels": 9}))
    return HunyuanVideo15Pipeline(
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=model,
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=3.0, **guidance),
        **NO_TEXT,
    )


def hunyuan_video_15_inputs() -> dict[str, Any]:
    mask, mask_2 = torch.tensor([[1, 1, 1, 1, 0]]), torch.tensor([[1, 1, 0, 0]])
    return {
        **SIZE,
        **prompts(1, 5, 10),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds_mask": mask,
        "prompt_embeds_2": randn(3, 1, 4, 8),
        "negative_prompt_embeds_2": randn(4, 1, 4, 8),
        "prompt_embeds_mask_2": mask_2,
        "negative_prompt_embeds_mask_2": mask_2,
    }


class NothingToCheck:
    """In the place of Cosmos' safety checker, which is a package of its own and is shown prompts
    and decoded frames: here are neither.
    """

    def to(self, device: Any) -> None:
        """Is all that is asked of it."""


def cosmos() -> CosmosTextToWorldPipeline:
    config = dict(TINY["CosmosTransformer3DModel"].make().config)
    model = enliven(CosmosTransformer3DModel(**{**config, "extra_pos_embed_type": "learnable"}))
    return CosmosTextToWorldPipeline(
        vae=None,
        scheduler=EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"
        ),
        transformer=model,
        safety_checker=NothingToCheck(),
        **NO_TEXT,
    )


def ltx2() -> LTX2Pipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=8
    )
    connectors = LTX2TextConnectors(
        caption_channels=8,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=4,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=4,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
    )
    config = dict(TINY["LTX2VideoTransformer3DModel"].make().config)
    config |= {"audio_in_channels": 4, "audio_out_channels": 4, "caption_channels": 8}
    return LTX2Pipeline(
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        connectors=connectors.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=enliven(LTX2VideoTransformer3DModel(**config)),
        vocoder=None,
        **NO_TEXT,
    )


def ltx2_inputs() -> dict[str, Any]:
    return {
        **GUIDED,
        **prompts(1, 6, 16, masks=True),
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "spatio_temporal_guidance_blocks": [2],  # a layer of the deep span
    }


# All of the guidance in one batch.


def cogvideox(kind: Any) -> CogVideoXPipeline:
    scheduler = kind(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    transformer = TINY["CogVideoXTransformer3DModel"].make()
    return CogVideoXPipeline(vae=None, scheduler=scheduler, transformer=transformer, **NO_TEXT)


def cogvideox_inputs() -> dict[str, Any]:
    return {**SIZE, **GUIDED, **prompts(1, 5, 10)}


def ltx() -> LTXPipeline:
    return LTXPipeline(
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=TINY["LTXVideoTransformer3DModel"].make(),
        **NO_TEXT,
    )


def ltx_inputs() -> dict[str, Any]:
    return {**prompts(1, 5, 10, masks=True), **GUIDED, "height": 64, "width": 64, "num_frames": 9}


def allegro() -> AllegroPipeline:
    return AllegroPipeline(
        vae=None,
        scheduler=EulerAncestralDiscreteScheduler(),
        transformer=TINY["AllegroTransformer3DModel"].make(),
        **NO_TEXT,
    )


def allegro_inputs() -> dict[str, Any]:
    text = {**prompts(1, 6, 10, masks=True), "negative_prompt": None}
    return {**SIZE, **GUIDED, **text, "num_frames": 8}


def mochi() -> MochiPipeline:
    return MochiPipeline(
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        transformer=TINY["MochiTransformer3DModel"].make(),
        **NO_TEXT,
    )


def mochi_inputs() -> dict[str, Any]:
    inputs = {**SIZE, **GUIDED, **prompts(1, 6, 16, masks=True), "num_frames": 7}
    for name in ("prompt_attention_mask", "negative_prompt_attention_mask"):
        inputs[name] = inputs[name].bool()
    return inputs


def stable_audio() -> StableAudioPipeline:
    torch.manual_seed(0)
    vae = AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=64,
    )
    config = dict(TINY["StableAudioDiTModel"].make().config)
    text = config["cross_attention_input_dim"]
    config |= {"global_states_input_dim": 2 * text}
    projection = StableAudioProjectionModel(
        text_encoder_dim=text, conditioning_dim=text, min_value=0, max_value=32
    )
    return StableAudioPipeline(
        vae=vae.eval(),
        projection_model=projection.eval(),
        scheduler=EDMDPMSolverMultistepScheduler(
            sigma_min=0.3, sigma_max=500, sigma_data=1.0, sigma_schedule="exponential"
        ),
        transformer=enliven(StableAudioDiTModel(**config)),
        **NO_TEXT,
    )


def stable_audio_inputs() -> dict[str, Any]:
    text = TINY["StableAudioDiTModel"].make().config.cross_attention_input_dim
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    return {
        **GUIDED,
        **prompts(1, 5, text),
        "attention_mask": mask,
        "negative_attention_mask": mask,
    }


def anyflow() -> AnyFlowPipeline:
    return AnyFlowPipeline(
        vae=None,
        scheduler=FlowMapEulerDiscreteScheduler(shift=3.0),
        transformer=TINY["AnyFlowTransformer3DModel"].make(),
        **NO_TEXT,
    )


def easyanimate() -> EasyAnimatePipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=[8, 8, 8, 8],
        layers_per_block=1,
        norm_num_groups=4,
    )
    return EasyAnimatePipeline(
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=TINY["EasyAnimateTransformer3DModel"].make(),
        **NO_TEXT,
    )


# The second transformer of Wan 2.2 begins at step 4: there it refreshes, for it has cached nothing
# yet. The interval goes on counting the steps of the run, not its own, so step 6 refreshes next.
WAN_22_PLANS = {"transformer": "FrrF", "transformer_2": "FrF"}

CASES = {
    "wan": Case(wan, wan_inputs, same_plan(*COND_UNCOND)),
    "wan-2.2": Case(
        wan_22,
        wan_inputs,
        {f"{model}/{name}": plan for model, plan in WAN_22_PLANS.items() for name in COND_UNCOND},
    ),
    "wan-vace": Case(wan_vace, wan_inputs, same_plan(*COND_UNCOND)),
    # Never names its passes, and leaves out the first step of seven.
    "wan-v2v": Case(wan_v2v, wan_v2v_inputs, dict.fromkeys("01", "FrrFrr")),
    "skyreels": Case(skyreels, wan_inputs, same_plan(*COND_UNCOND)),
    # From step 4 on there are two frames and not three, which no plan knows.
    "chronoedit": Case(chronoedit, chronoedit_inputs, dict.fromkeys("01", "FrrFFrF")),
    "cosmos": Case(cosmos, lambda: {**wan_inputs(), "num_frames": 9}, same_plan("0", "1")),
    "hunyuan-video": Case(
        hunyuan_video,
        hunyuan_video_inputs,
        same_plan(*COND_UNCOND),
        unguided={"true_cfg_scale": 1.0},
    ),
    "hunyuan-video-1.5": Case(
        hunyuan_video_15, hunyuan_video_15_inputs, same_plan("pred_cond", "pred_uncond"), {}
    ),
    "ltx2": Case(
        ltx2,
        ltx2_inputs,
        same_plan("cond_uncond", "uncond_stg", "uncond_modality"),
        unguided={"stg_scale": 0.0, "audio_stg_scale": 0.0}
        | {"modality_scale": 1.0, "audio_modality_scale": 1.0},
    ),
    "cogvideox-ddim": Case(
        lambda: cogvideox(CogVideoXDDIMScheduler), cogvideox_inputs, same_plan("cond_uncond")
    ),
    "cogvideox-dpm": Case(
        lambda: cogvideox(CogVideoXDPMScheduler), cogvideox_inputs, same_plan("cond_uncond")
    ),
    "ltx": Case(ltx, ltx_inputs, same_plan("cond_uncond")),
    "allegro": Case(allegro, allegro_inputs, same_plan("0")),
    "mochi": Case(mochi, mochi_inputs, same_plan("cond_uncond")),
    "stable-audio": Case(
        stable_audio,
        stable_audio_inputs,
        same_plan("0"),
        unguided={
            "guidance_scale": 1.0,
            "negative_prompt_embeds": None,
            "negative_attention_mask": None,
        },
    ),
    "anyflow": Case(
        anyflow,
        wan_inputs,
        same_plan("0"),
        unguided={"guidance_scale": 1.0, "negative_prompt_embeds": None},
    ),
    "easyanimate": Case(
        easyanimate, lambda: {**SIZE, **GUIDED, **prompts(1, 6, 12, masks=True)}, same_plan("0")
    ),
}
on_every_pipeline = pytest.mark.parametrize("name", CASES)


def build(name: str) -> Any:
    pipe = CASES[name].make()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cached(name: str, interval: int = INTERVAL) -> Any:
    return apply_skip_cache(build(name), interval=interval, **HOLD)


def sample(pipe: Any, name: str, seed: int = 0, **changes: Any) -> torch.Tensor:
    """One call of the pipeline: the latents that it ends with, those of the sound after them."""
    output = pipe(
        **{**CASES[name].inputs(), **changes},
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    )
    flat = torch.cat([latents.flatten() for latents in output.values()])
    assert torch.isfinite(flat).all()
    return flat


@functools.cache
def uncached(name: str) -> torch.Tensor:
    return sample(build(name), name)


def transformers_of(pipe: Any) -> dict[str, Any]:
    named = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
    return {name: model for name, model in named.items() if model is not None}


def has_passes(transformer: Any) -> bool:
    """Whether a pipeline could tell it the names of its passes."""
    return hasattr(type(transformer), "cache_context")


@dataclass(frozen=True)
class Call:
    """One call of a transformer, told by what it was given: ``guidance`` says which pass it is."""

    transformer: str
    guidance: Any
    step: int


class Watch:
    """Says of every call of the transformers whose deep feature it went on with.

    With ``hold`` what enters the last block at a reuse is, bit for bit, what entered it at the
    refresh. ``origins`` has a pair for each call: the call, and the one whose feature it used; its
    own at a refresh. Nothing in it is taken from skipcache.
    """

    def __init__(self, pipe: Any) -> None:
        self.origins: list[tuple[Call, Call]] = []
        self._times: list[float] = []
        self._seen: list[tuple[Call, torch.Tensor]] = []
        for name, model in transformers_of(pipe).items():
            model.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            last = list(block_lists(model)[-1]._modules.values())[-1]
            last.register_forward_pre_hook(self._resume, with_kwargs=True)

    def _enter(self, name, module, args, kwargs):
        time = float((kwargs["timestep"] if "timestep" in kwargs else args[1]).flatten()[0])
        if time not in self._times[-1:]:
            self._times.append(time)
        perturbed = str(kwargs.get("spatio_temporal_guidance_blocks"))
        isolated = kwargs.get("isolate_modalities")
        guidance = (float(kwargs["encoder_hidden_states"].sum()), perturbed, isolated)
        self._call = Call(name, guidance, len(self._times) - 1)

    def _resume(self, module, args, kwargs):
        deep = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        for call, earlier in self._seen:
            if earlier.shape == deep.shape and torch.equal(earlier, deep):
                self.origins.append((self._call, call))
                return
        self._seen.append((self._call, deep.clone()))
        self.origins.append((self._call, self._call))

    def plans(self) -> list[str]:
        """The plan of each pass, in the order of their first calls."""
        plans: dict[Any, str] = {}
        for call, origin in self.origins:
            key = call.transformer, call.guidance
            plans[key] = plans.get(key, "") + ("F" if call is origin else "r")
        return list(plans.values())

    def check(self) -> None:
        """Every reuse is of the same pass of the same transformer, and no step between the two was
        due to refresh.
        """
        for call, origin in self.origins:
            assert (call.transformer, call.guidance) == (origin.transformer, origin.guidance)
            assert call.step // INTERVAL == origin.step // INTERVAL, (call.step, origin.step)


@on_every_pipeline
def test_each_pass_refreshes_as_scheduled(name):
    """Each guidance pass has a stream of its own with the plan of its interval, and reuses nothing
    but its own features, seen from outside too.
    """
    pipe = cached(name)
    watch = Watch(pipe)
    sample(pipe, name)
    plans = {key: stream.plan for key, stream in cache_stats(pipe).streams.items()}
    assert plans == CASES[name].plans
    assert watch.plans() == list(plans.values())
    watch.check()


@on_every_pipeline
def test_reuse_is_real_and_repeats(name):
    """The cached output is finite and another than the uncached one, and a second run with the same
    seed gives it again, bit for bit.
    """
    pipe = cached(name)
    first = sample(pipe, name)
    assert not torch.allclose(first, uncached(name), rtol=1e-2)
    assert torch.equal(sample(pipe, name), first)


@on_every_pipeline
def test_never_reusing_is_bit_identical(name):
    """A cache that refreshes at every step changes no bit of the output."""
    pipe = cached(name, interval=1)
    assert torch.equal(sample(pipe, name), uncached(name))
    assert "r" not in cache_stats(pipe).plan


@on_every_pipeline
def test_remove_restores_the_pipeline(name):
    """After removing, output, attributes, hooks and classes are those from before."""
    pipe = build(name)
    parts = [
        SimpleNamespace(transformer=model, scheduler=pipe.scheduler)
        for model in transformers_of(pipe).values()
    ]
    assert torch.equal(sample(pipe, name), uncached(name))
    before = [surroundings(part) for part in parts]
    apply_skip_cache(pipe, interval=INTERVAL, **HOLD)
    sample(pipe, name)
    for part in parts:
        assert ("cache_context" in vars(part.transformer)) is has_passes(part.transformer)
    assert "step" in vars(pipe.scheduler)
    assert remove_skip_cache(pipe)
    assert [surroundings(part) for part in parts] == before
    assert "step" not in vars(pipe.scheduler)
    assert not any("cache_context" in vars(part.transformer) for part in parts)
    assert torch.equal(sample(pipe, name), uncached(name))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.unguided])
def test_guidance_off_in_the_next_run(name):
    """A run without guidance after one with it gives what it gives by itself."""
    changes = CASES[name].unguided
    expected = sample(cached(name), name, seed=1, **changes)
    pipe = cached(name)
    sample(pipe, name)
    watch = Watch(pipe)
    assert torch.equal(sample(pipe, name, seed=1, **changes), expected)
    watch.check()
    assert not torch.equal(sample(pipe, name, seed=1), expected)


# Passes that drop out in the middle of a run.

WITHOUT = {
    "stops": range(2, STEPS),
    "pauses": range(1, 2),  # and is back before a refresh is due
    "misses-a-refresh": range(2, 4),  # that of step 3
}
OFF = {
    name: {"_guidance_scale": 1.0}
    for name in ("wan", "wan-2.2", "wan-vace", "wan-v2v", "skyreels", "cosmos")
}
OFF["ltx2"] = {"_stg_scale": 0.0, "_audio_stg_scale": 0.0}


def without_a_pass(off: dict[str, float], steps: range) -> dict[str, Any]:
    """Arguments that switch a pass off for those steps, by a callback as users write them."""
    on: dict[str, float] = {}

    def on_step_end(pipe, i, t, tensors):
        if not on:
            on.update({name: getattr(pipe, name) for name in off})
        for name, value in (off if i + 1 in steps else on).items():
            setattr(pipe, name, value)
        return tensors

    return {"callback_on_step_end": on_step_end}


def due(steps: list[int]) -> str:
    """The plan of a pass that is called at those steps of a run: it refreshes where it was not yet
    called since the last step that was due to.
    """
    segments = [step // INTERVAL for step in steps]
    return "".join("r" if now in segments[:i] else "F" for i, now in enumerate(segments))


@pytest.mark.parametrize("when", WITHOUT)
@pytest.mark.parametrize("name", OFF)
def test_a_pass_that_drops_out_is_never_stale(name, when):
    """A guidance pass that is left out at some steps comes back with a refresh if it missed one,
    and the others go on as if nothing were.
    """
    pipe = cached(name)
    watch = Watch(pipe)
    sample(pipe, name, **without_a_pass(OFF[name], WITHOUT[when]))
    called: dict[Any, list[int]] = {}
    for call, _ in watch.origins:
        called.setdefault((call.transformer, call.guidance), []).append(call.step)
    assert any(not set(steps) & set(WITHOUT[when]) for steps in called.values())
    watch.check()
    assert watch.plans() == [due(steps) for steps in called.values()]


@pytest.mark.parametrize(
    ("limits", "plan"),
    [({"stop": 0.5}, "Frr"), ({"start": 0.15, "stop": 0.9}, "FrFrr"), ({"start": 0.3}, "FFrrF")],
    ids=["stops", "middle", "begins"],
)
def test_guidance_for_a_part_of_the_run(limits, plan):
    """A guider that guides a part of the run only leaves the conditional pass its plan, and the
    other one begins with a refresh.
    """
    pipe = hunyuan_video_15(**limits)
    pipe.set_progress_bar_config(disable=True)
    apply_skip_cache(pipe, interval=INTERVAL, **HOLD)
    watch = Watch(pipe)
    sample(pipe, "hunyuan-video-1.5")
    plans = {key: stream.plan for key, stream in cache_stats(pipe).streams.items()}
    assert plans == {"pred_cond": PLAN, "pred_uncond": plan}
    watch.check()


@pytest.mark.parametrize("name", ["anyflow", "easyanimate"])
def test_guidance_cut_off_within_a_batch(name):
    """Where both passes are in one batch, a callback that drops the negative half makes the next
    step refresh, and what follows reuses the smaller batch.
    """

    def on_step_end(pipe, i, t, tensors):
        if i == 3:
            pipe._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"][-1:]
        return tensors

    pipe = cached(name)
    watch = Watch(pipe)
    inputs = ["latents", "prompt_embeds"]
    changes = {"callback_on_step_end": on_step_end, "callback_on_step_end_tensor_inputs": inputs}
    sample(pipe, name, **changes)
    assert cache_stats(pipe).plan == "FrrFFrF"
    watch.check()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_chunk_by_chunk():
    """AnyFlow FAR makes one chunk after the other, each a run with a plan of its own; the calls
    between them, which fill the attention's cache, run every layer and are none of its steps.
    """
    pipe = AnyFlowFARPipeline(
        vae=None,
        scheduler=FlowMapEulerDiscreteScheduler(shift=3.0),
        transformer=TINY["AnyFlowFARTransformer3DModel"].make(),
        **NO_TEXT,
    )
    pipe.set_progress_bar_config(disable=True)
    changes = {"num_frames": 9, "chunk_partition": [1, 1, 1]}
    expected = sample(pipe, "anyflow", **changes)
    apply_skip_cache(pipe, interval=1, **HOLD)
    assert torch.equal(sample(pipe, "anyflow", **changes), expected)
    apply_skip_cache(pipe, interval=INTERVAL, **HOLD)
    watch = Watch(pipe)
    first = sample(pipe, "anyflow", **changes)
    assert watch.plans() == ["F".join([PLAN] * 3)]
    assert cache_stats(pipe).plan == PLAN  # of the last chunk
    assert not torch.allclose(first, expected, rtol=1e-2)
    assert torch.equal(sample(pipe, "anyflow", **changes), first)
    remove_skip_cache(pipe)
    assert torch.equal(sample(pipe, "anyflow", **changes), expected)


# Recipes.

RECIPES = ["wan", "wan-v2v", "cogvideox-dpm", "ltx2"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, monkeypatch):
    """A recipe found on a pipeline refreshes and weighs as it planned there, also where the run
    begins late, where the passes are calls of their own and where the sampler takes arguments of
    its own.
    """
    pipe = build(name)
    call = {**CASES[name].inputs(), "num_inference_steps": STEPS, "output_type": "latent"}
    recipe = calibrate(pipe, [call] * 2, speedups=(1.0,), probes=1)
    recipe = dataclasses.replace(recipe, reuse_cost=0.0)  # a model this small takes no time to tell
    for unplanned in ("extrapolation_weights", "nearest_weights"):
        monkeypatch.delattr(f"skipcache.recipes.plan.{unplanned}")
    apply_skip_cache(pipe, recipe=recipe, speedup=1.4)
    sample(pipe, name)
    plan = "".join("F" if refreshes else "r" for refreshes in planned(recipe, 1.4).plan)
    plans = {stream.plan for stream in cache_stats(pipe).streams.values()}
    assert "r" in plan
    assert plans == {plan}


def test_a_recipe_for_two_transformers(monkeypatch):
    """Of Wan 2.2, the second transformer begins with a refresh that is planned, and weighs as
    planned from then on; both together refresh as often as the speedup asks.
    """
    pipe = build("wan-2.2")
    call = {**CASES["wan-2.2"].inputs(), "num_inference_steps": 12, "output_type": "latent"}
    recipe = calibrate(pipe, [call] * 2, speedups=(1.5,), probes=1, refine=30)
    known = recipe.statistics
    assert math.isfinite(recipe.points[0].predicted_error)  # no plan reuses across the switch
    (begin,) = {stage[0] for stage in known.stages} - {0}
    assert known.times[begin - 1] >= 0.75 > known.times[begin]
    recipe = dataclasses.replace(recipe, reuse_cost=0.0)
    for unplanned in ("extrapolation_weights", "nearest_weights"):
        monkeypatch.delattr(f"skipcache.recipes.plan.{unplanned}")
    apply_skip_cache(pipe, recipe=recipe, speedup=1.5)
    pipe(**call)
    plan = "".join("F" if refreshes else "r" for refreshes in planned(recipe, 1.5).plan)
    assert plan[begin] == "F"
    assert plan.count("F") == 8
    by_name = {key.split("/")[0]: s.plan for key, s in cache_stats(pipe).streams.items()}
    assert by_name == {"transformer": plan[:begin], "transformer_2": plan[begin:]}


def test_a_pipeline_of_two_kinds_of_outputs_has_no_recipe():
    """Cosmos gives its scheduler two outputs a step, so calibration says that it cannot be."""
    pipe = build("cosmos")
    call = {**CASES["cosmos"].inputs(), "num_inference_steps": STEPS, "output_type": "latent"}
    with pytest.raises(ConfigError, match=r"Calibrate with another|no recipes"):
        calibrate(pipe, [call] * 2, speedups=(1.0,), probes=1)
    assert not is_skip_cached(pipe)


# A recipe made by hand for two transformers.


def recipe_for_two(pipe: Any, steps: int = STEPS, misses: float = 1.0) -> Recipe:
    """For Wan 2.2, of smooth outputs."""
    pipe.scheduler.set_timesteps(steps)
    times = tuple(float(timestep) / 1000 for timestep in pipe.scheduler.timesteps)
    draw = np.random.default_rng(0)
    outputs = np.exp(-np.outer(times, range(4))) @ draw.normal(size=(4, 40))
    known = OutputStatistics(
        times,
        outputs @ outputs.T / 40 + 1e-3 * np.eye(steps),
        np.diff([*times, 0.0]),
        np.ones(steps),
        1.0,
        (pipe.config.boundary_ratio,),
        np.full((2, steps), misses),
    )
    record = RecipeRecord(
        base_model_of(pipe.transformer),
        describe_scheduler(pipe.scheduler),
        3.0,
        (4, 2, 4, 4),
        2,
        "made by hand",
    )
    return Recipe(known, 0.0, (), record)


class Outputs:
    """What every call of a transformer returned, by pass, after a cache had its say."""

    def __init__(self, pipe: Any) -> None:
        self.of: dict[tuple[str, float], dict[int, torch.Tensor]] = {}
        self._times: list[float] = []
        for name, model in transformers_of(pipe).items():
            model.register_forward_hook(partial(self._look, name), with_kwargs=True)

    def _look(self, name, module, args, kwargs, output):
        time = float(kwargs["timestep"].flatten()[0])
        if time not in self._times[-1:]:
            self._times.append(time)
        own = self.of.setdefault((name, float(kwargs["encoder_hidden_states"].sum())), {})
        own[len(self._times) - 1] = output[0].clone()


@pytest.mark.parametrize(("speedup", "refreshes"), [(1.4, 5), (2.0, 3), (3.5, 2)])
def test_two_transformers_reuse_as_planned(speedup, refreshes):
    """As many refreshes as planned in all, the second transformer's first step among them; each
    reuse is the sum of what its own transformer said, by the planned weights.
    """
    pipe = build("wan-2.2")
    recipe = recipe_for_two(pipe)
    run = planned(recipe, speedup)
    begin = sum(time >= pipe.config.boundary_ratio for time in recipe.statistics.times)
    assert (begin, STEPS - begin) == tuple(map(len, WAN_22_PLANS.values()))
    assert sum(run.plan) == refreshes
    assert run.plan[begin]
    apply_skip_cache(pipe, recipe=recipe, speedup=speedup)
    heard = Outputs(pipe)
    sample(pipe, "wan-2.2")
    stats = cache_stats(pipe)
    plan = "".join("F" if refreshes else "r" for refreshes in run.plan)
    assert {key: stream.plan for key, stream in stats.streams.items()} == {
        f"{name}/{key}": part
        for name, part in (("transformer", plan[:begin]), ("transformer_2", plan[begin:]))
        for key in COND_UNCOND
    }
    assert stats.refreshed == refreshes * len(COND_UNCOND)
    assert stats.preset == f"recipe/{speedup:g}x"
    weights = reuse_weights(recipe.statistics, run.plan)
    assert len(heard.of) == 4
    reused = 0
    for outputs in heard.of.values():
        for step, output in outputs.items():
            if run.plan[step]:
                continue
            reuse = weights[step]
            pairs = zip(reuse.weights, reuse.refresh_steps, strict=True)
            torch.testing.assert_close(output, sum(w * outputs[i] for w, i in pairs))
            reused += 1
    assert reused == stats.reused == (STEPS - refreshes) * len(COND_UNCOND)


@pytest.mark.parametrize("adaptive", ["batch", "sample"])
def test_two_transformers_add_refreshes_of_their_own(adaptive):
    """Each transformer adds refreshes by what it misses itself, to all of its passes; where no miss
    surprises, nothing changes.
    """
    pipe = build("wan-2.2")
    call = {**CASES["wan-2.2"].inputs(), "num_inference_steps": 20, "output_type": "latent"}

    def sampled(misses: float, **options: Any) -> tuple[torch.Tensor, dict[str, str]]:
        recipe = recipe_for_two(pipe, 20, misses)
        apply_skip_cache(pipe, recipe=recipe, speedup=2.5, **options)
        frames = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
        return frames, {key: stream.plan for key, stream in cache_stats(pipe).streams.items()}

    plain, plans = sampled(1.0)
    found, same = sampled(1e6, adaptive=adaptive)
    assert same == plans
    assert torch.equal(found, plain)
    found, more = sampled(1e-6, adaptive=adaptive)
    for name in ("transformer", "transformer_2"):
        cond, uncond = (more[f"{name}/{key}"] for key in COND_UNCOND)
        was = plans[f"{name}/cond"]
        assert cond == uncond
        assert cond.count("F") > was.count("F")
        assert all(now == "F" for now, before in zip(cond, was, strict=True) if before == "F")
        # Nothing is missed by its first refresh, so nothing is added to the stretch after it.
        assert cond.index("F", 1) == was.index("F", 1)
    again, _ = sampled(1e-6, adaptive=adaptive)
    assert torch.equal(again, found)
