"""Lumina: diffusers' ``LuminaNextDiT2DModel`` and ``Lumina2Transformer2DModel``.

A layer is one block of ``layers``. The refiners of Lumina 2, which text and picture go through
before they are joined, always run.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.LuminaNextDiT2DModel", "diffusers.Lumina2Transformer2DModel")


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    is_second = is_named(transformer, "Lumina2Transformer2DModel")
    if not is_second and not is_named(transformer, "LuminaNextDiT2DModel"):
        return None
    return Backbone(
        name="lumina",
        lists=(BlockList("layers"),),
        timestep=Timestep(noise=0.0, clean=1.0),
        hidden_size=getattr(getattr(transformer, "config", None), "hidden_size", None),
        always_run=("noise_refiner", "context_refiner") if is_second else (),
    )
