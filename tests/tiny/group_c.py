"""Video: Wan and its kin, SkyReels, AnyFlow, Helios, HunyuanVideo, CogVideoX, LTX."""

from __future__ import annotations

import torch
from diffusers import (
    AnyFlowFARTransformer3DModel,
    AnyFlowTransformer3DModel,
    ChronoEditTransformer3DModel,
    CogVideoXTransformer3DModel,
    ConsisIDTransformer3DModel,
    HeliosTransformer3DModel,
    HunyuanImageTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimate2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask

from tiny.registry import enliven, randn, register

# Wan and what was made of it: video [B, C, F, H, W], the timestep from 1000 to 0.

_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 4,
    "rope_max_seq_len": 16,
}


def _wan_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 2, 4, 4),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 10),
    }


def _vace() -> nn.Module:
    sizes = {**_WAN, "num_layers": 5, "vace_layers": [0, 2, 3], "vace_in_channels": 6}
    return enliven(WanVACETransformer3DModel(**sizes))


def _vace_inputs(seed: int, batch: int = 1) -> dict:
    control = randn(seed + 200, batch, 6, 2, 4, 4)
    return {**_wan_inputs(seed, batch), "control_hidden_states": control}


def _animate() -> nn.Module:
    sizes = {**_WAN, "in_channels": 12, "latent_channels": 4}
    return enliven(
        WanAnimateTransformer3DModel(
            **sizes,
            image_dim=6,
            motion_encoder_channel_sizes={"4": 6, "8": 6, "16": 6},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=8,
            face_encoder_hidden_dim=8,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        )
    )


def _animate_inputs(seed: int, batch: int = 1) -> dict:
    return {
        **_wan_inputs(seed, batch),
        "hidden_states": randn(seed, batch, 12, 3, 4, 4),
        "encoder_hidden_states_image": randn(seed + 200, batch, 3, 6),
        "pose_hidden_states": randn(seed + 300, batch, 4, 2, 4, 4),
        "face_pixel_values": randn(seed + 400, batch, 3, 5, 16, 16),
    }


_ANIMATE_2_REFERENCE = (2, 2, 2)  # frames, height, width, in tokens; the video has a frame more


def _mask_of_animate_2(batch, head, query, key):
    """What the model masks out: the filling up to 128 tokens each of video and reference."""
    return (key < 12) | ((key >= 128) & (key < 136))


def _animate_2() -> nn.Module:
    model = WanAnimate2Transformer3DModel(
        text_len=6,
        in_dim=8,
        dim=32,
        ffn_dim=48,
        freq_dim=16,
        text_dim=10,
        out_dim=4,
        num_heads=2,
        num_layers=4,
        use_img_emb=False,
    )
    # The model would compile its own.
    model.block_masks[(2, 4)] = create_block_mask(
        _mask_of_animate_2, None, None, 128, 256, device="cpu"
    )
    return enliven(model)


def _animate_2_inputs(seed: int, batch: int = 1) -> dict:
    """A denoising call: what the reference left in the attention's cache is noise here."""
    cache = WanAnimate2KVCache(4)
    for layer in range(4):
        drawn = randn(seed + 300 + layer, 2, batch, 8, 2, 16)
        cache.get(layer).store(drawn[0], drawn[1])
    return {
        "hidden_states": list(randn(seed, batch, 4, 3, 4, 4)),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": list(randn(seed + 100, batch, 5, 10)),
        "condition_latents": list(randn(seed + 200, batch, 4, 3, 4, 4)),
        "kv_cache": cache,
        "kv_cache_mode": "cached",
        "seq_len": 12,
        "reference_grid_sizes": torch.tensor([_ANIMATE_2_REFERENCE] * batch),
        "origin_len": 5,
        "origin_area": [32, 32],
    }


