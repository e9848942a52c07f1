"""Ideogram 4: diffusers' ``Ideogram4Transformer2DModel``, text and picture in one stream."""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.Ideogram4Transformer2DModel",)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name. Time rises from noise to the picture."""
    if not is_named(transformer, "Ideogram4Transformer2DModel"):
        return None
    return Backbone(
        name="ideogram",
        lists=(BlockList("layers"),),
        timestep=Timestep(noise=0.0, clean=1.0),
        hidden_size=getattr(transformer, "hidden_size", None),
    )
