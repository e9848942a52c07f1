"""Trains a HunyuanDiT on short captions with the same result as on the pipeline's 77 + 256 tokens.

``HunyuanDiTPipeline`` always pads to 333 tokens, and every layer attends to all of them; padding is
replaced by learned vectors. With one vector for all padding, 301 of the padding tokens become one
token whose attention score gets log(301) added, exactly: a tenfold cheaper cross-attention here.
"""

import math
from typing import Any

import torch
from diffusers import HunyuanDiT2DModel
from diffusers.models.attention_processor import Attention, HunyuanAttnProcessor2_0
from torch import nn

SHORT = 16  # tokens of either encoder that a caption may take
FULL = 77 + 256  # what the pipeline passes


class CompactTextAttnProcessor(HunyuanAttnProcessor2_0):
    """Adds the log of how many padding tokens the last one stands for to its score."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None:
            attention_mask = hidden_states.new_zeros(len(hidden_states), 1, 2 * SHORT + 1)
            attention_mask[:, :, -1] = math.log(FULL - 2 * SHORT)
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, temb, image_rotary_emb
        )


class CompactText:
    """Switches a model to short captions while it is trained.

    ``forward`` takes what the model takes, with 16 tokens of either encoder, and the full T5
    encoding ``[B, 256, D]`` besides, which only the pooler of the text reads.
    """

    def __init__(self, model: HunyuanDiT2DModel) -> None:
        self.model = model
        row = 0.1 * torch.randn(1, model.text_embedding_padding.shape[1])
        model.text_embedding_padding = nn.Parameter(row)  # broadcasts over the tokens
        model.set_attn_processor(CompactTextAttnProcessor())
        model.time_extra_emb.register_forward_pre_hook(self._give_full_encoding)
        self._full: torch.Tensor | None = None

    def __call__(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        bert: torch.Tensor,
        bert_mask: torch.Tensor,
        t5: torch.Tensor,
        t5_mask: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        self._full = t5
        mask = t5_mask[:, : SHORT + 1].clone()
        mask[:, SHORT] = 0  # one padding token for all that are left out
        return self.model(
            latents,
            timestep,
            encoder_hidden_states=bert[:, :SHORT],
            text_embedding_mask=bert_mask[:, :SHORT],
            encoder_hidden_states_t5=t5[:, : SHORT + 1].contiguous(),
            text_embedding_mask_t5=mask,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]

    def _give_full_encoding(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0], self._full, *args[2:])


def expand_padding(model: HunyuanDiT2DModel) -> None:
    """Gives a trained model the pipeline's 333 tokens back, for saving and sampling."""
    row = model.text_embedding_padding.data
    model.text_embedding_padding = nn.Parameter(row.expand(FULL, -1).clone())
    model.set_default_attn_processor()
    model.time_extra_emb._forward_pre_hooks.clear()
