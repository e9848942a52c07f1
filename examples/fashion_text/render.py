"""Draws Fashion-MNIST items scaled, shifted, turned and flipped on black, by affine sampling."""

import torch
import torch.nn.functional as F


def place_items(
    items: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    angle: torch.Tensor | None = None,
    upside_down: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draws every item once; twofold supersampling keeps small items from flickering.

    Args:
        items: Pictures in 0..1, [N, 1, 32, 32].
        scale: Size relative to the original, [N].
        shift: Where the middle goes, [N, 2], x right and y down, 1 = half the picture's side.
        angle: Clockwise turn in radians, [N].
        upside_down: Whether the item is flipped top to bottom, bool [N].

    Returns:
        Pictures in 0..1, [N, 1, 32, 32].
    """
    angle = torch.zeros_like(scale) if angle is None else angle
    flip = torch.ones_like(scale)
    if upside_down is not None:
        flip = torch.where(upside_down, -1.0, 1.0)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    # From a place in the drawn picture back to a place in the item: shift, turn and scale undone.
    matrix = torch.stack(
        [torch.stack([cos, sin], -1), torch.stack([-sin * flip, cos * flip], -1)], 1
    )
    offset = -(matrix @ shift[:, :, None])
    count, channels, height, width = items.shape
    grid = F.affine_grid(
        torch.cat([matrix, offset], -1),
        [count, channels, 2 * height, 2 * width],
        align_corners=False,
    )
    return F.avg_pool2d(F.grid_sample(items, grid, align_corners=False), 2).clamp(0, 1)
