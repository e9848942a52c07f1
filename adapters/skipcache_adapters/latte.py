"""Latte: diffusers' ``LatteTransformer3DModel`` (text-to-video), skipcache's
``LatteClassTransformer3DModel`` (class-to-video) and the research code's ``LatteT2V``.

A layer is a spatial block and the temporal one after it. Where a spatial block is entered the
layout is always [B·F, N, C], whatever happens between the two.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Zipped, hookimpl

claims = (
    "diffusers.LatteTransformer3DModel",
    "skipcache.LatteClassTransformer3DModel",
    "LatteT2V (transformer_blocks, temporal_transformer_blocks)",
)

_CLASSES = {"LatteTransformer3DModel", "LatteClassTransformer3DModel", "LatteT2V"}
_LISTS = ("transformer_blocks", "temporal_transformer_blocks")


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """Latte whose two kinds of blocks are two lists, by class name and structure."""
    names = {kind.__name__ for kind in type(transformer).__mro__}
    if not names & _CLASSES:
        return None
    if not all(isinstance(getattr(transformer, name, None), nn.ModuleList) for name in _LISTS):
        return None
    return Backbone(
        name="latte",
        lists=(Zipped(tuple(BlockList(name) for name in _LISTS)),),
        hidden_size=_width_of(transformer),
    )


def _width_of(transformer: nn.Module) -> int | None:
    width = getattr(transformer, "inner_dim", None)
    if width is None:  # diffusers' class keeps it in the head only
        width = getattr(getattr(transformer, "proj_out", None), "in_features", None)
    return width
