"""Flux 2 and 3, Stable Diffusion 3, AuraFlow, Chroma, Bria, HiDream, LongCat, Ovis, Qwen-Image."""

from __future__ import annotations

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    BriaFibo2Transformer2DModel,
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    HiDreamImageTransformer2DModel,
    LongCatAudioDiTTransformer,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

from tiny.registry import enliven, randn, register

TEXT, WIDTH = 5, 12  # tokens of a prompt, channels of each


def _grid(axes: int) -> torch.Tensor:
    """Positions of 16 picture tokens; row and column are the second and third axis."""
    rows_and_columns = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    ids = torch.zeros(16, axes)
    ids[:, 1:3] = rows_and_columns
    return ids


def _packed(seed: int, batch: int, time: float, axes: int = 3) -> dict:
    """Picture and prompt as Flux and its kin take them."""
    return {
        "hidden_states": randn(seed, batch, 16, 4),
        "encoder_hidden_states": randn(seed + 100, batch, TEXT, WIDTH),
        "timestep": torch.full((batch,), time),
        "img_ids": _grid(axes),
        "txt_ids": torch.zeros(TEXT, axes),
    }


def _flux2() -> nn.Module:
    return enliven(
        Flux2Transformer2DModel(
            in_channels=4,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
        )
    )


def _flux2_inputs(seed: int, batch: int = 1) -> dict:
    return {**_packed(seed, batch, 0.5, axes=4), "guidance": torch.full((batch,), 4.0)}


def _flux3() -> nn.Module:
    return enliven(
        Flux3Transformer2DModel(
            in_channels=4,
            cond_in_channels=6,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            timestep_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
        )
    )


def _flux3_inputs(seed: int, batch: int = 1) -> dict:
    return {
        **_packed(seed, batch, 0.5, axes=4),
        "image_cond_hidden_states": randn(seed + 200, batch, 9, 6),
        "image_cond_ids": _grid(4)[:9],
    }


def _sd3() -> nn.Module:
    return enliven(
        SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            out_channels=4,
            pos_embed_max_size=8,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        )
    )


def _sd3_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 8, 8),
        "encoder_hidden_states": randn(seed + 100, batch, TEXT, WIDTH),
        "pooled_projections": randn(seed + 200, batch, 8),
        "timestep": torch.full((batch,), 500.0),
    }


def _auraflow() -> nn.Module:
    return enliven(
        AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=16,
        )
    )


def _auraflow_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 8, 8),
        "encoder_hidden_states": randn(seed + 100, batch, TEXT, WIDTH),
        "timestep": torch.full((batch,), 0.5),
    }


def _chroma() -> nn.Module:
    return enliven(
        ChromaTransformer2DModel(
            in_channels=4,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 2, 2),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=2,
        )
    )


def _chroma_inputs(seed: int, batch: int = 1) -> dict:
    mask = torch.ones(batch, TEXT + 16, dtype=torch.bool)
    mask[:, TEXT - 1] = False
    return {**_packed(seed, batch, 0.5), "attention_mask": mask}


def _bria() -> nn.Module:
    return enliven(
        BriaTransformer2DModel(
            in_channels=4,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=[4, 2, 2],
        )
    )


def _bria_inputs(seed: int, batch: int = 1) -> dict:
    return _packed(seed, batch, 500.0)


def _fibo() -> nn.Module:
    return enliven(
        BriaFiboTransformer2DModel(
            in_channels=4,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=[4, 2, 2],
            text_encoder_dim=6,
        )
    )


def _fibo_inputs(seed: int, batch: int = 1) -> dict:
    layers = [randn(seed + 200 + i, batch, TEXT, 6) for i in range(5)]
    return {**_packed(seed, batch, 500.0), "text_encoder_layers": layers}


def _fibo2() -> nn.Module:
    return enliven(
        BriaFibo2Transformer2DModel(
            in_channels=4,
            patch_size=2,
            dim=24,
            n_layers=4,
            n_refiner_layers=2,
            n_heads=3,
            cap_feat_dim=WIDTH,
            injection_layer_ids=(1, 3),
            perceiver_num_layers=2,
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=2,
            gist_min_text_len=4,
            gist_max_text_len=16,
            axes_dims=(4, 2, 2),
            axes_lens=(32, 16, 16),
        )
    )


