"""Renders clips and encodes them with the class-to-image demo's autoencoder, once for all.

    python examples/fashion_video/encode_clips.py --out runs/video

Writes ``<out>/clips.safetensors``: latents fp16 [N, 4, F, 8, 8] (posterior means, unscaled), item
and motion of every clip. Parts already encoded are kept when it is stopped and started again.
Prints how well the autoencoder brings held-out clips back: it never saw a shrunk or turned item.
"""

import argparse
from pathlib import Path

import neighbours  # noqa: F401
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

# isort: split
from motions import FRAMES, MOTIONS, render_clips

import data

PART = 1000


@torch.no_grad()
def encode(vae: AutoencoderKL, clips: torch.Tensor) -> torch.Tensor:
    """Posterior means fp16 [N, 4, F, 8, 8] of clips in 0..1."""
    frames = clips.transpose(1, 2).flatten(0, 1) * 2 - 1
    means = [vae.encode(batch).latent_dist.mean.half() for batch in frames.split(400)]
    latents = torch.cat(means)
    return latents.unflatten(0, (-1, FRAMES)).transpose(1, 2).contiguous()


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Clips in 0..1 of unscaled latents [N, 4, F, 8, 8]."""
    frames = latents.float().transpose(1, 2).flatten(0, 1)
    decoded = torch.cat([vae.decode(batch).sample for batch in frames.split(400)])
    return (decoded / 2 + 0.5).clamp(0, 1).unflatten(0, (-1, FRAMES)).transpose(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", type=Path, default=Path("skipcache/demo/fashion_dit/vae"))
    parser.add_argument("--data", type=Path, default=data.DEFAULT_FOLDER)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=16000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0 = as many as there are cores")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32).to(args.device).eval()

    items, labels = data.load("t10k", args.data)
    motions = torch.arange(200) % len(MOTIONS)
    clips = render_clips(items[:200], motions, torch.Generator().manual_seed(1))
    error = (decode(vae, encode(vae, clips.to(args.device))).cpu() - clips).square()
    ratio = -10 * error.mean((1, 2, 3, 4)).clamp_min(1e-9).log10()
    for index, motion in enumerate(MOTIONS):
        print(f"PSNR {motion}: {ratio[motions == index].mean():.2f} dB", flush=True)

    items, labels = data.load("train", args.data)
    parts = []
    for number in range(0, args.clips, PART):
        path = args.out / f"clips_{number:06d}.safetensors"
        if not path.exists():
            generator = torch.Generator().manual_seed(number)
            pick = torch.randint(len(items), (PART,), generator=generator)
            motions = torch.randint(len(MOTIONS), (PART,), generator=generator)
            clips = render_clips(items[pick], motions, generator).to(args.device)
            part = {"latents": encode(vae, clips).cpu(), "item": labels[pick], "motion": motions}
            save_file(part, path)
            print(f"{number + PART}/{args.clips} clips", flush=True)
        parts.append(load_file(path))
    joined = {key: torch.cat([part[key] for part in parts])[: args.clips] for key in parts[0]}
    save_file(joined, args.out / "clips.safetensors")
    print(
        f"standard deviation of scaled latents "
        f"{joined['latents'].float().std() * vae.config.scaling_factor:.3f}"
    )


if __name__ == "__main__":
    main()
