"""Samples as files: PNG for pictures, GIF for clips."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

SHORTEST_SIDE = 256  # smaller samples are enlarged, so that they can be looked at
FRAME_MS = 125


def save_picture(sample: torch.Tensor, folder: Path, stem: str) -> str:
    """Writes one sample.

    Args:
        sample: a picture [C, H, W] or a clip [F, C, H, W], in 0..1, of one or three channels.
        folder: of the results.
        stem: path below the folder, without the suffix.

    Returns:
        The path below the folder.
    """
    frames = [_image_of(frame) for frame in (sample if sample.dim() == 4 else sample[None])]
    name = f"{stem}.gif" if sample.dim() == 4 else f"{stem}.png"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if sample.dim() == 4:
        frames[0].save(
            path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0, disposal=1
        )
    else:
        frames[0].save(path, optimize=True)
    return name


def _image_of(frame: torch.Tensor) -> Image.Image:
    levels = (frame.clamp(0, 1) * 255).round().to(torch.uint8)
    array = levels[0] if len(levels) == 1 else levels.permute(1, 2, 0)
    image = Image.fromarray(array.contiguous().numpy())
    factor = max(1, SHORTEST_SIDE // min(image.size))
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST) if factor > 1 else image
