"""AuraFlow: diffusers' ``AuraFlowTransformer2DModel``, blocks of picture and text and then blocks
of both in one sequence.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.AuraFlowTransformer2DModel",)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name. A model may have no block of the second kind."""
    if not is_named(transformer, "AuraFlowTransformer2DModel"):
        return None
    flow = ("hidden_states", "encoder_hidden_states")
    swapped = ("encoder_hidden_states", "hidden_states")
    joint = BlockList("joint_transformer_blocks", takes=flow, returns=swapped)
    single = BlockList("single_transformer_blocks", joins=swapped)
    has_single = len(getattr(transformer, single.path, ())) > 0
    return Backbone(
        name="auraflow",
        lists=(joint, single) if has_single else (joint,),
        timestep=Timestep(noise=1.0),
        hidden_size=getattr(transformer, "inner_dim", None),
    )
