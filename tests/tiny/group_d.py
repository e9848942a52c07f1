"""Video, image and audio transformers that are in no larger family."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AceStepTransformer1DModel,
    AllegroTransformer3DModel,
    Cosmos3OmniTransformer,
    CosmosTransformer3DModel,
    EasyAnimateTransformer3DModel,
    ErnieImageTransformer2DModel,
    Ideogram4Transformer2DModel,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    Krea2Transformer2DModel,
    MiniMaxH3Transformer3DModel,
    MiniMaxMusic3Transformer1DModel,
    MochiTransformer3DModel,
    MotifVideoTransformer3DModel,
    NucleusMoEImageTransformer2DModel,
    PriorTransformer,
    StableAudio3DiTModel,
    StableAudioDiTModel,
    T5FilmDecoder,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import nn

from tiny.registry import enliven, randn, register


def _mochi() -> nn.Module:
    return enliven(
        MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=4,
            pooled_projection_dim=12,
            in_channels=4,
            text_embed_dim=16,
            time_embed_dim=8,
            max_sequence_length=6,
        )
    )


def _mochi_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": randn(seed, batch, 4, 2, 4, 4),
        "encoder_hidden_states": randn(seed + 100, batch, 6, 16),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": (torch.arange(6) < 5).expand(batch, 6),
    }


register("MochiTransformer3DModel", _mochi, _mochi_inputs)


def _allegro() -> nn.Module:
    return enliven(
        AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            cross_attention_dim=24,
            sample_height=8,
            sample_width=8,
            sample_frames=2,
            caption_channels=10,
        )
    )


def _allegro_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    rotary = [
        get_1d_rotary_pos_embed(4, torch.arange(2.0), use_real=True, repeat_interleave_real=False)
        for _ in range(3)
    ]
    places = torch.cartesian_prod(*[torch.arange(2)] * 3).T[:, None]
    return {
        "hidden_states": randn(seed, batch, 4, 2, 4, 4),
        "encoder_hidden_states": randn(seed + 100, batch, 1, 6, 10),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": (torch.arange(6) < 5).long().expand(batch, 6),
        "image_rotary_emb": (rotary, list(places)),
    }


register("AllegroTransformer3DModel", _allegro, _allegro_inputs)


def _easyanimate() -> nn.Module:
    return enliven(
        EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            num_layers=4,
            mmdit_layers=3,  # the last block shares its weights between the picture and the text
            time_embed_dim=8,
            text_embed_dim=12,
        )
    )


def _easyanimate_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": randn(seed, batch, 4, 2, 4, 4),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(seed + 100, batch, 6, 12),
    }


register("EasyAnimateTransformer3DModel", _easyanimate, _easyanimate_inputs)


def _cosmos() -> nn.Module:
    return enliven(
        CosmosTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=4,
            mlp_ratio=2,
            text_embed_dim=10,
            adaln_lora_dim=4,
            max_size=(4, 8, 8),
            rope_scale=(1.0, 3.0, 3.0),
            concat_padding_mask=False,  # it needs torchvision
            extra_pos_embed_type=None,  # learnable in the first Cosmos only
        )
    )


def _cosmos_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": randn(seed, batch, 4, 2, 4, 4),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": randn(seed + 100, batch, 6, 10),
        "fps": 16,
    }


register("CosmosTransformer3DModel", _cosmos, _cosmos_inputs)


def _cosmos3() -> nn.Module:
    return enliven(
        Cosmos3OmniTransformer(
            head_dim=8,
            hidden_size=16,
            intermediate_size=24,
            latent_channel=4,
            patch_latent_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=4,
            sound_gen=True,
            sound_dim=6,
            vocab_size=20,
            rope_axes_dim=(2, 1, 1),
        )
    )


def _cosmos3_inputs(seed: int) -> dict[str, Any]:
    """Five text tokens, then eight of the video, then three of the sound."""
    draw = torch.Generator().manual_seed(seed + 100)
    frames, sound = torch.arange(2), torch.arange(3)
    return {
        "input_ids": torch.randint(20, (5,), generator=draw),
        "text_indexes": torch.arange(5),
        "position_ids": torch.arange(16.0).expand(3, 16),
        "und_len": 5,
        "sequence_length": 16,
        "vision_tokens": [randn(seed, 1, 4, 2, 4, 4)],
        "vision_token_shapes": [(2, 2, 2)],
        "vision_sequence_indexes": torch.arange(5, 13),
        "vision_mse_loss_indexes": torch.arange(5, 13),
        "vision_timesteps": torch.full((8,), 500.0),
        "vision_noisy_frame_indexes": [frames],
        "sound_tokens": [randn(seed + 200, 6, 3)],
        "sound_token_shapes": [(3, 1, 1)],
        "sound_sequence_indexes": torch.arange(13, 16),
        "sound_mse_loss_indexes": torch.arange(13, 16),
        "sound_timesteps": torch.full((3,), 500.0),
        "sound_noisy_frame_indexes": [sound],
    }


register("Cosmos3OmniTransformer", _cosmos3, _cosmos3_inputs, batches=False)


def _motif_video() -> nn.Module:
    return enliven(
        MotifVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=3,
            num_single_layers=4,
            num_decoder_layers=2,
            mlp_ratio=2.0,
            text_embed_dim=10,
            rope_axes_dim=(4, 4, 4),
            enable_text_cross_attention_dual=True,
            enable_text_cross_attention_single=True,
        )
    )


def _motif_video_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": randn(seed, batch, 4, 2, 4, 4),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(seed + 100, batch, 6, 10),
        "encoder_attention_mask": (torch.arange(6) < 5).long().expand(batch, 6),
    }


register("MotifVideoTransformer3DModel", _motif_video, _motif_video_inputs)


def _stable_audio() -> nn.Module:
    return enliven(
        StableAudioDiTModel(
            sample_size=8,
            in_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            out_channels=4,
            cross_attention_dim=12,
            time_proj_dim=8,
            global_states_input_dim=6,
            cross_attention_input_dim=10,
        )
    )


def _stable_audio_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": randn(seed, batch, 4, 8),
        "timestep": torch.full((1,), 0.5),
        "encoder_hidden_states": randn(seed + 100, batch, 6, 10),
        "global_hidden_states": randn(seed + 200, batch, 1, 6),
        "rotary_embedding": get_1d_rotary_pos_embed(
            4, 9, use_real=True, repeat_interleave_real=False
        ),
    }


register("StableAudioDiTModel", _stable_audio, _stable_audio_inputs)


def _stable_audio3() -> nn.Module:
    return enliven(
        StableAudio3DiTModel(
            io_channels=4,
            embed_dim=16,
            depth=4,
            num_heads=2,
            cond_token_dim=10,
            global_cond_dim=6,
            local_add_cond_dim=5,
            timestep_features_dim=8,
            ff_mult=2.0,
            num_memory_tokens=3,
        )
    )


def _stable_audio3_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": randn(seed, batch, 4, 8),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": randn(seed + 100, batch, 6, 10),
        "global_hidden_states": randn(seed + 200, batch, 6),
        "encoder_attention_mask": (torch.arange(6) < 5).expand(batch, 6),
        "local_add_cond": randn(seed + 300, batch, 5, 8),
    }


register("StableAudio3DiTModel", _stable_audio3, _stable_audio3_inputs)


def _ace_step() -> nn.Module:
    return enliven(
        AceStepTransformer1DModel(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            in_channels=12,
            audio_acoustic_hidden_dim=4,
            sliding_window=2,
            encoder_hidden_size=10,
        )
    )


def _ace_step_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": randn(seed, batch, 15, 4),
        "timestep": torch.full((batch,), 0.5),
        "timestep_r": torch.full((batch,), 0.5),
        "encoder_hidden_states": randn(seed + 100, batch, 6, 10),
        "context_latents": randn(seed + 200, batch, 15, 8),
    }


register("AceStepTransformer1DModel", _ace_step, _ace_step_inputs)


def _minimax_h3() -> nn.Module:
    return enliven(
        MiniMaxH3Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            hidden_size=16,
            num_layers=4,
            num_refiner_layers=2,
            ffn_dim=24,
            in_channels=4,
            audio_in_channels=6,
            text_dim=10,
            freq_dim=8,
            time_embed_hidden_dim=12,
            time_embed_dim=8,
            rope_freq_dim=2,
        )
    )


def _minimax_h3_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    """Five rows of text, three of audio, and eight of video, of which the first two are a clean
    picture.
    """
    text, audio, video = torch.arange(5), torch.arange(5, 8), torch.arange(8, 16)
    return {
        "hidden_states": randn(seed, batch, 8, 16),
        "audio_hidden_states": randn(seed + 100, batch, 3, 6),
        "encoder_hidden_states": randn(seed + 200, batch, 5, 10),
        "timestep": torch.tensor([0.5, 0.999]),
        "timestep_indices": torch.tensor([0] * 8 + [1] * 2 + [0] * 6),
        "token_tags": torch.tensor([1] * 5 + [2] * 3 + [0] * 8),
        "position_ids": torch.arange(16.0)[:, None].expand(16, 3),
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


register("MiniMaxH3Transformer3DModel", _minimax_h3, _minimax_h3_inputs)


def _minimax_music3() -> nn.Module:
    return enliven(
        MiniMaxMusic3Transformer1DModel(
            in_channels=4,
            condition_dim=10,
            num_layers=4,
            num_attention_heads=2,
            attention_head_dim=8,
            ff_inner_dim=24,
            rotary_dim=4,
            fourier_embedding_dim=8,
        )
    )


def _minimax_music3_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": randn(seed, batch, 4, 12),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": randn(seed + 100, batch, 12, 10),
    }


register("MiniMaxMusic3Transformer1DModel", _minimax_music3, _minimax_music3_inputs)


def _ernie_image() -> nn.Module:
    return enliven(
        ErnieImageTransformer2DModel(
            hidden_size=16,
            num_attention_heads=2,
            num_layers=4,
            ffn_hidden_size=24,
            in_channels=4,
            out_channels=4,
            text_in_dim=10,
            rope_axes_dim=(4, 2, 2),
        )
    )


def _ernie_image_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": randn(seed, batch, 4, 4, 4),
        "timestep": torch.full((batch,), 500.0),
        "text_bth": randn(seed + 100, batch, 6, 10),
        "text_lens": torch.full((batch,), 5),
    }


register("ErnieImageTransformer2DModel", _ernie_image, _ernie_image_inputs)


def _ideogram4() -> nn.Module:
    return enliven(
        Ideogram4Transformer2DModel(
            in_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            intermediate_size=24,
            adaln_dim=8,
            llm_features_dim=10,
            mrope_section=(2, 1, 1),
        )
    )


def _ideogram4_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    """A token of padding, five of text and ten of the picture."""
    indicator = torch.tensor([-1] + [3] * 5 + [2] * 10)
    return {
        "hidden_states": randn(seed, batch, 16, 4),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": randn(seed + 100, batch, 16, 10),
        "position_ids": torch.arange(16)[None, :, None].expand(batch, 16, 3),
        "segment_ids": (indicator > 0).long().expand(batch, 16),
        "indicator": indicator.expand(batch, 16),
    }


register("Ideogram4Transformer2DModel", _ideogram4, _ideogram4_inputs)


def _joyimage_edit() -> nn.Module:
    return enliven(
        JoyImageEditTransformer3DModel(
            in_channels=4,
            hidden_size=16,
            num_attention_heads=2,
            text_dim=10,
            mlp_width_ratio=2.0,
            num_layers=4,
            rope_dim_list=[4, 2, 2],
        )
    )


def _joyimage_edit_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    """A picture to edit and the one to make."""
    return {
        "hidden_states": randn(seed, batch, 2, 4, 1, 4, 4),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(seed + 100, batch, 6, 10),
    }


register("JoyImageEditTransformer3DModel", _joyimage_edit, _joyimage_edit_inputs)


def _joyimage_edit_plus() -> nn.Module:
    return enliven(
        JoyImageEditPlusTransformer3DModel(
            in_channels=4,
            hidden_size=16,
            num_attention_heads=2,
            text_dim=10,
            mlp_width_ratio=2.0,
            num_layers=4,
            rope_dim_list=[4, 2, 2],
        )
    )


def _joyimage_edit_plus_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    """The picture to make, one to edit, and two patches of padding."""
    return {
        "hidden_states": randn(seed, batch, 10, 4, 1, 2, 2),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(seed + 100, batch, 6, 10),
        "encoder_hidden_states_mask": (torch.arange(6) < 5).float().expand(batch, 6),
        "shape_list": [[(1, 2, 2), (1, 2, 2)]] * batch,
    }


register("JoyImageEditPlusTransformer3DModel", _joyimage_edit_plus, _joyimage_edit_plus_inputs)


def _krea2() -> nn.Module:
    return enliven(
        Krea2Transformer2DModel(
            in_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            timestep_embed_dim=8,
            text_hidden_dim=12,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            axes_dims_rope=(4, 2, 2),
        )
    )


def _krea2_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
    picture = torch.stack([torch.zeros(16), rows, columns], dim=-1)
    return {
        "hidden_states": randn(seed, batch, 16, 4),
        "encoder_hidden_states": randn(seed + 100, batch, 6, 3, 12),
        "timestep": torch.full((batch,), 0.5),
        "position_ids": torch.cat([torch.zeros(6, 3), picture]),
        "encoder_attention_mask": (torch.arange(6) < 5).expand(batch, 6),
    }


register("Krea2Transformer2DModel", _krea2, _krea2_inputs)


def _nucleus() -> nn.Module:
    return enliven(
        NucleusMoEImageTransformer2DModel(
            in_channels=4,
            out_channels=1,
            num_layers=6,  # the first three and the last are dense
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            joint_attention_dim=10,
            axes_dims_rope=(4, 2, 2),
            mlp_ratio=12.0,
            num_experts=4,
            moe_intermediate_dim=12,
            capacity_factors=2.0,
        )
    )


def _nucleus_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": randn(seed, batch, 16, 4),
        "img_shapes": [(1, 4, 4)] * batch,
        "encoder_hidden_states": randn(seed + 100, batch, 6, 10),
        "encoder_hidden_states_mask": (torch.arange(6) < 5).expand(batch, 6),
        "timestep": torch.full((batch,), 0.5),
    }


register("NucleusMoEImageTransformer2DModel", _nucleus, _nucleus_inputs)


def _prior() -> nn.Module:
    return enliven(
        PriorTransformer(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=4,
            embedding_dim=12,
            num_embeddings=6,
        )
    )


def _prior_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": randn(seed, batch, 12),
        "timestep": torch.tensor(500),
        "proj_embedding": randn(seed + 100, batch, 12),
        "encoder_hidden_states": randn(seed + 200, batch, 6, 12),
        "attention_mask": (torch.arange(6) < 5).expand(batch, 6),
    }


register("PriorTransformer", _prior, _prior_inputs)


def _t5_film() -> nn.Module:
    return enliven(
        T5FilmDecoder(
            input_dims=4,
            targets_length=8,
            d_model=16,
            num_layers=4,
            num_heads=2,
            d_kv=8,
            d_ff=24,
        )
    )


def _t5_film_inputs(seed: int, batch: int = 1) -> dict[str, Any]:
    return {
        "encodings_and_masks": [
            (randn(seed + 100, batch, 6, 16), (torch.arange(6) < 5).float().expand(batch, 6)),
            (randn(seed + 200, batch, 3, 16), torch.ones(batch, 3)),
        ],
        "decoder_input_tokens": randn(seed, batch, 8, 4),
        "decoder_noise_time": torch.full((batch,), 0.5),
    }


register("T5FilmDecoder", _t5_film, _t5_film_inputs)
