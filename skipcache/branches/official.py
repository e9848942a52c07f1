"""The released Skip-DiT checkpoints (arXiv:2411.17616), and those of DiT, as diffusers models."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from skipcache.branches.retrofit import add_skip_branches
from skipcache.errors import BranchFileError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from skipcache.backbone import Backbone
    from skipcache.branches.module import SkipBranches

DTYPES = ("float64", "float32", "float16", "bfloat16")


def load_skip_dit(
    path: str | Path,
    *,
    num_attention_heads: int | None = None,
    sample_size: int | None = None,
    video_length: int | None = None,
    dtype: torch.dtype | str | None = None,
    adapter: str | Backbone | object | None = None,
    progress: bool = False,
) -> nn.Module:
    """Loads a released checkpoint as a diffusers transformer with its skip branches attached.

    Reads ``DiT-XL-2-skip.pt``, ``Latte-skip.pt``, ``ucf101-skip.pt`` and the like, and plain DiT
    checkpoints, which have no branches. The family is found by the tensors, never by the name of
    the file, and so are all sizes but those below. Nothing in the file is run.

    Args:
        path: a ``.pt`` or safetensors file, or a folder that ``convert_skip_dit`` wrote.
        num_attention_heads: default: 16, as in every released model. No tensor tells it.
        sample_size: height and width of the latents, where no tensor tells it (text-to-video
            Latte); default 64.
        video_length: number of frames, where no tensor tells it; default 16.
        dtype: of the weights; default: that of the file.
        adapter: as in ``apply_skip_cache``.
        progress: shows a progress bar.

    Returns:
        A ``DiTTransformer2DModel``, ``LatteTransformer3DModel`` or
        ``LatteClassTransformer3DModel``, in eval mode, on the CPU.

    Raises:
        BranchFileError: a file that is truncated, damaged, not made of tensors alone, of an unknown
            family, or whose tensors contradict each other.
        ConfigError: a value that cannot be, or that the tensors contradict.
        AdapterError: no adapter claims the model.
    """
    from skipcache.branches.build import build_from_checkpoint, build_from_folder
    from skipcache.branches.files import BranchRecord, base_model_of, holds_branches
    from skipcache.branches.layouts import Told
    from skipcache.branches.module import SkipBranches

    source, kind = Path(path), _dtype(dtype)
    told = Told(num_attention_heads, sample_size, video_length)
    if source.is_dir():
        if told != Told():
            raise ConfigError(
                f"{source} is a folder, and its config.json says what {told} would. Leave it out."
            )
        branches = None
        if holds_branches(source):
            branches = _cast(SkipBranches.from_pretrained(source), kind)
        model = build_from_folder(source, dtype=kind, progress=progress)
    else:
        model, branches = build_from_checkpoint(source, told, dtype=kind, progress=progress)
    if branches is None:
        return model
    add_skip_branches(model, branches, adapter=adapter)
    if branches.record is None:
        branches.record = BranchRecord(
            "branches", {}, base_model_of(model), f"trained by others; converted from {source.name}"
        )
    return model


def convert_skip_dit(
    path: str | Path,
    out: str | Path,
    *,
    num_attention_heads: int | None = None,
    sample_size: int | None = None,
    video_length: int | None = None,
    dtype: torch.dtype | str | None = None,
    adapter: str | Backbone | object | None = None,
    progress: bool = False,
) -> Path:
    """Writes a released checkpoint as a folder of diffusers, with the files of its branches beside.

    The folder holds ``config.json`` and ``diffusion_pytorch_model.safetensors``, and for a model
    with branches ``skip_branches.safetensors``, ``skip_branches.json`` and a card. It is there
    whole, or not at all.

    Args:
        path: as in ``load_skip_dit``.
        out: the folder; it must not exist, or be empty.
        num_attention_heads: as in ``load_skip_dit``.
        sample_size: as in ``load_skip_dit``.
        video_length: as in ``load_skip_dit``.
        dtype: as in ``load_skip_dit``.
        adapter: as in ``load_skip_dit``.
        progress: as in ``load_skip_dit``.

    Returns:
        The folder.

    Raises:
        BranchFileError: as ``load_skip_dit``, and for a folder that cannot be written.
        ConfigError: as ``load_skip_dit``, and for a folder that is there already.
        AdapterError: as ``load_skip_dit``.
    """
    target = Path(out)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} is there already. Name a folder that does not exist.")
    model = load_skip_dit(
        path,
        num_attention_heads=num_attention_heads,
        sample_size=sample_size,
        video_length=video_length,
        dtype=dtype,
        adapter=adapter,
        progress=progress,
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as parent:
            _write(model, Path(parent) / target.name)
            if target.exists():
                target.rmdir()
            os.rename(Path(parent) / target.name, target)
    except OSError as error:
        raise BranchFileError(f"{target} cannot be written: {error}") from error
    return target


def _cast(branches: SkipBranches, dtype: torch.dtype | None) -> SkipBranches:
    if dtype is None:
        return branches
    for name, parameter in branches.to(dtype).named_parameters():
        if not bool(parameter.isfinite().all()):
            raise BranchFileError(
                f"{name!r} of the skip branches is not finite in {dtype}. Choose a wider dtype."
            )
    return branches


def _write(model: nn.Module, folder: Path) -> None:
    from safetensors import SafetensorError

    from skipcache.branches.module import attached_branches

    try:
        model.save_pretrained(folder, max_shard_size="1000GB")  # type: ignore[operator]
    except SafetensorError as error:
        raise OSError(error) from error
    branches = attached_branches(model)
    if branches is not None:
        branches.save_pretrained(folder)


def _dtype(asked: torch.dtype | str | None) -> torch.dtype | None:
    import torch

    if asked is None:
        return None
    name = str(asked).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype is {asked!r}. Allowed: {', '.join(DTYPES)}.")
    found: torch.dtype = getattr(torch, name)
    return found
