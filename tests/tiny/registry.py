"""Tiny configurations of diffusers' transformers: how to build one and what to call it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Tiny:
    """One class.

    ``make()`` builds it, small, with at least four layers (two or more in each list), and calls
    ``enliven`` on it. ``inputs(seed, batch)`` gives one forward's keyword arguments, the timestep
    (about the middle of its scale) among them. ``batches`` says whether it takes a batch of two.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, Any]]
    batches: bool = True


TINY: dict[str, Tiny] = {}


def register(name: str, make: Callable[[], nn.Module], inputs: Any, batches: bool = True) -> None:
    """Under the name of its class."""
    assert name not in TINY, name
    TINY[name] = Tiny(make, inputs, batches)


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws the weights so that every layer matters to the output: gates and last layers that start
    at zero would hide it.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * (1.2 / max(fan_in, 1) ** 0.5))
            elif bool((parameter == 1).all()):
                parameter.add_(0.2 * noise)  # the weight of a norm
            else:
                parameter.copy_(0.2 * noise)
    return model.eval()


def randn(seed: int, *shape: int) -> torch.Tensor:
    """Normal noise drawn from the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
