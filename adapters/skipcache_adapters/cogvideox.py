"""CogVideoX and ConsisID: diffusers' ``CogVideoXTransformer3DModel`` and
``ConsisIDTransformer3DModel``.

A layer is one block over video and text. ConsisID adds what its face attentions say between the
blocks.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, hookimpl, is_named

claims = (
    "diffusers.CogVideoXTransformer3DModel",
    "diffusers.ConsisIDTransformer3DModel",
)

_FLOW = ("hidden_states", "encoder_hidden_states")
_FACES = "perceiver_cross_attention"


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"):
        return None
    return Backbone(
        name="cogvideox",
        lists=(BlockList("transformer_blocks", _FLOW, _FLOW),),
        hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
        interleaved=(BlockList(_FACES),) if hasattr(transformer, _FACES) else (),
    )
