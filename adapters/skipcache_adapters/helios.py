"""Helios: diffusers' ``HeliosTransformer3DModel``, which makes a video chunk by chunk.

A layer is one block over the tokens of the history and those of the chunk under way.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, hookimpl, is_named

claims = ("diffusers.HeliosTransformer3DModel",)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "HeliosTransformer3DModel"):
        return None
    return Backbone(
        name="helios",
        lists=(BlockList("blocks"),),
        hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
    )
