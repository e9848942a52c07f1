"""Latte: diffusers' ``LatteTransformer3DModel`` (text-to-video), skipcache's
``LatteClassTransformer3DModel`` (class-to-video), the research code's ``LatteT2V`` and ``Latte``.

A layer is a spatial block and the temporal one after it. Where a spatial block is entered the
layout is always [B·F, N, C], whatever happens between the two.
"""

from __future__ import annotations

import torch
from torch import nn

from skipcache import (
    Backbone,
    BlockList,
    InputSize,
    SkipCacheError,
    Timestep,
    Zipped,
    hookimpl,
)

claims = (
    "diffusers.LatteTransformer3DModel",
    "skipcache.LatteClassTransformer3DModel",
    "LatteT2V (transformer_blocks, temporal_transformer_blocks)",
    "Latte (x_embedder, blocks, temp_embed, final_layer)",
)

_TEXT_TO_VIDEO, _CLASS_TO_VIDEO = "skip-dit/latte-t2v", "skip-dit/latte-c2v"
_PRESETS = {
    "LatteTransformer3DModel": _TEXT_TO_VIDEO,
    "LatteT2V": _TEXT_TO_VIDEO,
    "LatteClassTransformer3DModel": _CLASS_TO_VIDEO,
}
_LISTS = ("transformer_blocks", "temporal_transformer_blocks")


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """Latte with two lists of blocks, or one in which both kinds alternate; by class name and
    structure.
    """
    names = [kind.__name__ for kind in type(transformer).__mro__]
    known = [name for name in names if name in _PRESETS]
    if known and all(isinstance(getattr(transformer, n, None), nn.ModuleList) for n in _LISTS):
        # Between the two kinds of blocks all but skipcache's own class change the layout.
        lists = tuple(BlockList(name, relayouts=True) for name in _LISTS)
        return Backbone(
            name="latte",
            lists=(Zipped(lists),),
            hidden_size=_width_of(transformer),
            preset=_PRESETS[known[0]],
            input_sizes=_frames_of(transformer) if known[0] == "LatteTransformer3DModel" else (),
        )
    blocks, positions = (getattr(transformer, name, None) for name in ("blocks", "temp_embed"))
    if (
        "Latte" in names
        and isinstance(blocks, nn.ModuleList)
        and isinstance(positions, torch.Tensor)
        and all(hasattr(transformer, part) for part in ("x_embedder", "final_layer"))
    ):
        if len(blocks) % 2:
            raise SkipCacheError(
                f"{type(transformer).__name__} has {len(blocks)} blocks, spatial and temporal in "
                "turn: its forward takes two at a time, and cannot run with an odd number."
            )
        return Backbone(
            name="latte",
            lists=(BlockList("blocks", ("x",), "x", blocks_per_layer=2, relayouts=True),),
            timestep=Timestep("t"),
            entry_points=("forward_with_cfg",),
            hidden_size=positions.shape[-1],
            preset=_CLASS_TO_VIDEO,
        )
    return None


def _width_of(transformer: nn.Module) -> int | None:
    width = getattr(transformer, "inner_dim", None)
    if width is None:  # diffusers' class keeps it in the head only
        width = getattr(getattr(transformer, "proj_out", None), "in_features", None)
    return width


def _frames_of(transformer: nn.Module) -> tuple[InputSize, ...]:
    """diffusers' class adds one position embedding a frame, or none to a single frame."""
    positions = getattr(transformer, "temp_pos_embed", None)
    if not isinstance(positions, torch.Tensor):
        return ()
    allowed = tuple({1, positions.shape[1]})
    return (InputSize("hidden_states", 2, allowed, "frames", "enable_temporal_attentions"),)
