"""Flux: diffusers' ``FluxTransformer2DModel`` and ``Flux2Transformer2DModel``, two-stream blocks
and then single-stream ones; ``Flux3Transformer2DModel``, of which the joint blocks are layers.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = (
    "diffusers.FluxTransformer2DModel",
    "diffusers.Flux2Transformer2DModel",
    "diffusers.Flux3Transformer2DModel",
)

_FLOW = ("hidden_states", "encoder_hidden_states")
_SWAPPED = ("encoder_hidden_states", "hidden_states")


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    always_run: tuple[str, ...] = ()
    lists: tuple[BlockList, ...]
    if is_named(transformer, "FluxTransformer2DModel"):
        lists = (
            BlockList("transformer_blocks", _FLOW, _SWAPPED),
            BlockList("single_transformer_blocks", _FLOW, _SWAPPED),
        )
    elif is_named(transformer, "Flux2Transformer2DModel"):
        lists = (
            BlockList("transformer_blocks", _FLOW, _SWAPPED),
            BlockList("single_transformer_blocks", joins=_SWAPPED),
        )
    elif is_named(transformer, "Flux3Transformer2DModel"):
        lists = (BlockList("single_transformer_blocks", _FLOW, _SWAPPED),)
        # Each sees a part of the tokens: the text, the picture, pictures to edit.
        always_run = ("txt_mode_blocks", "mode_blocks.image", "mode_blocks.image_cond")
    else:
        return None
    return Backbone(
        name="flux",
        lists=lists,
        timestep=Timestep(noise=1.0),
        hidden_size=getattr(transformer, "inner_dim", None),
        always_run=always_run,
    )
