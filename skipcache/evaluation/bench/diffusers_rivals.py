"""The caches that come with diffusers, each by its own configuration.

They are switched on by ``transformer.enable_cache(config)``. What diffusers' own pipelines do for
the models that they know is done here for all, as a user of those models would have to:

- A model without diffusers' ``CacheMixin`` (``DiTTransformer2DModel``, ``HunyuanDiT2DModel``,
  ``PixArtTransformer2DModel``) is given it, so that the pipeline resets the cache after each run.
- Where the pipeline names no ``cache_context``, one is entered around each call of the transformer:
  ``"pass 0"``, and ``"pass 1"`` for a second call at the same timestep.
- Where the pipeline has no ``current_timestep`` (``DiTPipeline``), the callback that asks for it is
  told the timestep that the transformer is called with.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

import torch
from torch import nn

from skipcache.evaluation.bench.methods import Method, Unavailable
from skipcache.evaluation.bench.surgery import (
    Calls,
    give_cache_mixin,
    quiet,
    restored,
    transformer_of,
    transformers_in,
)

Sampler = Callable[[Any, int], object]
"""Calls a pipeline with a number of steps, as the benchmark does."""

Build = Callable[[nn.Module, Calls], Any]
"""A configuration for a transformer, of which the calls are watched."""

_CALLS = {
    "cache_context": "the pipeline's; one around each call where it names none",
    "current_timestep": "the pipeline's; that of the transformer's call where it has none",
}

# What a pipeline stacks over the unconditional and the conditional half, beyond FasterCache's own
# list: DiT's, Stable Diffusion 3's and HunyuanDiT's.
_HALVED = (
    "hidden_states",
    "encoder_hidden_states",
    "timestep",
    "attention_mask",
    "encoder_attention_mask",
    "class_labels",
    "pooled_projections",
    "text_embedding_mask",
    "encoder_hidden_states_t5",
    "text_embedding_mask_t5",
    "image_meta_size",
    "style",
)

_BLOCK = r"[^.]*block[^.]*\.[^.]+"
"""Every block, as in TaylorSeer's lite mode."""

_SUBLAYERS = r"[^.]*(blocks|layers)\.\d+\.(attn\d?|ff|ff_context|ffn|mlp|feed_forward)"
"""Attention and MLP of every block, which is what the TaylorSeer paper caches."""


@contextmanager
def diffusers_cache(pipeline: Any, build: Build) -> Iterator[None]:
    """A pipeline that samples by one of diffusers' caches, in each of its transformers.

    Raises:
        Unavailable: diffusers refuses the model, or hooks nothing in it.
    """
    transformer_of(pipeline)
    with restored(pipeline), quiet("diffusers.hooks"), ExitStack() as stack:
        for transformer in transformers_in(pipeline):
            stack.enter_context(_cached(pipeline, transformer, build))
        yield


@contextmanager
def _cached(pipeline: Any, transformer: Any, build: Build) -> Iterator[None]:
    give_cache_mixin(transformer)
    calls = Calls(pipeline, transformer)
    with calls.watched():
        try:
            config = build(transformer, calls)
            transformer.enable_cache(config)
        except Unavailable:
            raise
        except Exception as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from error
        if not _has_hooks(transformer):
            raise Unavailable(
                f"{type(config).__name__} found nothing to hook in {type(transformer).__name__} "
                "(and said nothing)."
            )
        try:
            yield
        finally:
            transformer.disable_cache()


def _has_hooks(transformer: nn.Module) -> bool:
    registries = (getattr(module, "_diffusers_hook", None) for module in transformer.modules())
    return any(registry is not None and registry.hooks for registry in registries)


def diffusers_method(
    name: str, setting: str, options: Mapping[str, Any], config: str, build: Build | None = None
) -> Method:
    """One of diffusers' caches.

    Args:
        name: of the method.
        setting: in words.
        options: those of the configuration that JSON can hold.
        config: class of the configuration, in diffusers.
        build: makes it; by default of the options as they are.
    """

    def of_options(transformer: nn.Module, calls: Calls) -> Any:
        return _config_class(config)(**options)

    def applied(pipeline: Any, steps: int) -> Any:
        return diffusers_cache(pipeline, build or of_options)

    return Method("diffusers", name, setting, {**options, **_CALLS}, applied, spoils_pipeline=True)


