"""PixArt-Alpha and PixArt-Sigma: diffusers' ``PixArtTransformer2DModel``. A layer is one block."""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, hookimpl, is_named

claims = ("diffusers.PixArtTransformer2DModel",)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "PixArtTransformer2DModel"):
        return None
    return Backbone(
        name="pixart",
        lists=(BlockList("transformer_blocks"),),
        hidden_size=getattr(transformer, "inner_dim", None),
    )
