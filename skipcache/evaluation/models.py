"""Transformers with random weights, for measurements of speed and memory that need no download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

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


def latte_1(
    layers: int = 14, frames: int = 4, sample_size: int = 16, heads: int = 16, head_width: int = 72
) -> tuple[nn.Module, dict[str, Any]]:
    """Text-to-video Latte of the width of Latte-1 (16 heads of 72 channels, 1152), random weights,
    fp32. Cut, where nothing else is said: 14 of 28 layers, 4 of 16 frames, 64 of 1024 tokens a
    frame.

    Args:
        layers: depth L; a layer is a spatial and a temporal block.
        frames: F.
        sample_size: latent height and width; tokens a frame are (sample_size / 2)^2.
        heads: attention heads.
        head_width: channels a head.

    Returns:
        The transformer, and one forward's inputs but for the timestep.
    """
    from diffusers import LatteTransformer3DModel

    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_width,
        cross_attention_dim=heads * head_width,
        caption_channels=4096,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        sample_size=sample_size,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=frames,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 4, frames, sample_size, sample_size),
        "encoder_hidden_states": torch.randn(1, 16, 4096),
    }
    return transformer, inputs


def latte_class(
    layers: int = 14, frames: int = 4, sample_size: int = 16, heads: int = 16, head_width: int = 72
) -> tuple[nn.Module, dict[str, Any]]:
    """Class-to-video Latte-XL/2 (width 1152, arXiv:2401.03048), random weights, fp32. Cut: 4 of 16
    frames, 64 of 256 tokens a frame.

    Args:
        layers: as in ``latte_1``.
        frames: as in ``latte_1``.
        sample_size: as in ``latte_1``.
        heads: as in ``latte_1``.
        head_width: as in ``latte_1``.

    Returns:
        The transformer, and one forward's inputs but for the timestep.
    """
    from skipcache.latte_class import LatteClassTransformer3DModel

    torch.manual_seed(0)
    transformer = LatteClassTransformer3DModel(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_width,
        out_channels=8,
        sample_size=sample_size,
        video_length=frames,
        num_classes=101,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 4, frames, sample_size, sample_size),
        "class_labels": torch.tensor([1]),
    }
    return transformer, inputs


def hunyuan_g_2(
    layers: int = 20, sample_size: int = 32, heads: int = 16, head_width: int = 88
) -> tuple[nn.Module, dict[str, Any]]:
    """HunyuanDiT-g/2 (width 1408, MLP ratio 4.3637, arXiv:2405.08748), random weights, fp32. Cut:
    20 of 40 layers, 256 of 4096 tokens, 16 + 16 text tokens of 77 + 256.

    Args:
        layers: depth L, even.
        sample_size: latent height and width; tokens are (sample_size / 2)^2.
        heads: attention heads.
        head_width: channels a head.

    Returns:
        The transformer, and one forward's inputs but for the timestep.
    """
    from diffusers import HunyuanDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    torch.manual_seed(0)
    transformer = HunyuanDiT2DModel(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_width,
        hidden_size=heads * head_width,
        mlp_ratio=4.3637,
        in_channels=4,
        patch_size=2,
        sample_size=sample_size,
        cross_attention_dim=1024,
        cross_attention_dim_t5=2048,
        text_len=16,
        text_len_t5=16,
        activation_fn="gelu-approximate",
        use_style_cond_and_image_meta_size=False,
    ).eval()
    side = sample_size // 2
    rotary = get_2d_rotary_pos_embed(
        head_width, ((0, 0), (side, side)), (side, side), output_type="pt"
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, sample_size, sample_size),
        "encoder_hidden_states": torch.randn(1, 16, 1024),
        "text_embedding_mask": torch.ones(1, 16),
        "encoder_hidden_states_t5": torch.randn(1, 16, 2048),
        "text_embedding_mask_t5": torch.ones(1, 16),
        "image_rotary_emb": rotary,
        "return_dict": False,
    }
    return transformer, inputs


def flux_dev(
    double_layers: int = 3,
    single_layers: int = 6,
    tokens: int = 256,
    heads: int = 24,
    head_width: int = 128,
) -> tuple[nn.Module, dict[str, Any]]:
    """Flux.1-dev (width 3072), random weights, fp32. Cut: 3 + 6 of 19 + 38 layers, 256 of 4096
    picture tokens, 64 of 512 text tokens.

    Args:
        double_layers: two-stream layers.
        single_layers: single-stream layers.
        tokens: of the picture.
        heads: attention heads.
        head_width: channels a head, a multiple of 32.

    Returns:
        The transformer, and one forward's inputs but for the timestep.
    """
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        num_layers=double_layers,
        num_single_layers=single_layers,
        num_attention_heads=heads,
        attention_head_dim=head_width,
        guidance_embeds=True,
        axes_dims_rope=(head_width // 8, 7 * head_width // 16, 7 * head_width // 16),
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, tokens, 64),
        "encoder_hidden_states": torch.randn(1, 64, 4096),
        "pooled_projections": torch.randn(1, 768),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(64, 3),
    }
    return transformer, inputs


def wan_1_3b(
    layers: int = 15, frames: int = 4, sample_size: int = 16, heads: int = 12, head_width: int = 128
) -> tuple[nn.Module, dict[str, Any]]:
    """Wan 2.1 of 1.3 billion weights (width 1536), random weights, fp32. Cut: 15 of 30 layers, 4 of
    21 latent frames, 64 of 1560 tokens a frame, 64 of 512 text tokens.

    Args:
        layers: depth L.
        frames: of latents.
        sample_size: latent height and width; tokens a frame are (sample_size / 2)^2.
        heads: attention heads.
        head_width: channels a head.

    Returns:
        The transformer, and one forward's inputs but for the timestep.
    """
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_width,
        ffn_dim=35 * heads * head_width // 6,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, frames, sample_size, sample_size),
        "encoder_hidden_states": torch.randn(1, 64, 4096),
    }
    return transformer, inputs
