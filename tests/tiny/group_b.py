"""DiT, HunyuanDiT, Latte, PixArt, Sana, Lumina, Z-Image, CogView, GLM-Image, OmniGen, PRX and
Kandinsky.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    DiTTransformer2DModel,
    GlmImageTransformer2DModel,
    HunyuanDiT2DModel,
    Kandinsky5Transformer3DModel,
    Kandinsky6SRTransformer3DModel,
    Kandinsky6Transformer3DModel,
    LatteTransformer3DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    OmniGenTransformer2DModel,
    PixArtTransformer2DModel,
    PRXTransformer2DModel,
    SanaTransformer2DModel,
    SanaVideoTransformer3DModel,
    SanaWMLTX2RefinerTransformer3DModel,
    SanaWMTransformer3DModel,
    Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn

from skipcache.latte_class import LatteClassTransformer3DModel
from tiny.registry import enliven, randn, register

_WIDTH = {"num_attention_heads": 2, "attention_head_dim": 8}


def _tiny(kind: type[nn.Module], **options: Any) -> nn.Module:
    return enliven(kind(**options))


def _angles(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosine and sine of a rotary embedding."""
    angles = randn(seed, *shape).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


# DiT, of both classes


def _dit_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 8, 8),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.full((batch,), 7),
    }


_DIT: dict[str, Any] = {
    **_WIDTH,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 4,
    "sample_size": 8,
    "patch_size": 2,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 10,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
register("DiTTransformer2DModel", partial(_tiny, DiTTransformer2DModel, **_DIT), _dit_inputs)
register("Transformer2DModel", partial(_tiny, Transformer2DModel, **_DIT), _dit_inputs)


# HunyuanDiT


def _hunyuan_dit_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 8, 8),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 16),
        "text_embedding_mask": torch.tensor([[1, 1, 1, 1, 0]] * batch),
        "encoder_hidden_states_t5": randn(seed + 200, batch, 4, 16),
        "text_embedding_mask_t5": torch.tensor([[1, 1, 1, 0]] * batch),
        "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]] * batch),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": _angles(0, 16, 4),
    }


register(
    "HunyuanDiT2DModel",
    partial(
        _tiny,
        HunyuanDiT2DModel,
        **_WIDTH,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=6,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=5,
        text_len_t5=4,
    ),
    _hunyuan_dit_inputs,
)


# Latte and PixArt: one embedding of the time for all blocks

_ADALN_SINGLE: dict[str, Any] = {
    **_DIT,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
}


def _latte_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 3, 8, 8),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 12),
    }


def _latte_class_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 3, 8, 8),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.full((batch,), 2),
    }


def _pixart_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 8, 8),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * batch),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


register(
    "LatteTransformer3DModel",
    partial(_tiny, LatteTransformer3DModel, **_ADALN_SINGLE, video_length=3),
    _latte_inputs,
)
register(
    "LatteClassTransformer3DModel",
    partial(
        _tiny,
        LatteClassTransformer3DModel,
        **_WIDTH,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=8,
        video_length=3,
        num_classes=5,
    ),
    _latte_class_inputs,
)
register(
    "PixArtTransformer2DModel",
    partial(_tiny, PixArtTransformer2DModel, **_ADALN_SINGLE),
    _pixart_inputs,
)


# Sana

_SANA: dict[str, Any] = {
    **_WIDTH,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "sample_size": 4,
}


def _sana_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 4, 4),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * batch),
        "timestep": torch.full((batch,), 500.0),
    }


def _sana_video_inputs(seed: int, batch: int = 1) -> dict:
    return {**_sana_inputs(seed, batch), "hidden_states": randn(seed, batch, 4, 2, 8, 8)}


