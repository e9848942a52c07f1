"""Motif-Video: diffusers' ``MotifVideoTransformer3DModel``, two-stream blocks and then
single-stream ones. The last of these, the decoder, begin again at the noisy video, with what the
others made of it in place of the text.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, hookimpl, is_named

claims = ("diffusers.MotifVideoTransformer3DModel",)

_FLOW = ("hidden_states", "encoder_hidden_states")


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "MotifVideoTransformer3DModel"):
        return None
    singles = len(getattr(transformer, "single_transformer_blocks", ()))
    decoder_layers = getattr(transformer, "num_decoder_layers", 0)
    breaks = (singles - decoder_layers,) if decoder_layers else ()
    return Backbone(
        name="motif_video",
        lists=(
            BlockList("transformer_blocks", _FLOW, _FLOW),
            BlockList("single_transformer_blocks", _FLOW, _FLOW, breaks=breaks),
        ),
        hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
    )
