"""Allegro: diffusers' ``AllegroTransformer3DModel``, one stream that looks at the text."""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, hookimpl, is_named

claims = ("diffusers.AllegroTransformer3DModel",)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "AllegroTransformer3DModel"):
        return None
    return Backbone(
        name="allegro",
        lists=(BlockList("transformer_blocks"),),
        hidden_size=getattr(transformer, "inner_dim", None),
    )
