"""The shape of the research code of DiT, Skip-DiT and class-to-video Latte: its names and the
parameters of its forwards, in small modules of our own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

PATCH = 2


class Attention(nn.Module):
    """[B, N, C] -> [B, N, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """[B, N, C] -> [B, N, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulation(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """adaLN-Zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), Mlp(width)
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x, c):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate[:, None] * self.attn(modulated(x, shift, scale))
        return x + gate_mlp[:, None] * self.mlp(modulated(x, shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """[B, N, C] -> [B, N, p·p·c]."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear, self.adaLN_modulation = nn.Linear(width, outputs), modulation(width, 2)

    def forward(self, x, c):
        return self.linear(modulated(x, *self.adaLN_modulation(c).chunk(2, dim=1)))


def axis_positions(width: int, places: torch.Tensor) -> torch.Tensor:
    """Sines, then cosines, of each place: [P, width]."""
    rates = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = places.double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def picture_positions(width: int, side: int) -> torch.Tensor:
    """[1, side · side, width]: half for the column, half for the row."""
    places = torch.arange(side)
    columns = axis_positions(width // 2, places.repeat(side))
    rows = axis_positions(width // 2, places.repeat_interleave(side))
    return torch.cat([columns, rows], dim=1).float()[None]


class Model(nn.Module):
    """What DiT and Latte share: embedders, blocks and head."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        depth: int,
        in_channels: int = 4,
        input_size: int = 8,
        num_classes: int | None = 5,
    ) -> None:
        super().__init__()
        width, self.depth, self.channels = hidden_size, depth, 2 * in_channels
        patches = nn.Conv2d(in_channels, width, PATCH, PATCH)
        self.x_embedder = nn.ModuleDict({"proj": patches})
        mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        if num_classes is not None:
            table = nn.Embedding(num_classes + 1, width)
            self.y_embedder = nn.ModuleDict({"embedding_table": table})
        positions = picture_positions(width, input_size // PATCH)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, PATCH**2 * self.channels)

    def embed(self, x, t, y):
        """Patches [B, N, C] and conditions [B, C]."""
        rates = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angles = t[:, None].float() * rates
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], dim=-1))
        if y is not None:
            c = c + self.y_embedder["embedding_table"](y)
        return self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed, c

    def unpatchify(self, x):
        """[B, N, p·p·c] -> [B, c, H, W]."""
        side = math.isqrt(x.shape[1])
        x = x.reshape(-1, side, side, PATCH, PATCH, self.channels)
        x = torch.einsum("bhwpqc->bchpwq", x)
        return x.reshape(-1, self.channels, side * PATCH, side * PATCH)


class DiT(Model):
    """x [B, c, H, W], t [B], y [B]."""

    def forward(self, x, t, y):
        x, c = self.embed(x, t, y)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


class SkipLinear(nn.Module):
    """The Linear of a skip branch, one level down as in the research code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, width)


def add_research_branches(model: Model, width: int, layers: int) -> None:
    """The two lists of a Skip-DiT, randomly initialised."""
    norms = [nn.LayerNorm(2 * width, eps=1e-6) for _ in range(layers // 2)]
    for norm in norms:
        nn.init.normal_(norm.weight, 1.0, 0.1)
        nn.init.normal_(norm.bias, 0.0, 0.1)
    model.skip_norms = nn.ModuleList(norms)
    model.skip_linears = nn.ModuleList(SkipLinear(width) for _ in range(layers // 2))


class SkipDiT(DiT):
    """DiT with the paper's long skips: layer i with layer L - 1 - i."""

    def __init__(self, **config: int) -> None:
        super().__init__(**config)
        add_research_branches(self, config["hidden_size"], self.depth)

    def forward(self, x, t, y):
        x, c = self.embed(x, t, y)
        outputs = []
        for i, block in enumerate(self.blocks):
            n = i - (self.depth + 1) // 2
            if n >= 0:
                merged = self.skip_norms[n](torch.cat([x, outputs[self.depth - 1 - i]], dim=-1))
                x = self.skip_linears[n].linear(merged)
            x = block(x, c)
            outputs.append(x)
        return self.unpatchify(self.final_layer(x, c))


class Latte(Model):
    """x [B, F, c, H, W], t [B], y [B] or None; its blocks alternate space and time."""

    def __init__(self, *, num_frames: int, **config: int | None) -> None:
        super().__init__(**config)
        positions = axis_positions(config["hidden_size"], torch.arange(num_frames)).float()[None]
        self.temp_embed = nn.Parameter(positions, requires_grad=False)

    def forward(self, x, t, y=None):
        batch, frames = x.shape[:2]
        labels = None if y is None else y.repeat_interleave(frames)
        x, c = self.embed(x.flatten(0, 1), t.repeat_interleave(frames), labels)
        tokens = x.shape[1]
        of_place = c.unflatten(0, (batch, frames))[:, 0].repeat_interleave(tokens, dim=0)
        for i in range(0, len(self.blocks), 2):
            spatial, temporal = self.blocks[i : i + 2]
            x = spatial(x, c)
            x = x.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
            if i == 0:
                x = x + self.temp_embed
            x = temporal(x, of_place)
            x = x.unflatten(0, (batch, tokens)).transpose(1, 2).flatten(0, 1)
        return self.unpatchify(self.final_layer(x, c)).unflatten(0, (batch, frames))


def skip_latte(**config: int | None) -> Latte:
    """Latte with the tensors of skip branches; only its weights are of use."""
    model = Latte(**config)
    add_research_branches(model, config["hidden_size"], config["depth"] // 2)
    return model
