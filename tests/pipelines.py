"""Tiny offline diffusers pipelines with random weights, and what the tests ask of them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DControlNetModel,
    HunyuanDiT2DModel,
    HunyuanDiTControlNetPipeline,
    HunyuanDiTPAGPipeline,
    HunyuanDiTPipeline,
    LattePipeline,
    LatteTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from torch import nn

from skipcache import Backbone, BlockList, Timestep, Zipped, apply_skip_cache
from skipcache.latte_class import LatteClassPipeline, LatteClassTransformer3DModel

# Models this small lose more time between threads than in them.

KINDS = ("dit", "latte", "hunyuan_dit", "pixart")
# Around transformers of the same two families: for the tests that depend on the pipeline.
MORE_KINDS = ("latte_class", "hunyuan_dit_controlnet", "hunyuan_dit_pag")
LAYERS = 6
STEPS = 6
ALWAYS_OPEN = (1.0, 0.0)  # a window that leaves every step to the interval

_ADALN_SINGLE: dict[str, Any] = {
    "patch_size": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "in_channels": 4,
    "out_channels": 8,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": 1000,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}


class CallingScheduler(DDIMScheduler):
    """DDIM that calls ``after_step(steps made)`` between two steps, for pipelines without a
    callback.
    """

    after_step: Callable[[int], None] | None = None
    steps_made = 0

    def set_timesteps(self, *args, **kwargs):
        self.steps_made = 0
        super().set_timesteps(*args, **kwargs)

    def scale_model_input(self, sample, *args, **kwargs):
        if self.after_step is not None and self.steps_made > 0:
            self.after_step(self.steps_made)
        return super().scale_model_input(sample, *args, **kwargs)

    def step(self, model_output, timestep, sample, *args, **kwargs):
        output = super().step(model_output, timestep, sample, *args, **kwargs)
        self.steps_made += 1
        return output


def transformer_of(kind: str, layers: int = LAYERS, seed: int = 0, **changes: Any) -> nn.Module:
    """The transformer of that kind, its weights drawn so that every layer matters to the output."""
    torch.manual_seed(seed)
    model: nn.Module
    if kind == "dit":
        options = {
            "sample_size": 8,
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_zero",
            "num_embeds_ada_norm": 1000,
            "norm_elementwise_affine": False,
        }
        model = DiTTransformer2DModel(num_layers=layers, **{**options, **changes})
    elif kind == "latte":
        options = {**_ADALN_SINGLE, "sample_size": 8, "video_length": 2}
        model = LatteTransformer3DModel(num_layers=layers, **{**options, **changes})
    elif kind == "latte_class":
        options = {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": 8,
            "video_length": 2,
            "num_classes": 5,
        }
        model = LatteClassTransformer3DModel(num_layers=layers, **{**options, **changes})
    elif kind.startswith("hunyuan_dit"):
        options = {
            "sample_size": 8,
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "hidden_size": 16,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 8,
            "text_len": 5,
            "text_len_t5": 4,
            "activation_fn": "gelu-approximate",
        }
        model = HunyuanDiT2DModel(num_layers=layers, **{**options, **changes})
    elif kind == "pixart":
        options = {**_ADALN_SINGLE, "sample_size": 8}
        model = PixArtTransformer2DModel(num_layers=layers, **{**options, **changes})
    elif kind == "flux":
        options = {
            "patch_size": 1,
            "in_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 8,
            "axes_dims_rope": (4, 2, 2),
        }
        half = layers // 2
        model = FluxTransformer2DModel(
            num_layers=half, num_single_layers=layers - half, **{**options, **changes}
        )
    else:
        raise ValueError(kind)
    with torch.no_grad():
        for block_list in block_lists(model):
            for parameter in block_list.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(2.0)
    return model.eval()


def block_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of repeated blocks, in execution order."""
    names = (
        "transformer_blocks",
        "temporal_transformer_blocks",
        "single_transformer_blocks",
        "blocks",
    )
    return [getattr(model, name) for name in names if hasattr(model, name)]


