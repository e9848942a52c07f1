"""LongCat: diffusers' ``LongCatImageTransformer2DModel``, two-stream blocks and then single-stream
ones; ``LongCatAudioDiTTransformer``, blocks that read the text and leave it as it is.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = (
    "diffusers.LongCatImageTransformer2DModel",
    "diffusers.LongCatAudioDiTTransformer",
)

_FLOW = ("hidden_states", "encoder_hidden_states")
_SWAPPED = ("encoder_hidden_states", "hidden_states")


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if is_named(transformer, "LongCatImageTransformer2DModel"):
        return Backbone(
            name="longcat",
            lists=(
                BlockList("transformer_blocks", _FLOW, _SWAPPED),
                BlockList("single_transformer_blocks", _FLOW, _SWAPPED),
            ),
            timestep=Timestep(noise=1.0),
            hidden_size=getattr(transformer, "inner_dim", None),
        )
    if is_named(transformer, "LongCatAudioDiTTransformer"):
        return Backbone(
            name="longcat",
            lists=(BlockList("blocks"),),
            timestep=Timestep(noise=0.0, clean=1.0),
            hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
        )
    return None
