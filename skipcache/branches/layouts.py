"""The layouts of released checkpoints: which family a file is of, by its tensors, and where each of
them goes in the diffusers model.

DiT and class-to-video Latte carry the names of the research code (arXiv:2212.09748,
arXiv:2401.03048), text-to-video Latte those of diffusers. Skip branch N of all of them
(arXiv:2411.17616) enters before layer ceil(L / 2) + N.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from skipcache.branches.parts import (
    CLASSES,
    RESEARCH_HEAD,
    Part,
    Shapes,
    branch_parts_of,
    check_names,
    count_blocks,
    latte_parts,
    listed,
    renamed,
    research_block,
)
from skipcache.errors import BranchFileError, ConfigError

HEADS = 16  # of every released model
_HUNYUAN_DIT = r"blocks\.\d+\.skip_(linear|norm)\.|text_embedding_padding$"


@dataclass(frozen=True)
class Told:
    """What tensors cannot tell, as far as it was given.

    Attributes:
        num_attention_heads: None: 16.
        sample_size: height and width of the latents; None: that of the file, or of Latte-1.
        video_length: number of frames; None: that of the file, or of Latte-1.
    """

    num_attention_heads: int | None = None
    sample_size: int | None = None
    video_length: int | None = None


@dataclass(frozen=True)
class Layout:
    """How a file becomes a model.

    Attributes:
        model: name of the model's class.
        config: what to build it by.
        width: of the stream, C.
        layers: the model's depth L as the branches count it.
        parts: of the model, by its tensor names.
        branch_parts: of ``SkipBranches``, by its tensor names; empty for a model without.
        positions: position embeddings of the file that must equal the model's own: the file's name
            to the model's.
        ignored: names that the file may have besides.
        has_research_timesteps: the timestep frequencies are those of the research code.
    """

    model: str
    config: dict[str, Any]
    width: int
    layers: int
    parts: dict[str, Part]
    branch_parts: dict[str, Part] = field(default_factory=dict)
    positions: dict[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    has_research_timesteps: bool = False


def read_layout(shapes: Shapes, told: Told) -> Layout:
    """The layout of a file, by the names and shapes of its tensors.

    Raises:
        BranchFileError: a family that is not known or needs no conversion, tensors that are missing
            or too many, or sizes that contradict each other.
        ConfigError: what was told contradicts the tensors.
    """
    if any(re.match(_HUNYUAN_DIT, name) for name in shapes):
        raise BranchFileError(
            "these are weights of HunyuanDiT, which was born with skip branches and needs no "
            "conversion. Load the diffusers version, HunyuanDiTPipeline.from_pretrained("
            "'Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers'), and call apply_skip_cache on it."
        )
    prefixes = {name.split(".")[0] for name in shapes}
    read: Callable[[Shapes, Told], Layout]
    if {"temporal_transformer_blocks", "adaln_single"} <= prefixes:
        read = _latte
    elif {"blocks", "t_embedder", "x_embedder", "temp_embed"} <= prefixes:
        read = _latte_class
    elif {"blocks", "t_embedder", "x_embedder"} <= prefixes:
        read = _dit
    else:
        raise BranchFileError(
            "these tensors are of no family that is known here: DiT, text-to-video Latte, "
            f"class-to-video Latte. They are named {listed(shapes)}. A file with the names of "
            "diffusers is loaded by diffusers."
        )
    return read(shapes, told)


# Families


def _dit(shapes: Shapes, told: Told) -> Layout:
    depth = count_blocks(shapes, "blocks")
    parts = {**RESEARCH_HEAD}
    for i in range(depth):
        here = f"transformer_blocks.{i}"
        parts |= research_block(f"blocks.{i}", here)
        # The model has one embedder; diffusers gives each block a copy of it.
        parts |= renamed("t_embedder.mlp.0", f"{here}.norm1.emb.timestep_embedder.linear_1")
        parts |= renamed("t_embedder.mlp.2", f"{here}.norm1.emb.timestep_embedder.linear_2")
        table = f"{here}.norm1.emb.class_embedder.embedding_table.weight"
        parts[table] = Part(CLASSES)
    branches = branch_parts_of(shapes, depth)
    check_names(shapes, [parts, branches], needed={"pos_embed"})
    _refuse(told.video_length is not None, "video_length", "this is DiT, a model of pictures")
    width, config = _research_config(shapes, told)
    config |= {
        "num_layers": depth,
        "num_embeds_ada_norm": _shape(shapes, CLASSES, 2)[0] - 1,
        "norm_eps": 1e-6,
    }
    return Layout(
        "DiTTransformer2DModel",
        config,
        width,
        depth,
        parts,
        branches,
        positions={"pos_embed": "pos_embed.pos_embed"},
        has_research_timesteps=True,
    )


def _latte_class(shapes: Shapes, told: Told) -> Layout:
    blocks = count_blocks(shapes, "blocks")
    if blocks % 2:
        raise BranchFileError(
            f"this class-to-video Latte has {blocks} blocks. They alternate between space and "
            "time, so their number is even."
        )
    parts = {
        **RESEARCH_HEAD,
        **renamed("t_embedder.mlp.0", "timestep_embedder.linear_1"),
        **renamed("t_embedder.mlp.2", "timestep_embedder.linear_2"),
        "pos_embed.pos_embed": Part("pos_embed"),
        "temp_pos_embed": Part("temp_embed"),
    }
    for i in range(blocks):
        kind = "temporal_transformer_blocks" if i % 2 else "transformer_blocks"
        parts |= research_block(f"blocks.{i}", f"{kind}.{i // 2}")
    has_classes = any(name.startswith("y_embedder.") for name in shapes)
    if has_classes:
        parts["class_embedder.embedding_table.weight"] = Part(CLASSES)
    branches = branch_parts_of(shapes, blocks // 2)
    check_names(shapes, [parts, branches])
    width, config = _research_config(shapes, told)
    config |= {
        "num_layers": blocks // 2,
        "num_classes": _shape(shapes, CLASSES, 2)[0] - 1 if has_classes else None,
        "video_length": _agreed(
            "video_length", told.video_length, _shape(shapes, "temp_embed", 3)[1]
        ),
    }
    return Layout("LatteClassTransformer3DModel", config, width, blocks // 2, parts, branches)


def _latte(shapes: Shapes, told: Told) -> Layout:
    depth = count_blocks(shapes, "transformer_blocks")
    parts = latte_parts(depth)
    branches = branch_parts_of(shapes, depth)
    positions = {n: n for n in ("pos_embed.pos_embed", "temp_pos_embed") if n in shapes}
    # Stands for no caption, in training; pipelines encode the empty text.
    ignored = frozenset({"caption_projection.y_embedding"})
    check_names(shapes, [parts, branches], optional={*positions, *ignored})

    width, channels, patch, _ = _shape(shapes, "pos_embed.proj.weight", 4)
    size = frames = None
    if "pos_embed.pos_embed" in shapes:
        size = _side(_shape(shapes, "pos_embed.pos_embed", 3)[1]) * patch
    if "temp_pos_embed" in shapes:
        frames = _shape(shapes, "temp_pos_embed", 3)[1]
    config = {
        **_heads(width, told),
        "in_channels": channels,
        "out_channels": _shape(shapes, "proj_out.weight", 2)[0] // patch**2,
        "num_layers": depth,
        "cross_attention_dim": _shape(shapes, "transformer_blocks.0.attn2.to_k.weight", 2)[1],
        "attention_bias": True,
        "sample_size": _agreed("sample_size", told.sample_size, size, 64),
        "patch_size": patch,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": _shape(shapes, "caption_projection.linear_1.weight", 2)[1],
        "video_length": _agreed("video_length", told.video_length, frames, 16),
    }
    return Layout(
        "LatteTransformer3DModel", config, width, depth, parts, branches, positions, ignored
    )


# Their sizes


def _research_config(shapes: Shapes, told: Told) -> tuple[int, dict[str, Any]]:
    width, channels, patch, _ = _shape(shapes, "x_embedder.proj.weight", 4)
    size = _side(_shape(shapes, "pos_embed", 3)[1]) * patch
    config = {
        **_heads(width, told),
        "in_channels": channels,
        "out_channels": _shape(shapes, "final_layer.linear.weight", 2)[0] // patch**2,
        "sample_size": _agreed("sample_size", told.sample_size, size),
        "patch_size": patch,
    }
    return width, config


def _heads(width: int, told: Told) -> dict[str, int]:
    heads = HEADS if told.num_attention_heads is None else told.num_attention_heads
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or width % heads:
        raise ConfigError(
            f"num_attention_heads is {heads!r}, and the model is {width} wide. It is a divisor of "
            f"the width; released models have {HEADS}."
        )
    return {"num_attention_heads": heads, "attention_head_dim": width // heads}


def _agreed(name: str, told: int | None, stored: int | None, default: int = 0) -> int:
    """What was told, what is stored, or the default; the first two must agree."""
    if told is not None and (not isinstance(told, int) or isinstance(told, bool) or told < 1):
        raise ConfigError(f"{name} is {told!r}. It is a whole number, at least 1.")
    _refuse(None not in (told, stored) and told != stored, name, f"the tensors are of {stored}")
    return told or stored or default


def _refuse(is_wrong: bool, name: str, reason: str) -> None:
    if is_wrong:
        raise ConfigError(f"{name} was given, and {reason}. Leave it out.")


def _shape(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    shape = shapes[name]
    if len(shape) != rank or not all(shape):
        raise BranchFileError(
            f"{name!r} has shape {shape}. It has {rank} dimensions, none of them empty."
        )
    return shape


def _side(patches: int) -> int:
    side = math.isqrt(patches)
    if side**2 != patches:
        raise BranchFileError(f"'pos_embed' is for {patches} patches, and pictures are square.")
    return side
