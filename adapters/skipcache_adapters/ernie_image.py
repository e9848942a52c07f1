"""ERNIE-Image: diffusers' ``ErnieImageTransformer2DModel``, picture and text in one stream."""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, hookimpl, is_named

claims = ("diffusers.ErnieImageTransformer2DModel",)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "ErnieImageTransformer2DModel"):
        return None
    return Backbone(
        name="ernie_image",
        lists=(BlockList("layers", ("x",), "x"),),
        hidden_size=getattr(transformer, "hidden_size", None),
    )
