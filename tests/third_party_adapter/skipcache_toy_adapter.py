"""A model of one's own, and the whole of the adapter that describes it."""

from __future__ import annotations

import torch
from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl

claims = ("ToyTransformer",)


class ToyBlock(nn.Module):
    """One residual layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """[B, T, C] in and out."""
        return x + torch.tanh(self.linear(x)) + shift


class ToyTransformer(nn.Module):
    """A stack of layers that is told t in 0..1, 1 = noise."""

    def __init__(self, depth: int = 5, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ToyBlock(width) for _ in range(depth))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """[B, T, C] in and out, t of shape [B]."""
        for layer in self.layers:
            x = layer(x, t.view(-1, 1, 1))
        return x


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """Describes ToyTransformer, and nothing else."""
    if type(transformer).__name__ != "ToyTransformer":
        return None
    return Backbone(
        name="toy",
        lists=(BlockList("layers", takes=("x",), returns="x"),),
        timestep=Timestep("t", noise=1.0),
    )
