"""Z-Image: diffusers' ``ZImageTransformer2DModel``. A layer is one block of ``layers``.

The refiners, which pictures and text go through before they are joined, always run.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.ZImageTransformer2DModel",)

_REFINERS = ("noise_refiner", "context_refiner", "siglip_refiner")


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name; the third refiner is there only where the model takes pictures too."""
    if not is_named(transformer, "ZImageTransformer2DModel"):
        return None
    refiners = tuple(
        name for name in _REFINERS if isinstance(getattr(transformer, name, None), nn.ModuleList)
    )
    return Backbone(
        name="z_image",
        lists=(BlockList("layers", ("x",), "x"),),
        timestep=Timestep("t", noise=0.0, clean=1.0),
        hidden_size=getattr(transformer, "dim", None),
        always_run=refiners,
    )
