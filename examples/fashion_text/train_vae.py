"""Trains the autoencoder of the text-to-image demo and encodes the pictures it trains on.

    python examples/fashion_text/train_vae.py --out runs/text

It makes 16 x 4 x 4 of 32 x 32: ``HunyuanDiTPipeline`` lays out its rotary positions for a factor
of 8, whatever the autoencoder, so the factor 4 of the class-to-image demo cannot serve. Writes
``<out>/vae`` and ``<out>/latents.safetensors``. Goes on from the last epoch when stopped.
"""

import argparse
import time
from pathlib import Path

import neighbours  # noqa: F401
import torch
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from safetensors.torch import save_file

# isort: split
from captions import draw, draw_attributes

import data


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        sample_size=data.IMAGE_SIZE,
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, items: torch.Tensor, attributes: torch.Tensor) -> torch.Tensor:
    """The mean of every posterior, fp16 [N, 16, 4, 4]."""
    means = []
    for batch, parts in zip(items.split(500), attributes.split(500), strict=True):
        means.append(vae.encode(draw(batch, parts) * 2 - 1).latent_dist.mean.half())
    return torch.cat(means).contiguous()


@torch.no_grad()
def peak_ratio_db(vae: AutoencoderKL, items: torch.Tensor, attributes: torch.Tensor) -> float:
    """Mean PSNR of reconstructions in dB, full scale 1."""
    pictures = draw(items, attributes)
    decoded = (vae(pictures * 2 - 1).sample / 2 + 0.5).clamp(0, 1)
    return float(
        (-10 * (decoded - pictures).square().mean((1, 2, 3)).clamp_min(1e-9).log10()).mean()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=data.DEFAULT_FOLDER)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4, help="of half the training pictures each")
    parser.add_argument("--limit", type=int, default=60000, help="pictures to train on and encode")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--kl-weight", type=float, default=1e-5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0 = as many as there are cores")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)

    items, labels = data.load("train", args.data)
    items, labels = items[: args.limit], labels[: args.limit]
    torch.manual_seed(args.seed)
    vae = build_vae().to(device)
    steps = max(1, len(items) // 2 // args.batch_size)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, args.epochs * steps)
    checkpoint = args.out / "vae_checkpoint.pt"
    first_epoch = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first_epoch = state["epoch"]

    started = time.monotonic()
    for epoch in range(first_epoch, args.epochs):
        generator = torch.Generator().manual_seed(args.seed + epoch)
        order = torch.randperm(len(items), generator=generator)
        for step in range(steps):
            pick = order[step * args.batch_size : (step + 1) * args.batch_size]
            batch = draw(items[pick], draw_attributes(labels[pick], generator)).to(device) * 2 - 1
            with torch.autocast(device.type, dtype=torch.bfloat16):
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
                    f"epoch {epoch} step {step}/{steps} mse {error.square().mean():.5f} "
                    f"kl {posterior.kl().float().mean():.1f} {time.monotonic() - started:.0f} s",
                    flush=True,
                )
        state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"schedule": schedule.state_dict(), "epoch": epoch + 1}
        torch.save(state, checkpoint)

    vae = vae.cpu().eval()
    generator = torch.Generator().manual_seed(args.seed)
    attributes = draw_attributes(labels, generator)
    latents = encode(vae, items, attributes)
    scaling_factor = float(1.0 / latents.float().std())
    vae.register_to_config(scaling_factor=scaling_factor)
    vae.save_pretrained(args.out / "vae")
    save_file({"mean": latents, "attributes": attributes}, args.out / "latents.safetensors")
    held_out, held_out_labels = data.load("t10k", args.data)
    held_out_attributes = draw_attributes(held_out_labels, generator)
    ratio = peak_ratio_db(vae, held_out[:2000], held_out_attributes[:2000])
    print(f"scaling factor {scaling_factor:.4f}, held-out PSNR {ratio:.2f} dB")


if __name__ == "__main__":
    main()
