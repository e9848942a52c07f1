"""Kandinsky: diffusers' ``Kandinsky5Transformer3DModel``, ``Kandinsky6Transformer3DModel`` (video
and audio) and ``Kandinsky6SRTransformer3DModel`` (super-resolution).

A layer is one visual block; in Kandinsky 6 the audio flows through it too. The text blocks always
run.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, hookimpl, is_named

claims = (
    "diffusers.Kandinsky5Transformer3DModel",
    "diffusers.Kandinsky6Transformer3DModel",
    "diffusers.Kandinsky6SRTransformer3DModel",
)

# Of each class: what flows through its blocks, and the lists of blocks that the text goes through.
_MODELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Kandinsky5Transformer3DModel": (("visual_embed",), ("text_transformer_blocks",)),
    "Kandinsky6Transformer3DModel": (
        ("vis", "aud"),
        ("video_text_transformer_blocks", "audio_text_transformer_blocks"),
    ),
    "Kandinsky6SRTransformer3DModel": (("hidden_states",), ()),
}


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    for name, (flow, text_lists) in _MODELS.items():
        if is_named(transformer, name):
            returns = flow if len(flow) > 1 else flow[0]
            return Backbone(
                name="kandinsky",
                lists=(BlockList("visual_transformer_blocks", flow, returns),),
                hidden_size=getattr(getattr(transformer, "config", None), "model_dim", None),
                always_run=text_lists,
            )
    return None
