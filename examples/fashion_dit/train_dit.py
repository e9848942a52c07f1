"""Trains the class-conditional latent DiT of the demo model (v-prediction, cosine schedule, EMA).

    python examples/fashion_dit/train_dit.py --out runs/fashion_dit --minutes 70

Needs what ``train_vae.py`` wrote. A checkpoint is written every few minutes; the same command goes
on from it. On a GPU: ``--device cuda --batch-size 1024 --minutes 30``.
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

import data


def build_transformer() -> DiTTransformer2DModel:
    """18 layers of width 160 on 16 tokens; adaLN-zero initialisation, as in the DiT paper."""
    model = DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=18,
        num_attention_heads=5,
        attention_head_dim=32,
        num_embeds_ada_norm=data.NULL_CLASS,
    )
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    torch.nn.init.zeros_(model.proj_out_2.weight)
    torch.nn.init.zeros_(model.proj_out_2.bias)
    return model.eval()  # class dropout is ours: in training mode every block would draw its own


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def learning_rate_at(progress: float, peak: float, step: int, warmup: int = 200) -> float:
    """Linear warm-up over steps, then constant, then linear to zero over the last 40 %."""
    return peak * min(1.0, (step + 1) / warmup) * min(1.0, (1.0 - progress) / 0.4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=70.0, help="training time over all sessions"
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ema-decay", type=float, default=0.9992)
    parser.add_argument("--class-dropout", type=float, default=0.1)
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0)
    parser.add_argument(
        "--compile", action="store_true", help="compile the blocks (needs a C compiler)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    vae_config = AutoencoderKL.load_config(args.out / "vae")
    latents = load_file(args.out / "latents_train.safetensors")
    # The posterior means: samples would add noise that no model can predict.
    latent = latents["mean"].to(device).float() * vae_config["scaling_factor"]
    labels = latents["label"].to(device)

    model = build_transformer().to(device)
    scheduler = build_scheduler()
    ema = EMAModel(model.parameters(), decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    checkpoint = args.out / "dit_checkpoint.pt"
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
        torch.manual_seed(args.seed + step)
    ema.to(device)
    if args.compile:
        for block in model.transformer_blocks:
            block.compile(fullgraph=True)

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": spent,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    budget = 60.0 * args.minutes
    running_loss, last_save, last = 0.0, spent, time.monotonic()
    while spent < budget:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(spent / budget, args.learning_rate, step)
        pick = torch.randint(len(labels), (args.batch_size,), device=device)
        clean = latent[pick]
        label = labels[pick]
        dropped = torch.rand(args.batch_size, device=device) < args.class_dropout
        label = torch.where(dropped, data.NULL_CLASS, label)
        noise = torch.randn_like(clean)
        timestep = torch.randint(
            scheduler.config.num_train_timesteps, (args.batch_size,), device=device
        )
        noisy = scheduler.add_noise(clean, noise, timestep)
        target = scheduler.get_velocity(clean, noise, timestep)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            predicted = model(noisy, timestep=timestep, class_labels=label).sample
        loss = F.mse_loss(predicted.float(), target.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.step(model.parameters())

        step += 1
        now = time.monotonic()
        spent, last = spent + now - last, now
        running_loss += loss.item()
        if step % 100 == 0:
            rate = args.batch_size * step / spent
            print(
                f"step {step} loss {running_loss / 100:.4f} lr {group['lr']:.2e} "
                f"{spent / 60:.1f} min {rate:.0f} images/s",
                flush=True,
            )
            running_loss = 0.0
        if spent - last_save > 60.0 * args.checkpoint_minutes:
            save()
            last_save, last = spent, time.monotonic()

    save()
    ema.copy_to(model.parameters())
    model.save_pretrained(args.out / "transformer")
    print(f"finished: {step} steps, {args.batch_size * step} images, {spent / 60:.1f} min")


if __name__ == "__main__":
    main()
