"""MiniMax: diffusers' ``MiniMaxH3Transformer3DModel`` (text, audio and video in one sequence) and
``MiniMaxMusic3Transformer1DModel``.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.MiniMaxH3Transformer3DModel", "diffusers.MiniMaxMusic3Transformer1DModel")

refusals = {
    "MiniMaxMusic3RVQDepthDecoder": (
        "It predicts the codes of an audio frame one after the other, and has no denoising steps."
    ),
}


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name. Time rises from noise to the sample."""
    is_h3 = is_named(transformer, "MiniMaxH3Transformer3DModel")
    if not is_h3 and not is_named(transformer, "MiniMaxMusic3Transformer1DModel"):
        return None
    return Backbone(
        name="minimax",
        lists=(BlockList("transformer_blocks"),),
        timestep=Timestep(noise=0.0, clean=1.0),
        hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
        always_run=("token_refiner.refiner_blocks",) if is_h3 else (),
    )