def _fibo2_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 8, 8),
        "encoder_hidden_states": randn(seed + 100, batch, 3, TEXT, WIDTH),
        "timestep": torch.full((batch,), 0.5),
        "context_latents": [randn(seed + 200, batch, 4, 4, 6)],
    }


def _hidream() -> nn.Module:
    return enliven(
        HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[WIDTH, 10],
            text_emb_dim=8,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(8, 8),
            llama_layers=[0, 1, 2, 3, 3],
        )
    )


def _hidream_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 8, 8),
        "timesteps": torch.full((batch,), 500.0),
        "encoder_hidden_states_t5": randn(seed + 100, batch, TEXT, WIDTH),
        "encoder_hidden_states_llama3": randn(seed + 200, 4, batch, TEXT, 10),
        "pooled_embeds": randn(seed + 300, batch, 8),
    }


def _longcat_image() -> nn.Module:
    return enliven(
        LongCatImageTransformer2DModel(
            in_channels=4,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=[4, 2, 2],
        )
    )


def _longcat_image_inputs(seed: int, batch: int = 1) -> dict:
    return _packed(seed, batch, 0.5)


def _longcat_audio() -> nn.Module:
    return enliven(
        LongCatAudioDiTTransformer(
            dit_dim=16, dit_depth=4, dit_heads=2, dit_text_dim=WIDTH, latent_dim=4
        )
    )


def _longcat_audio_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 10, 4),
        "encoder_hidden_states": randn(seed + 100, batch, TEXT, WIDTH),
        "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.bool),
        "timestep": torch.full((batch,), 0.5),
        "attention_mask": torch.ones(batch, 10, dtype=torch.bool),
        "latent_cond": randn(seed + 200, batch, 10, 4),
    }


def _ovis() -> nn.Module:
    return enliven(
        OvisImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 2, 2),
        )
    )


def _ovis_inputs(seed: int, batch: int = 1) -> dict:
    return _packed(seed, batch, 0.5)


def _qwen() -> nn.Module:
    return enliven(
        QwenImageTransformer2DModel(
            in_channels=4,
            out_channels=1,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 2, 2),
        )
    )


def _qwen_inputs(seed: int, batch: int = 1) -> dict:
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[:, -1] = False
    return {
        "hidden_states": randn(seed, batch, 16, 4),
        "encoder_hidden_states": randn(seed + 100, batch, TEXT, WIDTH),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, 4, 4)]] * batch,
    }


def _qwen21() -> nn.Module:
    return enliven(
        QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            context_in_dim=WIDTH,
            axes_dims_rope=(4, 2, 2),
        )
    )


def _qwen21_inputs(seed: int, batch: int = 1) -> dict:
    # The prompt's tokens, then a slot for every 2x2 tokens of the picture.
    slots = torch.zeros(batch, TEXT + 4, dtype=torch.bool)
    slots[:, TEXT:] = True
    return {
        "hidden_states": randn(seed, batch, 16, 4),
        "encoder_hidden_states": randn(seed + 100, batch, TEXT, WIDTH),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, 4, 4)]] * batch,
        "img_mask": slots,
    }


register("Flux2Transformer2DModel", _flux2, _flux2_inputs)
register("Flux3Transformer2DModel", _flux3, _flux3_inputs)
register("SD3Transformer2DModel", _sd3, _sd3_inputs)
register("AuraFlowTransformer2DModel", _auraflow, _auraflow_inputs)
register("ChromaTransformer2DModel", _chroma, _chroma_inputs)
register("BriaTransformer2DModel", _bria, _bria_inputs)
register("BriaFiboTransformer2DModel", _fibo, _fibo_inputs)
register("BriaFibo2Transformer2DModel", _fibo2, _fibo2_inputs)
register("HiDreamImageTransformer2DModel", _hidream, _hidream_inputs)
register("LongCatImageTransformer2DModel", _longcat_image, _longcat_image_inputs)
register("LongCatAudioDiTTransformer", _longcat_audio, _longcat_audio_inputs)
register("OvisImageTransformer2DModel", _ovis, _ovis_inputs)
register("QwenImageTransformer2DModel", _qwen, _qwen_inputs)
register("QwenImage21Transformer2DModel", _qwen21, _qwen21_inputs)
