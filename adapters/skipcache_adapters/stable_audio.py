"""Stable Audio: diffusers' ``StableAudioDiTModel`` and ``StableAudio3DiTModel``, one stream that
looks at the text.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.StableAudioDiTModel", "diffusers.StableAudio3DiTModel")


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "StableAudioDiTModel", "StableAudio3DiTModel"):
        return None
    return Backbone(
        name="stable_audio",
        lists=(BlockList("transformer_blocks"),),
        timestep=Timestep(noise=1.0),
        hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
    )