def _config_class(name: str) -> Any:
    import diffusers

    found = getattr(diffusers, name, None)
    if found is None:
        raise Unavailable(f"diffusers {diffusers.__version__} has no {name}.")
    return found


def first_block_cache(threshold: float) -> Method:
    """FBCache: every block after the first is left out while the first changes little."""
    return diffusers_method(
        "FirstBlockCache",
        f"threshold {threshold:g}",
        {"threshold": threshold},
        "FirstBlockCacheConfig",
    )


def pyramid_attention_broadcast(
    spatial: int, temporal: int, cross: int, timesteps: tuple[int, int] = (100, 800)
) -> Method:
    """PAB: attention outputs are reused, the rest of each block runs.

    Args:
        spatial: spatial self-attention is computed every so many calls.
        temporal: likewise over frames. diffusers takes ``spatial`` for Latte's, as its pattern for
            spatial attention matches the names of both.
        cross: likewise to the prompt.
        timesteps: between which outputs are reused.
    """
    kinds = {"spatial": spatial, "temporal": temporal, "cross": cross}
    options: dict[str, Any] = {f"{kind}_attention_block_skip_range": n for kind, n in kinds.items()}
    options |= {f"{kind}_attention_timestep_skip_range": list(timesteps) for kind in kinds}

    def build(transformer: nn.Module, calls: Calls) -> Any:
        return _config_class("PyramidAttentionBroadcastConfig")(
            **options, current_timestep_callback=calls.current_timestep
        )

    setting = f"ranges {spatial}/{temporal}/{cross}, timesteps {timesteps[0]} to {timesteps[1]}"
    name = "PyramidAttentionBroadcast"
    return diffusers_method(name, setting, options, "PyramidAttentionBroadcastConfig", build)


def faster_cache(
    unconditional: int, spatial: int = 2, timesteps: tuple[int, int] = (-1, 781)
) -> Method:
    """FasterCache: the unconditional half is estimated, attention of the other one extrapolated.

    It wants both halves in one batch, the unconditional one first. DiT's pipeline puts it last:
    there the conditional half is what is estimated.

    Args:
        unconditional: that half is computed every so many calls.
        spatial: attention, likewise.
        timesteps: between which the half is left out.
    """
    options: dict[str, Any] = {
        "spatial_attention_block_skip_range": spatial,
        "temporal_attention_block_skip_range": spatial,
        "spatial_attention_timestep_skip_range": [-1, 681],
        "unconditional_batch_skip_range": unconditional,
        "unconditional_batch_timestep_skip_range": list(timesteps),
    }

    def build(transformer: nn.Module, calls: Calls) -> Any:
        return _config_class("FasterCacheConfig")(
            **options,
            attention_weight_callback=lambda module: 0.3,
            tensor_format=_tensor_format(transformer),
            is_guidance_distilled=_is_guidance_distilled(transformer),
            current_timestep_callback=calls.current_timestep,
            _unconditional_conditional_input_kwargs_identifiers=list(_HALVED),
        )

    setting = f"unconditional every {unconditional}, attention every {spatial}"
    said = {**options, "attention_weight": 0.3, "halved": list(_HALVED)}
    return diffusers_method("FasterCache", setting, said, "FasterCacheConfig", build)


def _is_guidance_distilled(transformer: Any) -> bool:
    """Whether its pipeline makes no unconditional half: guidance is an input, or there is none."""
    return type(transformer).__name__.startswith("Flux") or bool(
        getattr(transformer.config, "guidance_embeds", False)
    )


def _tensor_format(transformer: nn.Module) -> str:
    """The layout of its latents, in FasterCache's words."""
    name = type(transformer).__name__
    if name.startswith("CogVideoX"):
        return "BFCHW"
    return "BCFHW" if "3D" in name else "BCHW"


