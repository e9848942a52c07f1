"""Chroma: diffusers' ``ChromaTransformer2DModel``, blocks of picture and text and then blocks of
both in one sequence.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.ChromaTransformer2DModel",)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "ChromaTransformer2DModel"):
        return None
    flow = ("hidden_states", "encoder_hidden_states")
    swapped = ("encoder_hidden_states", "hidden_states")
    return Backbone(
        name="chroma",
        lists=(
            BlockList("transformer_blocks", takes=flow, returns=swapped),
            BlockList("single_transformer_blocks", joins=swapped),
        ),
        timestep=Timestep(noise=1.0),
        hidden_size=getattr(transformer, "inner_dim", None),
        # They make the modulation of all blocks out of the time.
        always_run=("distilled_guidance_layer.layers", "distilled_guidance_layer.norms"),
    )