def _sana_wm_inputs(seed: int, batch: int = 1) -> dict:
    camera = torch.cat([torch.eye(4).flatten(), torch.tensor([4.0, 4.0, 1.0, 1.0])])
    cameras = camera.repeat(batch, 3, 1)
    cameras[..., 3] = 0.1 * torch.arange(3)  # it moves to the right
    return {
        "hidden_states": randn(seed, batch, 4, 3, 2, 2),
        "timestep": torch.full((batch, 1, 3), 500.0),
        "encoder_hidden_states": randn(seed + 100, batch, 1, 5, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * batch),
        "camera_conditions": cameras,
        "chunk_plucker": randn(seed + 200, batch, 6, 3, 2, 2),
    }


def _sana_wm_refiner_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 12, 4),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 12),
        "timestep": torch.full((batch, 12), 500.0),
        "video_rotary_emb": tuple(part[None] for part in _angles(0, 12, 8)),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * batch),
    }


register("SanaTransformer2DModel", partial(_tiny, SanaTransformer2DModel, **_SANA), _sana_inputs)
register(
    "SanaVideoTransformer3DModel",
    partial(_tiny, SanaVideoTransformer3DModel, **_SANA),
    _sana_video_inputs,
)
register(
    "SanaWMTransformer3DModel",
    partial(
        _tiny,
        SanaWMTransformer3DModel,
        in_channels=4,
        num_layers=4,
        hidden_size=16,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=8,
        chunk_plucker_channels=6,
        caption_channels=12,
    ),
    _sana_wm_inputs,
)
register(
    "SanaWMLTX2RefinerTransformer3DModel",
    partial(
        _tiny,
        SanaWMLTX2RefinerTransformer3DModel,
        **_WIDTH,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=4,
        caption_channels=12,
    ),
    _sana_wm_refiner_inputs,
)


# Lumina


def _lumina_next_inputs(seed: int, batch: int = 1) -> dict:
    angles = randn(0, 4, 4, 4)
    return {
        "hidden_states": randn(seed, batch, 4, 8, 8),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 12),
        "encoder_mask": torch.tensor([[1, 1, 1, 1, 0]] * batch),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


def _lumina2_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 8, 8),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * batch, dtype=torch.bool),
    }


register(
    "LuminaNextDiT2DModel",
    partial(
        _tiny,
        LuminaNextDiT2DModel,
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=4,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=12,
    ),
    _lumina_next_inputs,
)
register(
    "Lumina2Transformer2DModel",
    partial(
        _tiny,
        Lumina2Transformer2DModel,
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=4,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 8, 8),
        cap_feat_dim=12,
    ),
    _lumina2_inputs,
)


# Z-Image


def _z_image_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "x": list(randn(seed, batch, 4, 1, 8, 8)),
        "t": torch.full((batch,), 0.5),
        "cap_feats": list(randn(seed + 100, batch, 5, 12)),
    }


register(
    "ZImageTransformer2DModel",
    partial(
        _tiny,
        ZImageTransformer2DModel,
        in_channels=4,
        dim=16,
        n_layers=4,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 16, 16],
    ),
    _z_image_inputs,
)


# CogView and GLM-Image

_COGVIEW: dict[str, Any] = {
    **_WIDTH,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "text_embed_dim": 12,
    "time_embed_dim": 16,
    "condition_dim": 4,
}


def _cogview_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 8, 8),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 12),
        "timestep": torch.full((batch,), 500),
        "original_size": torch.tensor([[64.0, 64.0]] * batch),
        "target_size": torch.tensor([[64.0, 64.0]] * batch),
        "crop_coords": torch.zeros(batch, 2),
    }


def _glm_image_inputs(seed: int, batch: int = 1) -> dict:
    tokens = torch.randint(20, (batch, 16), generator=torch.Generator().manual_seed(seed))
    return {
        "hidden_states": randn(seed, batch, 4, 8, 8),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 12),
        "prior_token_id": tokens,
        "prior_token_drop": torch.zeros(batch, 16, dtype=torch.bool),
        "timestep": torch.full((batch,), 499.0),
        "target_size": torch.tensor([[64.0, 64.0]] * batch),
        "crop_coords": torch.zeros(batch, 2),
    }


