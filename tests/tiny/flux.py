"""Flux and its kin."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel

from tiny.registry import enliven, randn, register


def _flux() -> FluxTransformer2DModel:
    return enliven(
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=3,
            num_single_layers=3,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=12,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 2, 2),
        )
    )


def _flux_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 16, 4),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 12),
        "pooled_projections": randn(seed + 200, batch, 8),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(5, 3),
    }


register("FluxTransformer2DModel", _flux, _flux_inputs)
