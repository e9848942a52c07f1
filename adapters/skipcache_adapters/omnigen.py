"""OmniGen: diffusers' ``OmniGenTransformer2DModel``.

A layer is one block. The conditions, the time and the picture are one sequence.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.OmniGenTransformer2DModel",)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "OmniGenTransformer2DModel"):
        return None
    return Backbone(
        name="omnigen",
        lists=(BlockList("layers"),),
        timestep=Timestep(noise=0.0, clean=1.0),
        hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
    )