def backbone_of(kind: str, layers: int = LAYERS) -> Backbone:
    """What an adapter would say of that kind; written here, so that no installed adapter is
    needed.
    """
    if kind.startswith("latte"):
        both = (BlockList("transformer_blocks"), BlockList("temporal_transformer_blocks"))
        return Backbone("latte", (Zipped(both),))
    if kind.startswith("hunyuan_dit"):
        pairs = tuple((i, layers - 1 - i) for i in range(layers // 2 - 1))
        return Backbone("hunyuan_dit", (BlockList("blocks"),), native_skips=pairs)
    if kind == "flux":
        flow = {
            "takes": ("hidden_states", "encoder_hidden_states"),
            "returns": ("encoder_hidden_states", "hidden_states"),
        }
        lists = (
            BlockList("transformer_blocks", **flow),
            BlockList("single_transformer_blocks", **flow),
        )
        return Backbone("flux", lists, timestep=Timestep(noise=1.0))
    return Backbone(kind, (BlockList("transformer_blocks"),))


def tiny_vae(blocks: int = 1) -> AutoencoderKL:
    """With one block a latent has the size of its image; each further block halves it."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()


def tiny_controlnet(layers: int = LAYERS) -> HunyuanDiT2DControlNetModel:
    """For the tiny HunyuanDiT, with its closing layers opened: a new ControlNet says nothing."""
    torch.manual_seed(1)
    net = HunyuanDiT2DControlNetModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        transformer_num_layers=layers,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=5,
        text_len_t5=4,
    )
    for layer in (net.input_block, *net.controlnet_blocks):
        nn.init.normal_(layer.weight, std=0.5)
    return net.eval()


def build(
    kind: str,
    seed: int = 0,
    transformer: nn.Module | None = None,
    scheduler: Any = None,
    **options: Any,
) -> Any:
    """A pipeline of that kind with its own scheduler, around the given transformer or a new one."""
    transformer = transformer_of(kind, seed=seed, **options) if transformer is None else transformer
    # Without the clamp to -1..1, which would hide small differences.
    scheduler = CallingScheduler(clip_sample=False) if scheduler is None else scheduler
    parts: dict[str, Any] = {
        "transformer": transformer,
        "vae": tiny_vae(blocks=1 if kind in ("dit", "latte_class") else 4),
        "scheduler": scheduler,
    }
    if kind == "dit":
        pipe = DiTPipeline(**parts)
    elif kind == "latte":
        pipe = LattePipeline(tokenizer=None, text_encoder=None, **parts)
    elif kind == "latte_class":
        pipe = LatteClassPipeline(**parts)
    elif kind == "pixart":
        pipe = PixArtAlphaPipeline(tokenizer=None, text_encoder=None, **parts)
    else:
        pipeline, more = HunyuanDiTPipeline, {}
        if kind == "hunyuan_dit_controlnet":
            pipeline = HunyuanDiTControlNetPipeline
            more = {"controlnet": tiny_controlnet(len(transformer.blocks))}
        elif kind == "hunyuan_dit_pag":
            pipeline, more = HunyuanDiTPAGPipeline, {"pag_applied_layers": ["blocks.1", "blocks.4"]}
        pipe = pipeline(
            tokenizer=None,
            text_encoder=None,
            tokenizer_2=None,
            text_encoder_2=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **more,
            **parts,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def kind_of(pipe: Any) -> str:
    """The kind that ``build`` was asked for."""
    names = {
        "DiT": "dit",
        "Latte": "latte",
        "LatteClass": "latte_class",
        "HunyuanDiT": "hunyuan_dit",
        "HunyuanDiTControlNet": "hunyuan_dit_controlnet",
        "HunyuanDiTPAG": "hunyuan_dit_pag",
        "PixArtAlpha": "pixart",
    }
    return names[type(pipe).__name__.removesuffix("Pipeline")]


def inputs_of(kind: str, steps: int = STEPS, seed: int = 0, batch: int = 1, size: int = 8) -> dict:
    """What to call the pipeline with: ``seed`` draws noise and prompt, ``size`` is that of the
    latents.
    """
    common = {"num_inference_steps": steps, "guidance_scale": 1.5}
    common["generator"] = torch.Generator().manual_seed(seed)
    if kind == "dit":
        return {
            "class_labels": [1 + seed] * batch,
            "output_type": "pt",
            "return_dict": False,
            **common,
        }
    if kind == "latte_class":
        labels = [1 + seed % 4] * batch
        return {"class_labels": labels, "output_type": "latent", "return_dict": False, **common}
    draw = torch.Generator().manual_seed(100 + seed)
    common |= {"prompt": None, "height": 8 * size, "width": 8 * size}
    common |= {"output_type": "latent", "return_dict": False}
    if kind.startswith("hunyuan_dit"):
        if kind == "hunyuan_dit_controlnet":
            common["control_image"] = torch.rand(1, 3, 8 * size, 8 * size, generator=draw)
        elif kind == "hunyuan_dit_pag":
            common["pag_scale"] = 2.0
        for suffix, length in (("", 5), ("_2", 4)):
            for sign in ("", "negative_"):
                common[f"{sign}prompt_embeds{suffix}"] = torch.randn(
                    batch, length, 16, generator=draw
                )
                mask = torch.ones(batch, length, dtype=torch.long)
                common[f"{sign}prompt_attention_mask{suffix}"] = mask
        return {**common, "use_resolution_binning": False}
    for sign in ("", "negative_"):
        common[f"{sign}prompt_embeds"] = torch.randn(batch, 5, 12, generator=draw)
    common |= {"negative_prompt": None, "clean_caption": False}
    if kind == "latte":
        return common
    for sign in ("", "negative_"):
        common[f"{sign}prompt_attention_mask"] = torch.ones(batch, 5)
    return {**common, "use_resolution_binning": False}


def sample(
    pipe: Any,
    steps: int = STEPS,
    seed: int = 0,
    after_step: Callable[[int], None] | None = None,
    **changes: Any,
) -> torch.Tensor:
    """One call of the pipeline; the latents it ended with. ``after_step`` is called inside its
    loop.
    """
    kind = kind_of(pipe)
    shape = {name: changes.pop(name) for name in ("batch", "size") if name in changes}
    inputs = {**inputs_of(kind, steps, seed, **shape), **changes}
    if kind == "latte":
        inputs["video_length"] = pipe.transformer.config.video_length
    if after_step is not None and kind == "dit":
        pipe.scheduler.after_step = after_step
    elif after_step is not None and kind == "pixart":
        inputs["callback"] = lambda i, t, latents: after_step(i + 1)
    elif after_step is not None:

        def on_step_end(pipe, i, t, tensors):
            after_step(i + 1)
            return tensors

        inputs["callback_on_step_end"] = on_step_end
    decoded: list[torch.Tensor] = []
    handle = pipe.vae.post_quant_conv.register_forward_pre_hook(
        lambda module, args: decoded.append(args[0])
    )
    # DiT's pipeline gives the scheduler no generator, and the ControlNet's its encoder none.
    torch.manual_seed(seed)
    try:
        output = pipe(**inputs)[0]
    finally:
        handle.remove()
        if after_step is not None and kind == "dit":
            del pipe.scheduler.after_step
    # DiT's pipeline has no latent output: taken where they enter the decoder, before any clamp.
    latents = decoded[-1] if kind == "dit" else output
    assert torch.isfinite(latents).all()
    return latents


def cached(kind: str, seed: int = 0, **options: Any) -> Any:
    """A pipeline with the cache applied: interval 3 in an open window, and ``hold``, unless told
    otherwise.
    """
    pipe = build(kind, seed=seed)
    return apply_to(pipe, **options)


def apply_to(pipe: Any, **options: Any) -> Any:
    """``apply_skip_cache`` with the test-local backbone, an open window and ``hold`` as
    defaults.
    """
    if "schedule" not in options and "config" not in options:
        options = {"interval": 3, "window": ALWAYS_OPEN, **options}
    if "config" not in options:
        options = {"estimator": "hold", **options}
    return apply_skip_cache(
        pipe, adapter=options.pop("adapter", backbone_of(kind_of(pipe))), **options
    )


@functools.cache
def reference(
    kind: str, steps: int = STEPS, seed: int = 0, weights: int = 0, estimator: str | None = "hold"
) -> torch.Tensor:
    """What a fresh pipeline gives, cached as by ``cached``; without a cache where the estimator is
    None.
    """
    pipe = build(kind, seed=weights)
    if estimator is not None:
        apply_to(pipe, estimator=estimator)
    return sample(pipe, steps, seed=seed)


def call_of(pipe: Any, **changes: Any) -> tuple[tuple, dict]:
    """The arguments of the pipeline's first call of its transformer."""
    calls: list[tuple[tuple, dict]] = []

    def record(module, args, kwargs):
        calls.append((args, dict(kwargs)))

    handle = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    sample(pipe, **{"steps": 1, **changes})
    handle.remove()
    return calls[0]


def flux_call(seed: int = 0, batch: int = 1, time: float = 1.0) -> dict:
    """Arguments for a call of the tiny Flux transformer; ``seed`` draws latents and prompt."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 6, 4, generator=draw),
        "encoder_hidden_states": torch.randn(batch, 3, 12, generator=draw),
        "pooled_projections": torch.randn(batch, 8, generator=draw),
        "timestep": torch.full((batch,), time),
        "img_ids": torch.arange(18.0).view(6, 3),
        "txt_ids": torch.zeros(3, 3),
        "return_dict": False,
    }


@contextmanager
def counted_layers(model: nn.Module) -> Iterator[Counter]:
    """Counts, by real forward hooks, how often each block runs: keys are (list index, block
    index).
    """
    counts: Counter = Counter()

    def counter(key):
        return lambda module, args, output: counts.update([key])

    handles = [
        block.register_forward_hook(counter((i, j)))
        for i, block_list in enumerate(block_lists(model))
        for j, block in enumerate(block_list._modules.values())
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


class Provenance:
    """Watches the layer where reuse resumes, and says whose deep feature each forward went on with.

    With ``hold`` a reused deep feature equals, bit for bit, the one that its refresh stored. The
    test sets ``owner`` to whatever is running; ``foreign`` lists the reuses of a feature that
    another owner computed.
    """

    def __init__(self, model: nn.Module, back_layers: int = 1) -> None:
        self.owner: Any = None
        self.reused = 0
        self.foreign: list[tuple[Any, Any]] = []
        self._seen: list[tuple[Any, torch.Tensor]] = []
        lists = block_lists(model)
        # Latte's two lists advance together, led by the first; Flux's follow each other.
        last = lists[0] if hasattr(model, "temporal_transformer_blocks") else lists[-1]
        block = list(last._modules.values())[-back_layers]
        block.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module, args, kwargs):
        deep = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        for owner, earlier in self._seen:
            if earlier.shape == deep.shape and torch.equal(earlier, deep):
                self.reused += 1
                if owner != self.owner:
                    self.foreign.append((owner, self.owner))
                return
        self._seen.append((self.owner, deep.clone()))


def surroundings(pipe: Any) -> dict:
    """Everything that a cache could leave behind on a pipeline: compared before and after."""
    model = pipe.transformer
    lists = block_lists(model)
    return {
        "transformer keys": sorted(vars(model)),
        "scheduler keys": sorted(vars(pipe.scheduler)),
        "pipe keys": sorted(vars(pipe)),
        "list keys": [sorted(vars(block_list)) for block_list in lists],
        "list types": [type(block_list) for block_list in lists],
        "model type": type(model),
        "state keys": list(model.state_dict()),
        "blocks": [id(block) for block_list in lists for block in block_list],
        "children": [(name, id(child)) for name, child in model.named_modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_always_called))
            for m in model.modules()
        ],
        "hook options": [
            (len(m._forward_hooks_with_kwargs), len(m._forward_pre_hooks_with_kwargs))
            for m in model.modules()
        ],
    }
