"""Clips of 8 frames: one Fashion-MNIST item that moves, bounces, turns or changes its size.

Deterministic by the generator's seed. Start, path and size vary a little from clip to clip, so that
a motion is something to learn and not one fixed path.
"""

import math

import neighbours  # noqa: F401
import torch

# isort: split
from render import place_items

from data import CLASS_NAMES
from skipcache.demo.captions import MOTIONS, UNSAID, clip_caption

FRAMES = 8
NUM_LABELS = len(CLASS_NAMES) * len(MOTIONS)


def label_of(item: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
    """The class-to-video label: item class times 8 plus motion."""
    return item * len(MOTIONS) + motion


def all_captions() -> list[str]:
    """80 captions in label order, then the 10 that name no motion, then the empty one."""
    full = [
        clip_caption(item, motion)
        for item in range(len(CLASS_NAMES))
        for motion in range(len(MOTIONS))
    ]
    return [*full, *(clip_caption(item, UNSAID) for item in range(len(CLASS_NAMES))), ""]


def plan_paths(
    motions: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the item is in every frame.

    Args:
        motions: Index into ``MOTIONS``, int64 [N].
        generator: Source of the variations.

    Returns:
        Scale [N, F], shift [N, F, 2] (x right, y down, 1 = half a side), clockwise angle [N, F].
    """
    count = len(motions)

    def vary(amount: float) -> torch.Tensor:
        return amount * (2 * torch.rand(count, 1, generator=generator) - 1)

    time = torch.linspace(0, 1, FRAMES)[None]
    motion = motions[:, None]
    travel = (0.9 + vary(0.08)) * (time - 0.5) + vary(0.04)
    along = torch.where((motion == 0) | (motion == 2), -travel, travel)
    aside = vary(0.15).expand(-1, FRAMES)
    height = (2 * math.pi * (0.75 * time + 0.06 * torch.rand(count, 1, generator=generator))).sin()
    bounce = 0.42 - (0.84 + vary(0.06)) * height.abs()
    shift_x = torch.where(motion <= 1, along, torch.where(motion <= 4, aside, aside / 2))
    shift_y = torch.where((motion == 2) | (motion == 3), along, aside / 2)
    shift_y = torch.where(motion <= 1, aside, torch.where(motion == 4, bounce, shift_y))
    base = (0.6 + vary(0.05)).expand(-1, FRAMES)
    grown = 0.32 + (0.6 + vary(0.04)) * torch.where(motion == 6, time, 1 - time)
    scale = torch.where(motion >= 6, grown, torch.where(motion == 5, base + 0.15, base))
    angle = torch.where(motion == 5, math.pi * time + vary(0.25), torch.zeros_like(scale))
    return scale, torch.stack([shift_x, shift_y], -1), angle


def render_clips(
    items: torch.Tensor, motions: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Clips in 0..1, [N, 1, F, 32, 32], of items uint8 [N, 1, 32, 32]."""
    scale, shift, angle = plan_paths(motions, generator)
    still = (items.float() / 255).repeat_interleave(FRAMES, 0)
    frames = place_items(still, scale.flatten(), shift.flatten(0, 1), angle.flatten())
    return frames.reshape(len(items), FRAMES, 1, *frames.shape[-2:]).transpose(1, 2)
