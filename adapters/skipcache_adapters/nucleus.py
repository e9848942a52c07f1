"""Nucleus-Image: diffusers' ``NucleusMoEImageTransformer2DModel``, one stream that looks at the
text, most of its blocks mixtures of experts.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.NucleusMoEImageTransformer2DModel",)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "NucleusMoEImageTransformer2DModel"):
        return None
    return Backbone(
        name="nucleus",
        lists=(BlockList("transformer_blocks"),),
        timestep=Timestep(noise=1.0),
        hidden_size=getattr(transformer, "inner_dim", None),
    )
