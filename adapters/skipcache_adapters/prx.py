"""PRX: diffusers' ``PRXTransformer2DModel``. A layer is one block."""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.PRXTransformer2DModel",)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "PRXTransformer2DModel"):
        return None
    return Backbone(
        name="prx",
        lists=(BlockList("blocks"),),
        timestep=Timestep(noise=1.0),
        hidden_size=getattr(transformer, "hidden_size", None),
    )
