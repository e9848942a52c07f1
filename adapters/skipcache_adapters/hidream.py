"""HiDream: diffusers' ``HiDreamImageTransformer2DModel``, two-stream blocks and then single-stream
ones. Each block is given text of its own, which it hands on to nobody.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.HiDreamImageTransformer2DModel",)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "HiDreamImageTransformer2DModel"):
        return None
    flow = ("hidden_states", "encoder_hidden_states")
    return Backbone(
        name="hidream",
        lists=(
            BlockList("double_stream_blocks", takes=flow, returns=flow),
            BlockList("single_stream_blocks", joins=flow),
        ),
        timestep=Timestep("timesteps"),
        hidden_size=getattr(transformer, "inner_dim", None),
        always_run=("caption_projection",),
    )
