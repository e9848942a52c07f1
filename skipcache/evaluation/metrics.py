"""Distances between pictures, computed in float."""

from __future__ import annotations

import math

import torch


def psnr(image: torch.Tensor, reference: torch.Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio, in dB, over all elements.

    Computed on the floats: rounding to uint8 first would hide errors below one grey level (and one
    tool's uint8 differences wrap round).

    Args:
        image: floats of any shape, for example [B, C, H, W] in 0..``peak``.
        reference: of the same shape.
        peak: the largest value that a pixel can have.

    Returns:
        10 log10(peak^2 / mean squared error); infinity for equal tensors.

    Raises:
        ValueError: the shapes differ, or a tensor is of integers.
    """
    if image.shape != reference.shape:
        raise ValueError(
            f"psnr of different shapes: {tuple(image.shape)} and {tuple(reference.shape)}"
        )
    if not image.is_floating_point() or not reference.is_floating_point():
        raise ValueError(
            f"psnr wants floats in 0..{peak}, found {image.dtype} and {reference.dtype}"
        )
    error = (image.double() - reference.double()).square().mean().item()
    return 10.0 * math.log10(peak**2 / error) if error > 0 else math.inf