register("WanTransformer3DModel", lambda: enliven(WanTransformer3DModel(**_WAN)), _wan_inputs)
register("WanVACETransformer3DModel", _vace, _vace_inputs)
register("WanAnimateTransformer3DModel", _animate, _animate_inputs)
register("WanAnimate2Transformer3DModel", _animate_2, _animate_2_inputs)
register(
    "ChronoEditTransformer3DModel",
    lambda: enliven(ChronoEditTransformer3DModel(**_WAN, rope_temporal_skip_len=4)),
    _wan_inputs,
)
register(
    "SkyReelsV2Transformer3DModel",
    lambda: enliven(SkyReelsV2Transformer3DModel(**_WAN)),
    _wan_inputs,
)


# AnyFlow: video [B, F, C, H, W], two timesteps a frame.


def _anyflow_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 2, 4, 4, 4),
        "timestep": torch.full((batch, 2), 500.0),
        "r_timestep": torch.full((batch, 2), 400.0),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 10),
    }


def _far_inputs(seed: int, batch: int = 1) -> dict:
    """A denoising call of the second chunk: the first is noise in the attention's cache."""
    return {
        **_anyflow_inputs(seed, batch),
        "chunk_partition": [1, 2],
        "kv_cache": {
            layer: {
                "full_cache": randn(seed + 200 + layer, 2, batch, 2, 12, 12),
                "compressed_cache": randn(seed + 300 + layer, 2, batch, 2, 2, 12),
            }
            for layer in range(4)
        },
        "kv_cache_flag": {"num_cached_chunks": 1, "is_cache_step": False},
    }


register(
    "AnyFlowTransformer3DModel",
    lambda: enliven(AnyFlowTransformer3DModel(**_WAN)),
    _anyflow_inputs,
)
register(
    "AnyFlowFARTransformer3DModel",
    lambda: enliven(AnyFlowFARTransformer3DModel(**_WAN)),
    _far_inputs,
)


# Helios: the frames before, the further back the coarser, and the chunk under way.


def _helios() -> nn.Module:
    sizes = {name: value for name, value in _WAN.items() if name != "rope_max_seq_len"}
    return enliven(HeliosTransformer3DModel(**sizes, rope_dim=(4, 4, 4)))


def _helios_inputs(seed: int, batch: int = 1) -> dict:
    frames = torch.arange(10).expand(batch, -1)
    return {
        **_wan_inputs(seed, batch),
        "indices_latents_history_long": frames[:, :4],
        "indices_latents_history_mid": frames[:, 4:6],
        "indices_latents_history_short": frames[:, 6:8],
        "indices_hidden_states": frames[:, 8:],
        "latents_history_long": randn(seed + 200, batch, 4, 4, 4, 4),
        "latents_history_mid": randn(seed + 300, batch, 4, 2, 4, 4),
        "latents_history_short": randn(seed + 400, batch, 4, 2, 4, 4),
    }


register("HeliosTransformer3DModel", _helios, _helios_inputs)


# HunyuanVideo and its kin.

_HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_refiner_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 10,
}


def _hunyuan_video() -> nn.Module:
    return enliven(
        HunyuanVideoTransformer3DModel(
            **_HUNYUAN, num_single_layers=3, pooled_projection_dim=6, rope_axes_dim=(4, 2, 2)
        )
    )


def _hunyuan_video_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 2, 4, 4),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 10),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * batch),
        "pooled_projections": randn(seed + 200, batch, 6),
        "guidance": torch.full((batch,), 6000.0),
    }


def _framepack() -> nn.Module:
    return enliven(
        HunyuanVideoFramepackTransformer3DModel(
            **_HUNYUAN,
            num_single_layers=3,
            pooled_projection_dim=6,
            rope_axes_dim=(4, 2, 2),
            has_image_proj=True,
            image_proj_dim=6,
            has_clean_x_embedder=True,
        )
    )


def _framepack_inputs(seed: int, batch: int = 1) -> dict:
    return {
        **_hunyuan_video_inputs(seed, batch),
        "image_embeds": randn(seed + 300, batch, 3, 6),
        "indices_latents": torch.arange(7, 9),
        "latents_clean": randn(seed + 400, batch, 4, 1, 4, 4),
        "indices_latents_clean": torch.arange(6, 7),
        "latents_history_2x": randn(seed + 500, batch, 4, 2, 4, 4),
        "indices_latents_history_2x": torch.arange(4, 6),
        "latents_history_4x": randn(seed + 600, batch, 4, 4, 4, 4),
        "indices_latents_history_4x": torch.arange(4),
    }


