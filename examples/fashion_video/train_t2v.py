"""Trains the text-to-video demo: a Latte and its small T5 encoder, together.

    python examples/fashion_video/train_t2v.py --out runs/video --minutes 45 --compile

Needs what ``encode_clips.py`` wrote. A checkpoint is written every few minutes; the same command
goes on from it.
"""

import argparse

import neighbours  # noqa: F401
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, LatteTransformer3DModel
from safetensors.torch import load_file
from torch import nn

# isort: split
from motions import FRAMES, MOTIONS, all_captions, label_of
from text_modules import build_t5_encoder, build_t5_tokenizer
from training import add_arguments, fit

from data import CLASS_NAMES
from train_dit import build_scheduler

TEXT_WIDTH = 64
PIPELINE_TOKENS = 120  # LattePipeline pads every caption to this, and attends to the padding


def build_transformer() -> LatteTransformer3DModel:
    """8 spatial and 8 temporal blocks of width 96 on 8 frames of 16 tokens."""
    model = LatteTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,  # the pipeline drops the second half, which stays at zero
        num_layers=8,
        cross_attention_dim=96,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_WIDTH,
        video_length=FRAMES,
    )
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model.eval()


def build_text() -> tuple[nn.Module, nn.Module]:
    tokenizer = build_t5_tokenizer(all_captions())
    return tokenizer, build_t5_encoder(tokenizer, TEXT_WIDTH)


class CaptionTable:
    """All captions as tokens, and their embeddings as ``LattePipeline`` would pass them.

    The pipeline attends to padding: zeros after a caption, unmasked encodings after the empty one,
    120 tokens in all, unless a single prompt is given, which is cut to its own length. The n
    padding tokens of either kind are alike, so a few stand for all with log(n) added to their
    scores. Every other sample is taken as part of a batch, the rest as single prompts.
    """

    def __init__(self, tokenizer: nn.Module, device: torch.device) -> None:
        captions = all_captions()
        self.empty = len(captions) - 1
        tokens = tokenizer(captions, padding="longest", return_tensors="pt").to(device)
        # One column more: every caption has at least one padding token.
        self.ids = F.pad(tokens.input_ids, (0, 1), value=tokenizer.pad_token_id)
        self.mask = F.pad(tokens.attention_mask, (0, 1))

    def embed(self, encoder: nn.Module, pick: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [B, L, D] of captions int64 [B], and score offsets [B, 1, L]."""
        encoded = encoder(self.ids, attention_mask=self.mask).last_hidden_state[pick]
        mask = self.mask[pick].bool()
        dropped = (pick == self.empty)[:, None]
        encoded = encoded * (mask | dropped)[:, :, None]
        length = mask.sum(1, keepdim=True)
        batched = torch.rand(len(pick), 1, device=pick.device) < 0.5
        # A single prompt has no padding, but the empty one is cut to the prompt's length.
        single = torch.where(dropped, 5 - length, 0)
        padding = torch.where(batched, PIPELINE_TOKENS - length, single)
        few = self.ids.shape[1] - length
        offset = torch.where(mask, 0.0, (padding / few).log().clamp_min(-1e4))
        return encoded, offset[:, None].float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, minutes=45.0, batch_size=32)
    parser.add_argument("--vae", default="skipcache/demo/fashion_dit/vae")
    parser.add_argument("--class-only", type=float, default=0.1, help="captions without a motion")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    clips = load_file(args.out / "clips.safetensors")
    scaling_factor = AutoencoderKL.load_config(args.vae)["scaling_factor"]
    latents = clips["latents"].to(device)
    item, label = clips["item"].to(device), label_of(clips["item"], clips["motion"]).to(device)

    tokenizer, text_encoder = build_text()
    model = nn.ModuleDict({"transformer": build_transformer(), "text_encoder": text_encoder})
    model.to(device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    captions = CaptionTable(tokenizer, device)
    scheduler = build_scheduler()
    if args.compile:
        for block in model["transformer"].transformer_blocks:
            block.compile()
        for block in model["transformer"].temporal_transformer_blocks:
            block.compile()

    def draw_loss() -> torch.Tensor:
        count = args.batch_size
        pick = torch.randint(len(label), (count,), device=device)
        clean = latents[pick].float() * scaling_factor
        chance = torch.rand(count, device=device)
        caption = torch.where(
            chance < args.class_only, len(CLASS_NAMES) * len(MOTIONS) + item[pick], label[pick]
        )
        caption = torch.where(chance > 1 - args.dropout, captions.empty, caption)
        text, offset = captions.embed(model["text_encoder"], caption)
        noise = torch.randn_like(clean)
        timestep = torch.randint(scheduler.config.num_train_timesteps, (count,), device=device)
        predicted = model["transformer"](
            scheduler.add_noise(clean, noise, timestep),
            timestep=timestep,
            encoder_hidden_states=text,
            encoder_attention_mask=offset.repeat_interleave(FRAMES, 0),
        ).sample[:, : clean.shape[1]]
        target = scheduler.get_velocity(clean, noise, timestep)
        return F.mse_loss(predicted.float(), target)

    fit(model, draw_loss, args, args.out / "t2v_checkpoint.pt")


if __name__ == "__main__":
    main()
