"""LTX: diffusers' ``LTXVideoTransformer3DModel``, and ``LTX2VideoTransformer3DModel`` with sound.

A layer is one block. In LTX-2 it takes and returns video and audio, each attending to the other.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, hookimpl, is_named

claims = (
    "diffusers.LTXVideoTransformer3DModel",
    "diffusers.LTX2VideoTransformer3DModel",
)

_VIDEO_AND_AUDIO = ("hidden_states", "audio_hidden_states")


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if is_named(transformer, "LTX2VideoTransformer3DModel"):
        blocks = BlockList("transformer_blocks", _VIDEO_AND_AUDIO, _VIDEO_AND_AUDIO)
    elif is_named(transformer, "LTXVideoTransformer3DModel"):
        blocks = BlockList("transformer_blocks")
    else:
        return None
    return Backbone(
        name="ltx",
        lists=(blocks,),
        hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
    )
