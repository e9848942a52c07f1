"""The training loop the recipes share: a budget, a moving average, resumable checkpoints."""

import argparse
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import neighbours  # noqa: F401
import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# isort: split
from train_dit import learning_rate_at

LONGEST_STEP_SECONDS = 20.0  # a step that took longer was paused or starved, which is no training


def add_arguments(parser: argparse.ArgumentParser, minutes: float, batch_size: int) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the training runs")
    parser.add_argument("--minutes", type=float, default=minutes, help="over all sessions")
    parser.add_argument("--steps", type=int, default=None, help="a budget in steps instead")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--dropout", type=float, default=0.1, help="of the condition, for guidance")
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0)
    parser.add_argument("--compile", action="store_true", help="needs a C compiler on the CPU")
    parser.add_argument("--no-autocast", action="store_true", help="fp32 instead of bf16 autocast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0 = as many as there are cores")
    parser.add_argument("--seed", type=int, default=0)


def load_average(model: nn.Module, checkpoint: Path) -> dict[str, float]:
    """Puts the moving average of a checkpoint into ``model``; returns its step and seconds."""
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    ema = EMAModel(trained_parameters(model))
    ema.load_state_dict(state["ema"])
    ema.copy_to(trained_parameters(model))
    return {"step": state["step"], "seconds": state["seconds"]}


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fit(
    model: nn.Module,
    draw_loss: Callable[[], torch.Tensor],
    args: argparse.Namespace,
    checkpoint: Path,
) -> None:
    """Trains until the budget is spent, then saves; goes on from ``checkpoint`` if it exists.

    Args:
        model: What is trained, on its device.
        draw_loss: Draws a batch and returns its loss; called under autocast.
        args: Of ``add_arguments``.
        checkpoint: File of weights, moving average, optimizer and progress.
    """
    device = torch.device(args.device)
    parameters = trained_parameters(model)
    ema = EMAModel(parameters, decay=args.ema_decay, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(
        parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    step, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["seconds"]
    ema.to(device)
    torch.manual_seed(args.seed + step)

    def save() -> None:
        state = {"model": model.state_dict(), "ema": ema.state_dict()}
        state |= {"optimizer": optimizer.state_dict(), "step": step, "seconds": spent}
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    def progress() -> float:
        return step / args.steps if args.steps else spent / (60.0 * args.minutes)

    running_loss, last_save, last = 0.0, spent, time.monotonic()
    while progress() < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(progress(), args.learning_rate, step)
        # The CPU's fused attention is slow to differentiate in bf16: 1.13 s a step in fp32, 1.2 s
        # for its backward alone in bf16, 0.79 s a step with plain attention (video, one core).
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext():
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=not args.no_autocast):
                loss = draw_loss()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)

        step += 1
        now = time.monotonic()
        spent, last = spent + min(now - last, LONGEST_STEP_SECONDS), now
        running_loss += loss.item()
        if step % 50 == 0:
            print(
                f"step {step} loss {running_loss / 50:.4f} lr {group['lr']:.2e} "
                f"{spent / 60:.1f} min {args.batch_size * step / spent:.0f} samples/s",
                flush=True,
            )
            running_loss = 0.0
        if spent - last_save > 60.0 * args.checkpoint_minutes:
            save()
            last_save, last = spent, time.monotonic()
    save()
    print(f"finished: {step} steps, {args.batch_size * step} samples, {spent / 60:.1f} min")
