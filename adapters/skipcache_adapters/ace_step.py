"""ACE-Step: diffusers' ``AceStepTransformer1DModel``, one stream that looks at text, lyrics and
timbre.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.AceStepTransformer1DModel",)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "AceStepTransformer1DModel"):
        return None
    return Backbone(
        name="ace_step",
        lists=(BlockList("layers"),),
        timestep=Timestep(noise=1.0),
        hidden_size=getattr(getattr(transformer, "config", None), "hidden_size", None),
    )
