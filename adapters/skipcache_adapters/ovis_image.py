"""Ovis-Image: diffusers' ``OvisImageTransformer2DModel``, two-stream blocks and then single-stream
ones.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.OvisImageTransformer2DModel",)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "OvisImageTransformer2DModel"):
        return None
    flow = ("hidden_states", "encoder_hidden_states")
    swapped = ("encoder_hidden_states", "hidden_states")
    return Backbone(
        name="ovis_image",
        lists=(
            BlockList("transformer_blocks", flow, swapped),
            BlockList("single_transformer_blocks", flow, swapped),
        ),
        timestep=Timestep(noise=1.0),
        hidden_size=getattr(transformer, "inner_dim", None),
    )
