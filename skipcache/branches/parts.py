"""Where each tensor of a converted model comes from: names in released checkpoints, and those of
diffusers and ``SkipBranches``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from skipcache.errors import BranchFileError

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

CLASSES = "y_embedder.embedding_table.weight"
LISTED = 12  # names in an error


@dataclass(frozen=True)
class Part:
    """One tensor of the converted model: the ``index``-th of ``count`` equal parts, along the first
    dimension, of tensor ``source`` of the file.
    """

    source: str
    index: int = 0
    count: int = 1


def renamed(source: str, target: str) -> dict[str, Part]:
    """Weight and bias of one module under another name."""
    return {f"{target}.{leaf}": Part(f"{source}.{leaf}") for leaf in ("weight", "bias")}


RESEARCH_HEAD = {
    **renamed("x_embedder.proj", "pos_embed.proj"),
    **renamed("final_layer.adaLN_modulation.1", "proj_out_1"),
    **renamed("final_layer.linear", "proj_out_2"),
}
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_LATTE_HEAD = (
    "pos_embed.proj",
    "proj_out",
    "adaln_single.emb.timestep_embedder.linear_1",
    "adaln_single.emb.timestep_embedder.linear_2",
    "adaln_single.linear",
    "caption_projection.linear_1",
    "caption_projection.linear_2",
)


def research_block(source: str, target: str) -> dict[str, Part]:
    """One block of DiT or class-to-video Latte, without its embedders."""
    parts = {
        **renamed(f"{source}.attn.proj", f"{target}.attn1.to_out.0"),
        **renamed(f"{source}.mlp.fc1", f"{target}.ff.net.0.proj"),
        **renamed(f"{source}.mlp.fc2", f"{target}.ff.net.2"),
        **renamed(f"{source}.adaLN_modulation.1", f"{target}.norm1.linear"),
    }
    for index, name in enumerate(("to_q", "to_k", "to_v")):
        for leaf in ("weight", "bias"):
            parts[f"{target}.attn1.{name}.{leaf}"] = Part(f"{source}.attn.qkv.{leaf}", index, 3)
    return parts


def latte_parts(depth: int) -> dict[str, Part]:
    """Text-to-video Latte, in which nothing is renamed."""
    tables, linears = ["scale_shift_table"], [*_LATTE_HEAD]
    for i in range(depth):
        for block, attentions in (
            (f"transformer_blocks.{i}", ("attn1", "attn2")),
            (f"temporal_transformer_blocks.{i}", ("attn1",)),
        ):
            tables.append(f"{block}.scale_shift_table")
            linears += [f"{block}.{a}.{name}" for a in attentions for name in _ATTENTION]
            linears += [f"{block}.ff.net.0.proj", f"{block}.ff.net.2"]
    parts = {name: Part(name) for name in tables}
    for name in linears:
        parts |= renamed(name, name)
    return parts


def branch_parts_of(shapes: Shapes, layers: int) -> dict[str, Part]:
    """The skip branches of a model of so many layers; empty for a file without any."""
    if not any(name.startswith(("skip_norms.", "skip_linears.")) for name in shapes):
        return {}
    parts: dict[str, Part] = {}
    for n in range(layers // 2):
        target = f"layers.{(layers + 1) // 2 + n}"
        parts |= renamed(f"skip_norms.{n}", f"{target}.skip_norm")
        parts |= renamed(f"skip_linears.{n}.linear", f"{target}.skip_linear")
    return parts


def count_blocks(shapes: Shapes, prefix: str) -> int:
    """How many blocks there are; where one is left out, its names will be missing.

    Raises:
        BranchFileError: none.
    """
    found = {n.split(".")[1] for n in shapes if re.match(rf"{prefix}\.\d+\.", n)}
    if not found:
        raise BranchFileError(
            f"no tensor is named {prefix}.0 or the like; the model has no blocks."
        )
    return len(found)


def check_names(
    shapes: Shapes,
    parts: Iterable[Mapping[str, Part]],
    needed: Iterable[str] = (),
    optional: Iterable[str] = (),
) -> None:
    """Refuses a file that lacks tensors or has others besides.

    Raises:
        BranchFileError: both listed.
    """
    expected = {part.source for group in parts for part in group.values()} | set(needed)
    missing, extra = expected - shapes.keys(), shapes.keys() - expected - set(optional)
    if missing or extra:
        raise BranchFileError(
            "its tensors do not fit together, given how many blocks and branches it has. Missing: "
            f"{listed(missing)}. Too many: {listed(extra)}."
        )


def listed(names: Iterable[str]) -> str:
    """The first names in order, and how many more there are."""
    named = sorted(names)
    rest = f" and {len(named) - LISTED} more" if len(named) > LISTED else ""
    return (", ".join(named[:LISTED]) or "none") + rest
