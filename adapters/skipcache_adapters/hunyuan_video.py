"""HunyuanVideo and its kin: diffusers' ``HunyuanVideoTransformer3DModel``,
``HunyuanVideoFramepackTransformer3DModel``, ``HunyuanVideo15Transformer3DModel`` and
``HunyuanImageTransformer2DModel``.

A layer is one block over picture and text; two-stream blocks first and then, but in 1.5,
single-stream ones. The refiner of the prompt always runs.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, hookimpl, is_named

claims = (
    "diffusers.HunyuanVideoTransformer3DModel",
    "diffusers.HunyuanVideoFramepackTransformer3DModel",
    "diffusers.HunyuanVideo15Transformer3DModel",
    "diffusers.HunyuanImageTransformer2DModel",
)

_FLOW = ("hidden_states", "encoder_hidden_states")
_DOUBLE = BlockList("transformer_blocks", _FLOW, _FLOW)
_SINGLE = BlockList("single_transformer_blocks", _FLOW, _FLOW)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if is_named(transformer, "HunyuanVideo15Transformer3DModel"):
        lists: tuple[BlockList, ...] = (_DOUBLE,)
    elif is_named(
        transformer,
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanImageTransformer2DModel",
    ):
        lists = (_DOUBLE, _SINGLE)
    else:
        return None
    return Backbone(
        name="hunyuan_video",
        lists=lists,
        hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
        always_run=("context_embedder.token_refiner.refiner_blocks",),
    )
