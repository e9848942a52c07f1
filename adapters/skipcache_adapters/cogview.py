"""CogView: diffusers' ``CogView3PlusTransformer2DModel`` and ``CogView4Transformer2DModel``.

A layer is one block. Picture and text flow through it side by side.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, hookimpl, is_named

claims = ("diffusers.CogView3PlusTransformer2DModel", "diffusers.CogView4Transformer2DModel")

_FLOW = ("hidden_states", "encoder_hidden_states")


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"):
        return None
    return Backbone(
        name="cogview",
        lists=(BlockList("transformer_blocks", _FLOW, _FLOW),),
        hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
    )
