"""Transformers with random weights, for measurements of speed and memory that need no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel


def random_dit(layers: int, heads: int, head_width: int, sample_size: int) -> DiTTransformer2DModel:
    """A DiT with random weights: patch 2, 4 latent channels, learned sigma, 1000 classes.

    Args:
        layers: depth L.
        heads: attention heads.
        head_width: channels a head; the width C is heads x head_width.
        sample_size: latent height and width; tokens are (sample_size / 2)^2.
    """
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_width,
        sample_size=sample_size,
        in_channels=4,
        out_channels=8,
    ).eval()


def dit_xl_2() -> DiTTransformer2DModel:
    """DiT-XL/2 at 256 x 256: 28 layers, width 1152, 256 tokens (arXiv:2212.09748), random weights,
    fp32.
    """
    return random_dit(layers=28, heads=16, head_width=72, sample_size=32)


def tiny_dit(layers: int = 12) -> DiTTransformer2DModel:
    """Width 16, 16 tokens: nothing to compute, so that overhead is all there is to see."""
    return random_dit(layers=layers, heads=2, head_width=8, sample_size=8)


def sample_inputs(transformer: DiTTransformer2DModel, batch: int = 2) -> dict[str, torch.Tensor]:
    """One forward's inputs: hidden_states [B, 4, H, W] and class_labels [B]; the timestep is the
    caller's.
    """
    size = transformer.config["sample_size"]
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(batch, 4, size, size, generator=generator),
        "class_labels": torch.arange(batch),
    }
