"""Sana: diffusers' ``SanaTransformer2DModel`` (text-to-image), ``SanaVideoTransformer3DModel``,
``SanaWMTransformer3DModel`` (camera-controlled video) and its refiner. A layer is one block.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, WholeCall, hookimpl, is_named

claims = (
    "diffusers.SanaTransformer2DModel",
    "diffusers.SanaVideoTransformer3DModel",
    "diffusers.SanaWMTransformer3DModel",
    "diffusers.SanaWMLTX2RefinerTransformer3DModel",
)

_REFINER = "SanaWMLTX2RefinerTransformer3DModel"
# Its calls between chunks, which fill its cache of keys and values.
_CAPTURES = tuple(
    WholeCall("kv_cache_mode", mode)
    for mode in ("capture_pre_rope", "inject_and_capture_post_rope")
)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if is_named(transformer, "SanaWMTransformer3DModel"):
        return Backbone(
            name="sana",
            lists=(BlockList("blocks", ("x",), "x"),),
            hidden_size=getattr(transformer, "hidden_size", None),
        )
    if is_named(transformer, "SanaTransformer2DModel", "SanaVideoTransformer3DModel", _REFINER):
        return Backbone(
            name="sana",
            lists=(BlockList("transformer_blocks"),),
            timestep=Timestep(noise=_noise_of(transformer)),
            hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
            whole_calls=_CAPTURES if is_named(transformer, _REFINER) else (),
        )
    return None


def _noise_of(transformer: nn.Module) -> float:
    """The timestep at pure noise: 1000, unless the config has it scaled."""
    config = getattr(transformer, "config", None)
    if is_named(transformer, _REFINER):
        return float(getattr(config, "timestep_scale_multiplier", 1000))
    is_image = is_named(transformer, "SanaTransformer2DModel")
    if is_image and getattr(config, "guidance_embeds", False):
        return 1.0  # Sana-Sprint
    return 1000.0 * getattr(config, "timestep_scale", 1.0)
