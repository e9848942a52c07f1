"""JoyImage: diffusers' ``JoyImageEditTransformer3DModel`` and
``JoyImageEditPlusTransformer3DModel``, blocks of a picture and a text stream.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, hookimpl, is_named

claims = (
    "diffusers.JoyImageEditTransformer3DModel",
    "diffusers.JoyImageEditPlusTransformer3DModel",
)

_FLOW = ("hidden_states", "encoder_hidden_states")


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    names = ("JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel")
    if not is_named(transformer, *names):
        return None
    return Backbone(
        name="joyimage",
        lists=(BlockList("double_blocks", _FLOW, _FLOW),),
        hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
    )