def _hunyuan_video_15() -> nn.Module:
    sizes = {**_HUNYUAN, "num_layers": 5}
    return enliven(
        HunyuanVideo15Transformer3DModel(
            **sizes, text_embed_2_dim=8, image_embed_dim=6, rope_axes_dim=(4, 2, 2)
        )
    )


def _hunyuan_video_15_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 2, 2, 2),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 10),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * batch),
        "encoder_hidden_states_2": randn(seed + 200, batch, 4, 8),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 0, 0]] * batch),
        "image_embeds": randn(seed + 300, batch, 3, 6),
    }


def _hunyuan_image() -> nn.Module:
    return enliven(
        HunyuanImageTransformer2DModel(**_HUNYUAN, num_single_layers=3, rope_axes_dim=(4, 4))
    )


def _hunyuan_image_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 4, 4, 4),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 10),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * batch),
    }


register("HunyuanVideoTransformer3DModel", _hunyuan_video, _hunyuan_video_inputs)
register("HunyuanVideoFramepackTransformer3DModel", _framepack, _framepack_inputs)
register("HunyuanVideo15Transformer3DModel", _hunyuan_video_15, _hunyuan_video_15_inputs)
register("HunyuanImageTransformer2DModel", _hunyuan_image, _hunyuan_image_inputs)


# CogVideoX and ConsisID: video [B, F, C, H, W].

_COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 6,
    "text_embed_dim": 10,
    "num_layers": 4,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 5,
    "max_text_seq_length": 5,
}


def _cogvideox_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 2, 4, 4, 4),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 10),
        "timestep": torch.full((batch,), 500),
    }


def _consisid() -> nn.Module:
    return enliven(
        ConsisIDTransformer3DModel(
            **_COGVIDEOX,
            is_train_face=True,
            cross_attn_interval=2,
            cross_attn_dim_head=8,
            cross_attn_num_heads=2,
            LFE_id_dim=6,
            LFE_vit_dim=8,
            LFE_depth=2,
            LFE_dim_head=4,
            LFE_num_heads=2,
            LFE_num_id_token=2,
            LFE_num_querie=3,
            LFE_output_dim=10,
            LFE_ff_mult=2,
            LFE_num_scale=2,
        )
    )


def _consisid_inputs(seed: int, batch: int = 1) -> dict:
    return {
        **_cogvideox_inputs(seed, batch),
        "id_cond": randn(seed + 200, batch, 6),
        "id_vit_hidden": list(randn(seed + 300, 2, batch, 4, 8)),
    }


register(
    "CogVideoXTransformer3DModel",
    lambda: enliven(CogVideoXTransformer3DModel(**_COGVIDEOX)),
    _cogvideox_inputs,
)
register("ConsisIDTransformer3DModel", _consisid, _consisid_inputs)


# LTX: video as tokens, in LTX-2 sound too.


def _ltx() -> nn.Module:
    return enliven(
        LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=4,
            caption_channels=10,
        )
    )


def _ltx_inputs(seed: int, batch: int = 1) -> dict:
    return {
        "hidden_states": randn(seed, batch, 8, 4),
        "encoder_hidden_states": randn(seed + 100, batch, 5, 10),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * batch),
        "num_frames": 2,
        "height": 2,
        "width": 2,
    }


def _ltx2() -> nn.Module:
    return enliven(
        LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=3,
            audio_out_channels=3,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=4,
            caption_channels=10,
        )
    )


def _ltx2_inputs(seed: int, batch: int = 1) -> dict:
    return {
        **_ltx_inputs(seed, batch),
        "audio_hidden_states": randn(seed + 200, batch, 3, 3),
        "audio_encoder_hidden_states": randn(seed + 300, batch, 5, 10),
        "audio_num_frames": 3,
    }


register("LTXVideoTransformer3DModel", _ltx, _ltx_inputs)
register("LTX2VideoTransformer3DModel", _ltx2, _ltx2_inputs)
