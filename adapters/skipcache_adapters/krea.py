"""Krea 2: diffusers' ``Krea2Transformer2DModel``, the text and the picture in one stream."""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.Krea2Transformer2DModel",)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "Krea2Transformer2DModel"):
        return None
    return Backbone(
        name="krea",
        lists=(BlockList("transformer_blocks"),),
        timestep=Timestep(noise=1.0),
        hidden_size=getattr(transformer, "hidden_size", None),
        always_run=("text_fusion.layerwise_blocks", "text_fusion.refiner_blocks"),
    )
