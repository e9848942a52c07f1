"""GLM-Image: diffusers' ``GlmImageTransformer2DModel``.

A layer is one block. Picture and text flow through it side by side.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.GlmImageTransformer2DModel",)

_FLOW = ("hidden_states", "encoder_hidden_states")


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "GlmImageTransformer2DModel"):
        return None
    return Backbone(
        name="glm_image",
        lists=(BlockList("transformer_blocks", _FLOW, _FLOW),),
        timestep=Timestep(noise=999.0, clean=-1.0),  # it is told the scheduler's timestep less 1
        hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
    )
