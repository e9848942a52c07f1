"""Latte for class-to-video, as a diffusers model.

The class-conditional and unconditional Latte of arXiv:2401.03048: factorised attention over space
and then time, adaLN-Zero blocks (arXiv:2212.09748) and one embedding of timestep and class that all
blocks share. Parts and names are those of diffusers' ``DiTTransformer2DModel`` and
``LatteTransformer3DModel``.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin  # noqa: TID253 (subclassed; imported on demand)
from diffusers.configuration_utils import register_to_config  # noqa: TID253
from diffusers.models.attention import Attention, FeedForward  # noqa: TID253
from diffusers.models.cache_utils import CacheMixin  # noqa: TID253
from diffusers.models.embeddings import (  # noqa: TID253
    LabelEmbedding,
    PatchEmbed,
    TimestepEmbedding,
    Timesteps,
    get_1d_sincos_pos_embed_from_grid,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput  # noqa: TID253
from diffusers.models.normalization import AdaLayerNormZero  # noqa: TID253
from torch import nn

from skipcache.errors import ConfigError


class LatteClassBlock(nn.Module):
    """Self-attention and MLP, both modulated and gated by the conditioning (adaLN-Zero).

    Args:
        dim: width C of the tokens.
        num_attention_heads: number of heads.
        attention_head_dim: width of a head.
        mlp_ratio: width of the MLP's hidden layer, in units of ``dim``.
        dropout: probability of dropping attention and MLP outputs in training.
        is_temporal: attends over the frames at each position, not over the tokens of each frame.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        is_temporal: bool = False,
    ) -> None:
        super().__init__()
        self.is_temporal = is_temporal
        self.norm1 = AdaLayerNormZero(dim)
        self.attn1 = Attention(
            dim, heads=num_attention_heads, dim_head=attention_head_dim, dropout=dropout, bias=True
        )
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(
            dim, inner_dim=int(dim * mlp_ratio), dropout=dropout, activation_fn="gelu-approximate"
        )

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """One block. Both kinds take and return the same layout, so a block left out costs nothing.

        Args:
            hidden_states: [B·F, N, C]: frames of N tokens, one video after the other.
            temb: [B, C], the conditioning of each video.

        Returns:
            [B·F, N, C].
        """
        batch, (tokens, width) = temb.shape[0], hidden_states.shape[1:]
        # Modulation is the same for all tokens of a video, so it is computed once a video.
        hidden_states = hidden_states.reshape(batch, -1, width)
        normed, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb)
        attended = self._attend(normed.reshape(batch, -1, tokens, width)).reshape(normed.shape)
        hidden_states = hidden_states + gate_msa[:, None] * attended
        normed = self.norm2(hidden_states) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        hidden_states = hidden_states + gate_mlp[:, None] * self.ff(normed)
        return hidden_states.reshape(-1, tokens, width)

    def _attend(self, videos: torch.Tensor) -> torch.Tensor:
        """[B, F, N, C] -> [B, F, N, C]."""
        if self.is_temporal:
            videos = videos.transpose(1, 2)
        attended: torch.Tensor = self.attn1(videos.reshape(-1, *videos.shape[2:]))
        attended = attended.reshape(videos.shape)
        return attended.transpose(1, 2) if self.is_temporal else attended


