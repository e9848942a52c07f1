"""Trains the text-to-image demo: a HunyuanDiT that reads a small BERT and a small T5 encoder.

    python examples/fashion_text/train_hunyuan.py --out runs/text --minutes 35

Needs what ``train_vae.py`` wrote. The text encoders keep their random weights, as the captions have
few words: all captions are encoded once, and the transformer learns to read them. A checkpoint is
written every few minutes; the same command goes on from it.
"""

import argparse

import neighbours  # noqa: F401
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, HunyuanDiT2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from safetensors.torch import load_file
from torch import nn

# isort: split
from captions import all_captions, leave_unsaid
from compact_text import CompactText
from text_modules import build_bert, build_bert_tokenizer, build_t5_encoder, build_t5_tokenizer
from training import add_arguments, fit

from skipcache.demo.captions import UNSAID
from train_dit import build_scheduler

BERT_WIDTH, T5_WIDTH, HEAD = 64, 32, 32
TEXT_SEED = 7  # of the encoders' weights, which are not trained


def build_transformer() -> HunyuanDiT2DModel:
    """12 layers of width 128 on 16 tokens, 5 of them with a native long skip."""
    model = HunyuanDiT2DModel(
        num_attention_heads=4,
        attention_head_dim=HEAD,
        in_channels=16,
        patch_size=1,
        sample_size=4,
        hidden_size=128,
        num_layers=12,
        learn_sigma=True,  # the pipeline drops the second half, which stays at zero
        cross_attention_dim=BERT_WIDTH,
        cross_attention_dim_t5=T5_WIDTH,
        pooled_projection_dim=64,
        text_len=77,
        text_len_t5=256,
        use_style_cond_and_image_meta_size=False,
    )
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model.eval()


def build_text() -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """BERT tokenizer and model, T5 tokenizer and encoder; the same weights every time."""
    captions, _ = all_captions()
    with torch.random.fork_rng():
        torch.manual_seed(TEXT_SEED)
        bert_tokenizer, t5_tokenizer = build_bert_tokenizer(captions), build_t5_tokenizer(captions)
        bert = build_bert(bert_tokenizer, BERT_WIDTH)
        t5 = build_t5_encoder(t5_tokenizer, T5_WIDTH)
    return bert_tokenizer, bert, t5_tokenizer, t5


def rotary_embedding(grid: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary positions that the pipeline passes for 32 x 32 pictures and patches of 1."""
    region = get_resize_crop_region_for_grid((grid, grid), 512 // 8)
    return get_2d_rotary_pos_embed(HEAD, region, (grid, grid), output_type="pt")


@torch.no_grad()
def encode_captions() -> dict[str, torch.Tensor]:
    """Encodings and masks of all captions, as the pipeline makes them: 77 and 256 tokens."""
    captions, _ = all_captions()
    bert_tokenizer, bert, t5_tokenizer, t5 = build_text()
    encoded = {}
    for name, tokenizer, encoder, length in (
        ("bert", bert_tokenizer, bert, 77),
        ("t5", t5_tokenizer, t5, 256),
    ):
        tokens = tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt")
        parts = zip(tokens.input_ids.split(50), tokens.attention_mask.split(50), strict=True)
        hidden = [encoder(ids, attention_mask=mask)[0] for ids, mask in parts]
        encoded |= {name: torch.cat(hidden), f"{name}_mask": tokens.attention_mask}
    return encoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, minutes=35.0, batch_size=128)
    parser.add_argument("--unsaid", type=float, default=0.25, help="share of parts not mentioned")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    stored = load_file(args.out / "latents.safetensors")
    scaling_factor = AutoencoderKL.load_config(args.out / "vae")["scaling_factor"]
    latents, attributes = stored["mean"].to(device), stored["attributes"]
    text = {name: tensor.to(device) for name, tensor in encode_captions().items()}
    _, index = all_captions()
    # Captions by their parts, -1 (unsaid) first, for looking up whole batches.
    table = torch.zeros(10, 3, 6, 3, 3, dtype=torch.int64)
    for parts, number in index.items():
        table[(parts[0], *(part - UNSAID for part in parts[1:]))] = number

    torch.manual_seed(args.seed)
    model = build_transformer()
    compact = CompactText(model)
    model.to(device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    rotary = tuple(part.to(device) for part in rotary_embedding())
    scheduler = build_scheduler()
    if args.compile:
        for block in model.blocks:
            block.compile()

    def draw_loss() -> torch.Tensor:
        count = args.batch_size
        pick = torch.randint(len(attributes), (count,))
        said = leave_unsaid(attributes[pick], args.unsaid)
        said[:, 1:] -= UNSAID
        caption = torch.where(torch.rand(count) < args.dropout, 0, table[tuple(said.T)]).to(device)
        clean = latents[pick.to(device)].float() * scaling_factor
        noise = torch.randn_like(clean)
        timestep = torch.randint(scheduler.config.num_train_timesteps, (count,), device=device)
        predicted = compact(
            scheduler.add_noise(clean, noise, timestep),
            timestep.float(),
            *(text[name][caption] for name in ("bert", "bert_mask", "t5", "t5_mask")),
            rotary,
        )[:, : clean.shape[1]]
        target = scheduler.get_velocity(clean, noise, timestep)
        return F.mse_loss(predicted.float(), target)

    fit(model, draw_loss, args, args.out / "hunyuan_checkpoint.pt")


if __name__ == "__main__":
    main()
