"""Tells whether weights were made for this very model: a few of its weights, and the names and
shapes of all.

Robust against a change of dtype: rounding to half precision moves a sample by a thousandth, another
model by its whole size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from skipcache.branches.module import ATTRIBUTE

SAMPLES = 64
TOLERANCE = 0.02  # mean relative difference of the samples; bf16 rounding makes 0.002
NEGLIGIBLE = 1e-5  # weights below it are rounded away in fp16


@dataclass(frozen=True)
class Fingerprint:
    """Of one model's weights.

    Attributes:
        structure: SHA-256 of names and shapes, LoRA and skip branches left out.
        samples: weights at fixed places, one or more a tensor; empty where they cannot be read
            (quantised, in fp8, on the meta device, shared out among ranks).
    """

    structure: str
    samples: tuple[float, ...]

    def difference(self, other: Fingerprint) -> str | None:
        """What tells the two apart, in words; None when nothing does."""
        if self.structure != other.structure:
            return "its parameters have other names or shapes"
        if not self.samples or not other.samples:
            return None
        # Each sample by its own size: norms, which are near 1 in every model, would hide the rest.
        relative = [
            abs(a - b) / max(abs(a), abs(b))
            for a, b in zip(self.samples, other.samples, strict=False)
            if max(abs(a), abs(b)) > NEGLIGIBLE
        ]
        mean = sum(relative) / len(relative) if relative else 0.0
        if not mean <= TOLERANCE:
            return f"its weights differ by {mean:.0%} where they were sampled"
        return None


def fingerprint_of(model: nn.Module) -> Fingerprint:
    """The fingerprint of a transformer's own weights, without its skip branches and LoRA layers."""
    named = sorted(_own_parameters(model))
    digest = hashlib.sha256()
    for name, parameter in named:
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
    readable = [p for _, p in named if _is_readable(p)]
    if not readable or len(readable) < len(named):
        return Fingerprint(digest.hexdigest(), ())
    picked = [readable[i * len(readable) // SAMPLES] for i in range(SAMPLES)]
    with torch.no_grad():
        values = [p.reshape(-1)[(i * 7919) % p.numel()].float().cpu() for i, p in enumerate(picked)]
    samples = tuple(float(value) for value in torch.stack(values).tolist())
    return Fingerprint(digest.hexdigest(), samples if all(map(math.isfinite, samples)) else ())


def _is_readable(p: nn.Parameter) -> bool:
    is_here = not p.is_meta and not hasattr(p, "device_mesh")  # as a DTensor's shards have
    return is_here and p.is_floating_point() and p.element_size() > 1 and p.numel() > 0


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{ATTRIBUTE}.") and "lora_" not in name:
            yield name.replace(".base_layer.", ".").replace("_orig_mod.", ""), parameter