register(
    "CogView3PlusTransformer2DModel",
    partial(_tiny, CogView3PlusTransformer2DModel, **_COGVIEW, pos_embed_max_size=8, sample_size=8),
    _cogview_inputs,
)
register(
    "CogView4Transformer2DModel",
    partial(
        _tiny, CogView4Transformer2DModel, **_COGVIEW, pos_embed_max_size=8, rope_axes_dim=(8, 8)
    ),
    _cogview_inputs,
)
register(
    "GlmImageTransformer2DModel",
    partial(_tiny, GlmImageTransformer2DModel, **_COGVIEW, prior_vq_quantizer_codebook_size=20),
    _glm_image_inputs,
)


# OmniGen


def _omnigen_inputs(seed: int, batch: int = 1) -> dict:
    words = torch.Generator().manual_seed(seed)
    length = 6 + 1 + 16  # text with the place of a picture in it, the time, and the picture
    return {
        "hidden_states": randn(seed, batch, 4, 8, 8),
        "timestep": torch.full((batch,), 0.5),
        "input_ids": torch.randint(1, 20, (batch, 6), generator=words),
        "input_img_latents": [randn(seed + 100, 1, 4, 4, 4)],
        "input_image_sizes": {0: [[1, 5]]},
        "attention_mask": torch.ones(batch, length, length),
        "position_ids": torch.arange(length).repeat(batch, 1),
    }


register(
    "OmniGenTransformer2DModel",
    partial(
        _tiny,
        OmniGenTransformer2DModel,
        in_channels=4,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=4,
        pad_token_id=0,
        vocab_size=20,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        pos_embed_max_size=8,
        time_step_dim=16,
    ),
    _omnigen_inputs,
)


# PRX


def _prx_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 8, 8),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 12),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * batch, dtype=torch.bool),
    }


register(
    "PRXTransformer2DModel",
    partial(
        _tiny,
        PRXTransformer2DModel,
        in_channels=4,
        context_in_dim=12,
        hidden_size=16,
        num_heads=2,
        depth=4,
        axes_dim=[4, 4],
    ),
    _prx_inputs,
)


# Kandinsky

_KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 12,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 16,
    "ff_dim": 32,
    "num_text_blocks": 2,
    "num_visual_blocks": 4,
    "axes_dims": (4, 2, 2),
}


def _kandinsky5_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 2, 4, 4, 4),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 12),
        "timestep": torch.full((batch,), 500.0),
        "pooled_projections": randn(seed + 200, batch, 8),
        "visual_rope_pos": tuple(torch.arange(2) for _ in range(3)),
        "text_rope_pos": torch.arange(5),
    }


def _kandinsky6_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 2, 4, 4, 9),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 12),
        "pooled_projections": randn(seed + 200, batch, 8),
        "timestep": torch.full((batch,), 500.0),
        "audio_hidden_states": randn(seed + 300, batch, 6, 3),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * batch, dtype=torch.bool),
    }


def _kandinsky6_sr_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 1, 8, 8, 9),
        "timestep": torch.full((batch,), 500.0),
    }


register(
    "Kandinsky5Transformer3DModel",
    partial(_tiny, Kandinsky5Transformer3DModel, **_KANDINSKY),
    _kandinsky5_inputs,
)
register(
    "Kandinsky6Transformer3DModel",
    partial(
        _tiny,
        Kandinsky6Transformer3DModel,
        **_KANDINSKY,
        in_audio_dim=3,
        out_audio_dim=3,
        model_dim_a=8,
        ff_dim_a=16,
        ca_rope=True,
        cross_gates=True,
        fix_modulation=True,
    ),
    _kandinsky6_inputs,
)
register(
    "Kandinsky6SRTransformer3DModel",
    partial(
        _tiny,
        Kandinsky6SRTransformer3DModel,
        in_visual_dim=4,
        out_visual_dim=4,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_visual_blocks=4,
        axes_dims=(4, 2, 2),
    ),
    _kandinsky6_sr_inputs,
)
