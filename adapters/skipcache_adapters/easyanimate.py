"""EasyAnimate: diffusers' ``EasyAnimateTransformer3DModel``, a video and a text stream."""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, hookimpl, is_named

claims = ("diffusers.EasyAnimateTransformer3DModel",)

_FLOW = ("hidden_states", "encoder_hidden_states")


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "EasyAnimateTransformer3DModel"):
        return None
    return Backbone(
        name="easyanimate",
        lists=(BlockList("transformer_blocks", _FLOW, _FLOW),),
        hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
    )
