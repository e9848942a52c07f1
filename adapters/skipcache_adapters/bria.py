"""Bria: diffusers' ``BriaTransformer2DModel``, two-stream blocks and then single-stream ones;
``BriaFiboTransformer2DModel``, the same with text of its own for each block;
``BriaFibo2Transformer2DModel``, single-stream blocks.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = (
    "diffusers.BriaTransformer2DModel",
    "diffusers.BriaFiboTransformer2DModel",
    "diffusers.BriaFibo2Transformer2DModel",
)

_FLOW = ("hidden_states", "encoder_hidden_states")
_SWAPPED = ("encoder_hidden_states", "hidden_states")


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if is_named(transformer, "BriaTransformer2DModel"):
        return Backbone(
            name="bria",
            lists=(
                BlockList("transformer_blocks", _FLOW, _SWAPPED),
                BlockList("single_transformer_blocks", _FLOW, _SWAPPED),
            ),
            hidden_size=getattr(transformer, "inner_dim", None),
        )
    if is_named(transformer, "BriaFiboTransformer2DModel"):
        return Backbone(
            name="bria",
            lists=(
                BlockList("transformer_blocks", _FLOW, _SWAPPED),
                BlockList("single_transformer_blocks", joins=_SWAPPED),
            ),
            hidden_size=getattr(transformer, "inner_dim", None),
            always_run=("caption_projection",),
        )
    if is_named(transformer, "BriaFibo2Transformer2DModel"):
        return Backbone(
            name="bria",
            lists=(BlockList("layers", takes=("x",), returns="x"),),
            timestep=Timestep(noise=1.0),
            hidden_size=getattr(getattr(transformer, "x_embedder", None), "out_features", None),
            always_run=("noise_refiner", "perceiver.layers"),
        )
    return None
