"""Trains the small AutoencoderKL of the demo model: 32 x 32 grey pictures to 4 x 8 x 8 latents.

    python examples/fashion_dit/train_vae.py --out runs/fashion_dit

Writes ``<out>/vae`` (a diffusers folder, fp32, scaling factor set) and the latents of both splits.
Resumes by itself.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import data


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=data.IMAGE_SIZE,
    )


@torch.no_grad()
def encode_split(vae: AutoencoderKL, split: str, folder: Path) -> dict[str, torch.Tensor]:
    """The mean of every posterior, fp16 [N, 4, 8, 8], and labels int64 [N]."""
    images, labels = data.load(split, folder)
    means = []
    for batch in images.split(500):
        means.append(vae.encode(data.to_unit_range(batch)).latent_dist.mean.half())
    return {"mean": torch.cat(means).contiguous(), "label": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=data.DEFAULT_FOLDER)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--kl-weight", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    vae = build_vae()
    images, _ = data.load("train", args.data)
    loader = DataLoader(
        TensorDataset(images), batch_size=args.batch_size, shuffle=True, drop_last=True
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, args.epochs * len(loader))
    checkpoint = args.out / "vae_checkpoint.pt"
    first_epoch = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first_epoch = state["epoch"]

    started = time.monotonic()
    for epoch in range(first_epoch, args.epochs):
        for step, (batch,) in enumerate(loader):
            batch = data.to_unit_range(batch)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                posterior = vae.encode(batch).latent_dist
                decoded = vae.decode(posterior.sample()).sample
            error = decoded.float() - batch
            reconstruction = error.square().mean() + 0.1 * error.abs().mean()
            loss = reconstruction + args.kl_weight * posterior.kl().float().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                print(
                    f"epoch {epoch} step {step}/{len(loader)} mse {error.square().mean():.5f} "
                    f"kl {posterior.kl().float().mean():.1f} {time.monotonic() - started:.0f} s",
                    flush=True,
                )
        torch.save(
            {
                "vae": vae.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "epoch": epoch + 1,
            },
            checkpoint,
        )

    vae.eval()
    train = encode_split(vae, "train", args.data)
    scaling_factor = float(1.0 / train["mean"].float().std())
    vae.register_to_config(scaling_factor=scaling_factor)
    vae.save_pretrained(args.out / "vae")
    save_file(train, args.out / "latents_train.safetensors")
    save_file(encode_split(vae, "t10k", args.data), args.out / "latents_t10k.safetensors")
    print(f"scaling factor {scaling_factor:.4f}")


if __name__ == "__main__":
    main()
