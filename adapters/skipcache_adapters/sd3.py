"""Stable Diffusion 3: diffusers' ``SD3Transformer2DModel``. A layer is a block of picture and text;
the last one returns no text.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, hookimpl, is_named

claims = ("diffusers.SD3Transformer2DModel",)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "SD3Transformer2DModel"):
        return None
    return Backbone(
        name="sd3",
        lists=(
            BlockList(
                "transformer_blocks",
                takes=("hidden_states", "encoder_hidden_states"),
                returns=("encoder_hidden_states", "hidden_states"),
            ),
        ),
        hidden_size=getattr(transformer, "inner_dim", None),
    )
