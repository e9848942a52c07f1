"""Builds a diffusers transformer around the tensors of a file, without ever initialising it."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skipcache.branches.layouts import Layout, Told, read_layout
from skipcache.branches.module import SkipBranches
from skipcache.branches.parts import Part, check_names
from skipcache.branches.stream import CheckpointFile
from skipcache.errors import BranchFileError

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
CONFIG_NAME = "config.json"
MODELS = {
    "DiTTransformer2DModel": "diffusers",
    "LatteTransformer3DModel": "diffusers",
    "LatteClassTransformer3DModel": "skipcache.latte_class.transformer",
}
# In the configuration of a converted DiT. The research code's frequencies are 10000^(-i/128), those
# of diffusers' class 10000^(-i/127), and no setting of it says so.
FREQ_SHIFT = "_timestep_freq_shift"


def build_from_checkpoint(
    path: Path, told: Told, *, dtype: torch.dtype | None, progress: bool
) -> tuple[nn.Module, SkipBranches | None]:
    """The model of a released checkpoint and its branches, if it has any; on the CPU, in eval mode.

    Raises:
        BranchFileError: a file that cannot be read or whose tensors do not make a model.
        ConfigError: what was told contradicts the tensors.
    """
    file = CheckpointFile(path)
    try:
        layout = read_layout(file.shapes, told)
    except BranchFileError as error:
        raise BranchFileError(f"{path}: {error}") from None
    config = dict(layout.config)
    if layout.has_research_timesteps:
        config[FREQ_SHIFT] = 0
    model = _empty(path, layout.model, config)
    branches = None
    if layout.branch_parts:
        with torch.device("meta"):
            branches = SkipBranches(layout.width, layout.layers, form="replace")
    _fill(model, branches, layout, file, dtype, progress)
    return model, branches


def build_from_folder(folder: Path, *, dtype: torch.dtype | None, progress: bool) -> nn.Module:
    """The model of a diffusers folder.

    Raises:
        BranchFileError: a file is missing, cannot be read, or is of a model that is not known here.
    """
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BranchFileError(f"{path} cannot be read: {error}") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in MODELS:
        raise BranchFileError(
            f"{path} is of {name!r}, and known here are {', '.join(MODELS)}. Load the model with "
            "diffusers, and its branches with add_skip_branches."
        )
    model = _empty(path, name, config)
    file = CheckpointFile(folder / WEIGHTS_NAME)
    parts = {name: Part(name) for name in model.state_dict()}
    try:
        check_names(file.shapes, [parts])
    except BranchFileError as error:
        raise BranchFileError(f"{file.path}: {error}") from None
    _fill(model, None, Layout(name, config, 0, 0, parts), file, dtype, progress)
    return model


def _empty(path: Path, name: str, config: dict[str, Any]) -> nn.Module:
    """The model without its weights: on the meta device, but for buffers that no file holds."""
    import importlib

    from diffusers.models.embeddings import Timesteps

    kind = getattr(importlib.import_module(MODELS[name]), name)
    try:
        with torch.device("meta"):
            model = kind.from_config(config)
        layerless = kind.from_config({**config, "num_layers": 0})
    except Exception as error:  # diffusers checks little, so anything can come out of it
        raise BranchFileError(
            f"{path}: no {name} can be built as {config}: {type(error).__name__}: {error}"
        ) from error
    stored = model.state_dict().keys()
    for name, buffer in layerless.named_buffers():
        if name not in stored:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer
    if model.config.get(FREQ_SHIFT) == 0:
        for module in model.modules():
            if isinstance(module, Timesteps):
                module.downscale_freq_shift = 0
    evaluated: nn.Module = model.eval()
    return evaluated


def _fill(
    model: nn.Module,
    branches: SkipBranches | None,
    layout: Layout,
    file: CheckpointFile,
    dtype: torch.dtype | None,
    progress: bool,
) -> None:
    """Reads the file once, in its own order, and gives every tensor a copy of what is its."""
    from tqdm import tqdm

    dtype = dtype or file.dtype
    whole = nn.ModuleDict({"model": model})
    if branches is not None:
        whole["branches"] = branches
    expected = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    targets: dict[str, list[tuple[str, Part]]] = defaultdict(list)
    for prefix, parts in (("model", layout.parts), ("branches", layout.branch_parts)):
        for name, part in parts.items():
            targets[part.source].append((f"{prefix}.{name}", part))
    for source, wanted in targets.items():
        name, part = wanted[0]
        first, *rest = expected[name] or (1,)
        _check_shape(file, source, (part.count * first, *rest) if expected[name] else ())

    state = {}
    title = f"reading {file.path.name}"
    with tqdm(
        total=file.total_bytes, desc=title, unit="B", unit_scale=True, disable=not progress
    ) as bar:
        for source, stored in file.tensors():
            if source in layout.positions:
                _check_positions(file, source, stored, model.get_buffer(layout.positions[source]))
            values = stored.to(dtype)
            if source in targets and not bool(torch.isfinite(values).all()):
                raise BranchFileError(
                    f"{file.path}: {source!r} has values that are not finite in {dtype}. The file "
                    "is damaged, or the dtype too small for it."
                )
            for name, part in targets[source]:
                state[name] = values.chunk(part.count)[part.index].clone(
                    memory_format=torch.contiguous_format
                )
            bar.update(stored.nbytes)
    whole.load_state_dict(state, assign=True)


def _check_shape(file: CheckpointFile, source: str, expected: tuple[int, ...]) -> None:
    if file.shapes[source] != expected:
        raise BranchFileError(
            f"{file.path}: {source!r} has shape {file.shapes[source]}, and the rest of the file "
            f"makes it {expected}. Its tensors are of different models."
        )


def _check_positions(
    file: CheckpointFile, source: str, stored: torch.Tensor, own: torch.Tensor
) -> None:
    _check_shape(file, source, tuple(own.shape))
    tolerance = max(1e-5, 2 * torch.finfo(stored.dtype).eps)
    distance = float((stored.double() - own.double()).abs().max())
    if not distance <= tolerance:
        raise BranchFileError(
            f"{file.path}: {source!r} differs by {distance:.2g} from the sines and cosines that "
            "diffusers' class computes. A model with other position embeddings cannot be converted."
        )