def taylor_seer(interval: int, where: str, *, first_steps: int = 3, order: int = 1) -> Method:
    """TaylorSeer.

    Args:
        interval: everything is computed every so many steps.
        where: ``"attention"``: diffusers' default patterns, which find nothing in models whose
            attention is called ``attn1``; ``"sublayers"``: attention and MLP of every block, as
            in the paper; ``"output"``: the last layer alone, the blocks left out: the lite mode,
            or its patterns with the name of this model's last layer.
        first_steps: computed in full.
        order: of the expansion.
    """
    options: dict[str, Any] = {
        "cache_interval": interval,
        "max_order": order,
        "disable_cache_before_step": first_steps,
    }
    patterns: dict[str, Any] = {"sublayers": {"cache_identifiers": [_SUBLAYERS]}}
    patterns["output"] = {"skip_predict_identifiers": [_BLOCK], "cache_identifiers": ["last layer"]}
    said = {**options, "taylor_factors_dtype": "float32", **patterns.get(where, {})}

    def build(transformer: nn.Module, calls: Calls) -> Any:
        chosen = patterns.get(where, {})
        if where == "output":
            last = _last_layer(transformer)
            chosen = {**chosen, "cache_identifiers": [re.escape(last)]}
        kind = _config_class("TaylorSeerCacheConfig")
        return kind(**options, taylor_factors_dtype=torch.float32, **chosen)

    setting = f"{where}, interval {interval}, {first_steps} first steps"
    return diffusers_method("TaylorSeer", setting, said, "TaylorSeerCacheConfig", build)


def _last_layer(transformer: nn.Module) -> str:
    linear = [name for name, child in transformer.named_children() if isinstance(child, nn.Linear)]
    if not linear:
        raise Unavailable(f"{type(transformer).__name__} does not end in a linear layer.")
    return linear[-1]


class MagRatios:
    """Measures MagCache's ratios as its documentation says: a calibration run, whose printed list
    is given to the configuration. Once for each model and number of steps.

    Args:
        sample: calls the pipeline as the benchmark will.
    """

    def __init__(self, sample: Sampler) -> None:
        self._sample = sample
        self._known: dict[tuple[Any, ...], list[float]] = {}

    def of(self, pipeline: Any, steps: int) -> list[float]:
        """The ratios, one a step. The first list printed is taken: that of the conditional pass.

        Raises:
            Unavailable: MagCache refuses the model, or prints nothing.
        """
        key = (steps, _fingerprint(transformer_of(pipeline)))
        if key not in self._known:
            self._known[key] = self._measure(pipeline, steps)
        return self._known[key]

    def _measure(self, pipeline: Any, steps: int) -> list[float]:
        def build(transformer: nn.Module, calls: Calls) -> Any:
            return _config_class("MagCacheConfig")(calibrate=True, num_inference_steps=steps)

        printed = io.StringIO()
        with (
            diffusers_cache(pipeline, build),
            torch.random.fork_rng(),
            redirect_stdout(printed),
        ):
            self._sample(pipeline, steps)
        found = re.search(r"Calibration Complete[^\n]*\n\[([^\]]*)\]", printed.getvalue())
        if found is None:
            raise Unavailable(
                f"MagCache's calibration of {steps} steps printed no ratios: the transformer was "
                "called less often."
            )
        return [float(ratio) for ratio in found[1].split(",")]


def _fingerprint(transformer: nn.Module) -> tuple[Any, ...]:
    """Tells models from each other, and a copy not from its original."""
    firsts = tuple(float(p.detach().reshape(-1)[0]) for p in transformer.parameters())
    return type(transformer).__name__, hash(firsts)


def mag_cache(ratios: MagRatios, threshold: float, most: int, first: float = 0.2) -> Method:
    """MagCache.

    Args:
        ratios: measures them.
        threshold: of the accumulated error.
        most: steps left out in a row, at most.
        first: fraction of the steps that are computed at the start.
    """
    options = {"threshold": threshold, "max_skip_steps": most, "retention_ratio": first}

    @contextmanager
    def applied(pipeline: Any, steps: int) -> Iterator[None]:
        measured = ratios.of(pipeline, steps)

        def build(transformer: nn.Module, calls: Calls) -> Any:
            kind = _config_class("MagCacheConfig")
            return kind(**options, num_inference_steps=steps, mag_ratios=measured)

        with diffusers_cache(pipeline, build):
            yield

    setting = f"threshold {threshold:g}, at most {most} in a row"
    said = {**options, "mag_ratios": "measured by a calibration run", **_CALLS}
    return Method("diffusers", "MagCache", setting, said, applied, spoils_pipeline=True)