class LatteClassTransformer3DModel(ModelMixin, ConfigMixin, CacheMixin):  # type: ignore[misc]
    """Predicts the noise of a video from its class, or without one.

    A layer is a block of ``transformer_blocks`` (over the tokens of each frame) and then one of
    ``temporal_transformer_blocks`` (over the frames at each position). Both position embeddings
    are fixed sines and are part of the state dict.

    Args:
        num_attention_heads: number of heads; with ``attention_head_dim`` the width C.
        attention_head_dim: width of a head.
        in_channels: channels of the latents.
        out_channels: channels of the prediction; twice ``in_channels`` where the variance is
            learned, None for as many as come in.
        num_layers: number of (spatial, temporal) pairs; half the ``depth`` of the research code.
        sample_size: height and width of the latents.
        patch_size: side of a patch.
        video_length: the most frames, and those the model was trained on.
        num_classes: number of classes; None or 0 for an unconditional model.
        class_dropout_prob: probability of replacing a label by the null class in training mode.
            Above 0 there is a null class, ``num_classes``, as guidance needs it.
        mlp_ratio: width of the MLPs' hidden layer, in units of C.
        dropout: dropout in attention and MLPs, in training mode.

    Raises:
        ConfigError: latents that patches do not tile.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LatteClassBlock"]  # noqa: RUF012 (as in every diffusers model)
    _repeated_blocks = ["LatteClassBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]  # noqa: RUF012

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 14,
        sample_size: int = 32,
        patch_size: int = 2,
        video_length: int = 16,
        num_classes: int | None = None,
        class_dropout_prob: float = 0.1,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if sample_size % patch_size:
            raise ConfigError(
                f"sample_size={sample_size} is not a multiple of patch_size={patch_size}. Choose "
                "latents that the patches tile."
            )
        self.inner_dim = num_attention_heads * attention_head_dim
        self.out_channels = in_channels if out_channels is None else out_channels
        self.gradient_checkpointing = False

        self.pos_embed = PatchEmbed(
            height=sample_size,
            width=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=self.inner_dim,
        )
        # Persistent, for the values of a checkpoint in half precision are rounded ones.
        self.pos_embed.register_buffer("pos_embed", self.pos_embed.pos_embed)
        frames = torch.arange(video_length).unsqueeze(1)
        temp_pos_embed = get_1d_sincos_pos_embed_from_grid(self.inner_dim, frames, output_type="pt")
        self.register_buffer("temp_pos_embed", temp_pos_embed.float().unsqueeze(0))

        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(256, self.inner_dim)
        self.class_embedder = (
            LabelEmbedding(num_classes, self.inner_dim, class_dropout_prob) if num_classes else None
        )

        block = partial(
            LatteClassBlock,
            dim=self.inner_dim,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
        )
        self.transformer_blocks = nn.ModuleList(block() for _ in range(num_layers))
        self.temporal_transformer_blocks = nn.ModuleList(
            block(is_temporal=True) for _ in range(num_layers)
        )

        self.norm_out = nn.LayerNorm(self.inner_dim, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(self.inner_dim, 2 * self.inner_dim)
        self.proj_out_2 = nn.Linear(self.inner_dim, patch_size * patch_size * self.out_channels)

    @property
    def null_class(self) -> int | None:
        """The label that stands for no class; None where there is none."""
        has_one = self.class_embedder is not None and self.config.class_dropout_prob > 0
        return self.config.num_classes if has_one else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """One prediction.

        Args:
            hidden_states: noisy latents, [B, in_channels, F, H, W], F at most ``video_length``.
            timestep: [B], or one for all; 0..1000, 1000 = noise.
            class_labels: integers, [B], or None for an unconditional model.
            return_dict: returns an object with ``.sample`` in place of a tuple.

        Returns:
            The prediction, [B, out_channels, F, H, W].

        Raises:
            ConfigError: latents or labels that the model was not made for.
        """
        batch, channels, frames, height, width = self._check_latents(hidden_states)
        patch = self.config.patch_size
        temb = self._embed_conditions(timestep, class_labels, hidden_states)

        # [B, c, F, H, W] -> [B·F, N, C]
        hidden_states = hidden_states.transpose(1, 2).reshape(-1, channels, height, width)
        hidden_states = self.pos_embed(hidden_states)
        tokens = hidden_states.shape[1]

        for i, (spatial, temporal) in enumerate(
            zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        ):
            hidden_states = self._run(spatial, hidden_states, temb)
            if i == 0:
                positions = self.temp_pos_embed[0, :frames, None].to(hidden_states.dtype)
                videos = hidden_states.reshape(batch, frames, tokens, -1) + positions
                hidden_states = videos.flatten(0, 1)
            hidden_states = self._run(temporal, hidden_states, temb)

        shift, scale = self.proj_out_1(F.silu(temb)).chunk(2, dim=1)
        hidden_states = hidden_states.reshape(batch, frames * tokens, -1)
        hidden_states = self.norm_out(hidden_states) * (1 + scale[:, None]) + shift[:, None]
        hidden_states = self.proj_out_2(hidden_states)

        # [B, F·N, p·p·c] -> [B, c, F, H, W]
        hidden_states = hidden_states.reshape(
            batch, frames, height // patch, width // patch, patch, patch, self.out_channels
        )
        output = torch.einsum("bfhwpqc->bcfhpwq", hidden_states).reshape(
            batch, self.out_channels, frames, height, width
        )
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _run(
        self, block: nn.Module, hidden_states: torch.Tensor, temb: torch.Tensor
    ) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            output: torch.Tensor = self._gradient_checkpointing_func(block, hidden_states, temb)
        else:
            output = block(hidden_states, temb)
        return output

    def _embed_conditions(
        self,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None,
        hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        """Timestep and class as one vector a sample, [B, C]."""
        batch, device = hidden_states.shape[0], hidden_states.device
        timestep = torch.as_tensor(timestep, device=device).reshape(-1).expand(batch)
        projected = self.time_proj(timestep).to(hidden_states.dtype)
        temb: torch.Tensor = self.timestep_embedder(projected)
        self._check_labels(class_labels, batch)
        return temb if self.class_embedder is None else temb + self.class_embedder(class_labels)

    def _check_latents(self, hidden_states: torch.Tensor) -> tuple[int, int, int, int, int]:
        config = self.config
        shape = tuple(hidden_states.shape)
        size = (config.sample_size, config.sample_size)
        if len(shape) != 5 or shape[1] != config.in_channels or shape[3:] != size:
            raise ConfigError(
                f"latents of shape {shape}. This model takes [B, {config.in_channels}, F, "
                f"{size[0]}, {size[1]}] (batch, channels, frames, height, width)."
            )
        if not 1 <= shape[2] <= config.video_length:
            raise ConfigError(
                f"latents of {shape[2]} frames. This model has position embeddings for 1 to "
                f"{config.video_length} (video_length)."
            )
        return shape

    def _check_labels(self, labels: torch.Tensor | None, batch: int) -> None:
        if self.class_embedder is None:
            if labels is not None:
                raise ConfigError(
                    "class_labels were given, and the model is unconditional. Leave them out."
                )
            return
        null = "" if self.null_class is None else f" ({self.null_class} for no class)"
        allowed = f"{batch} integers from 0 to {self.config.num_classes - 1}{null}"
        if labels is None or labels.shape != (batch,) or labels.is_floating_point():
            found = "None" if labels is None else f"{tuple(labels.shape)} of {labels.dtype}"
            raise ConfigError(f"class_labels are {found}. Pass a tensor of {allowed}.")
        # On another device than the CPU, reading them would wait for it; there the pipeline has
        # checked them.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            known = self.class_embedder.embedding_table.num_embeddings
            wrong = [label for label in labels.tolist() if not 0 <= label < known]
            if wrong:
                raise ConfigError(f"class_labels {wrong} do not exist. Pass {allowed}.")
