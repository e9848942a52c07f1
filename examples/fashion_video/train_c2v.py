"""Trains the class-to-video demo: a Latte on labels of item and motion, plain or as a Skip-DiT.

    python examples/fashion_video/train_c2v.py --out runs/video --steps 2400
    python examples/fashion_video/train_c2v.py --out runs/video --steps 2400 --skip

Needs what ``encode_clips.py`` wrote. With ``--skip`` it is trained from scratch with skip branches
in the paper's form (arXiv:2411.17616); a budget in steps makes the two comparable. A checkpoint is
written every few minutes; the same command goes on from it.
"""

import argparse

import neighbours  # noqa: F401
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import nn

# isort: split
from motions import FRAMES, NUM_LABELS, label_of
from training import add_arguments, fit

from skipcache import add_skip_branches
from skipcache.latte_class import LatteClassTransformer3DModel
from train_dit import build_scheduler


def build_transformer(*, has_branches: bool) -> LatteClassTransformer3DModel:
    """8 spatial and 8 temporal blocks of width 96 on 8 frames of 16 tokens."""
    model = LatteClassTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=4,
        num_layers=8,
        sample_size=8,
        patch_size=2,
        video_length=FRAMES,
        num_classes=NUM_LABELS,
    )
    for block in (*model.transformer_blocks, *model.temporal_transformer_blocks):
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(model.proj_out_2.weight)
    nn.init.zeros_(model.proj_out_2.bias)
    if has_branches:
        add_skip_branches(model, form="replace")
    return model.eval()  # labels are dropped here: guidance needs one share for the whole video


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, minutes=45.0, batch_size=32)
    parser.add_argument("--vae", default="skipcache/demo/fashion_dit/vae")
    parser.add_argument("--skip", action="store_true", help="with skip branches from the start")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    clips = load_file(args.out / "clips.safetensors")
    scaling_factor = AutoencoderKL.load_config(args.vae)["scaling_factor"]
    latents = clips["latents"].to(device)
    labels = label_of(clips["item"], clips["motion"]).to(device)

    model = build_transformer(has_branches=args.skip).to(device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    scheduler = build_scheduler()
    if args.compile:
        for block in (*model.transformer_blocks, *model.temporal_transformer_blocks):
            block.compile()

    def draw_loss() -> torch.Tensor:
        count = args.batch_size
        pick = torch.randint(len(labels), (count,), device=device)
        clean = latents[pick].float() * scaling_factor
        is_dropped = torch.rand(count, device=device) < args.dropout
        label = torch.where(is_dropped, NUM_LABELS, labels[pick])
        noise = torch.randn_like(clean)
        timestep = torch.randint(scheduler.config.num_train_timesteps, (count,), device=device)
        noisy = scheduler.add_noise(clean, noise, timestep)
        predicted = model(noisy, timestep, label).sample
        return F.mse_loss(predicted.float(), scheduler.get_velocity(clean, noise, timestep))

    kind = "skip" if args.skip else "plain"
    fit(model, draw_loss, args, args.out / f"c2v_{kind}_checkpoint.pt")


if __name__ == "__main__":
    main()
