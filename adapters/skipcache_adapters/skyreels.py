"""SkyReels V2: diffusers' ``SkyReelsV2Transformer3DModel``.

A layer is one block: self-attention over all frames, cross-attention to the prompt, feed-forward.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, hookimpl, is_named

claims = ("diffusers.SkyReelsV2Transformer3DModel",)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "SkyReelsV2Transformer3DModel"):
        return None
    return Backbone(
        name="skyreels",
        lists=(BlockList("blocks"),),
        hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
    )
