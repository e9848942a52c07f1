"""Mochi: diffusers' ``MochiTransformer3DModel``, blocks of a picture and a text stream."""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.MochiTransformer3DModel",)

_FLOW = ("hidden_states", "encoder_hidden_states")


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name. Its time rises from noise to the picture."""
    if not is_named(transformer, "MochiTransformer3DModel"):
        return None
    return Backbone(
        name="mochi",
        lists=(BlockList("transformer_blocks", _FLOW, _FLOW),),
        timestep=Timestep(noise=0.0, clean=1000.0),
        hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
    )
