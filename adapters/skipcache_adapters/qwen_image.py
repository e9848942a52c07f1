"""Qwen-Image: diffusers' ``QwenImageTransformer2DModel``, two-stream blocks, and
``QwenImage21Transformer2DModel``, blocks of prompt and picture in one sequence.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = (
    "diffusers.QwenImageTransformer2DModel",
    "diffusers.QwenImage21Transformer2DModel",
)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if is_named(transformer, "QwenImageTransformer2DModel"):
        blocks = BlockList(
            "transformer_blocks",
            takes=("hidden_states", "encoder_hidden_states"),
            returns=("encoder_hidden_states", "hidden_states"),
        )
    elif is_named(transformer, "QwenImage21Transformer2DModel"):
        blocks = BlockList("transformer_blocks")
    else:
        return None
    return Backbone(
        name="qwen_image",
        lists=(blocks,),
        timestep=Timestep(noise=1.0),
        hidden_size=getattr(transformer, "inner_dim", None),
    )
