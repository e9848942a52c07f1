"""Transformers of no family: diffusers' ``PriorTransformer`` (of unCLIP, Kandinsky and Shap-E; it
denoises an embedding) and ``T5FilmDecoder`` (a spectrogram).
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.PriorTransformer", "diffusers.T5FilmDecoder")

_IN_A_UNET = (
    "It is one of many parts of a U-Net, each with a block or a few, and not the model that a step "
    "calls."
)

refusals = {
    "TransformerTemporalModel": _IN_A_UNET,
    "TransformerSpatioTemporalModel": _IN_A_UNET,
    "DreamLiteTransformer2DModel": _IN_A_UNET,
    "DualTransformer2DModel": _IN_A_UNET,
    "RFD4ProteinaTransformer": (
        "Its forward goes through all layers several times, how often changes from step to step, "
        "and between the layers it updates pairs of residues that no layer returns."
    ),
}


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if is_named(transformer, "PriorTransformer"):
        return Backbone(
            name="others",
            lists=(BlockList("transformer_blocks"),),
            hidden_size=getattr(getattr(transformer, "proj_in", None), "out_features", None),
        )
    if is_named(transformer, "T5FilmDecoder"):
        return Backbone(
            name="others",
            lists=(BlockList("decoders", returns=("hidden_states",)),),
            timestep=Timestep("decoder_noise_time", noise=1.0),
            hidden_size=getattr(getattr(transformer, "spec_out", None), "in_features", None),
        )
    return None
