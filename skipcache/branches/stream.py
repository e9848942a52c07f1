"""Checkpoint files, read tensor by tensor: ``.pt`` (tensors only, nothing in it is run) and
safetensors.

Files are mapped into memory. Pages once read count as memory in use until they are unmapped, so the
mapping is renewed now and then: what is in use at a time is one window of the file, however large
the file is.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from skipcache.errors import BranchFileError

WINDOW_BYTES = 64 * 2**20
WRAPPERS = ("ema", "model")  # the averaged weights before the raw ones
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_ZIP, _LEGACY_PICKLE, _SAFETENSORS = "zip", "legacy pickle", "safetensors"


class CheckpointFile:
    """A state dict in a file: whole, or wrapped in ``{"ema": ...}`` or ``{"model": ...}``.

    Attributes:
        path: of the file.
        shapes: of its tensors by name, without the ``module.`` of data-parallel training.
        dtype: that of the tensors; where they differ, the one that holds all of them.
        total_bytes: of the tensors.

    Raises:
        BranchFileError: no file, truncated, corrupt, a pickle of more than tensors, or tensors that
            are not floating-point numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kind = _kind_of(path)
        self._tensors = self._open()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        for name, tensor in self._tensors.items():
            self._check(name, tensor)
        kinds = {tensor.dtype for tensor in self._tensors.values()}
        self.dtype = kinds.pop()
        for kind in kinds:
            self.dtype = torch.promote_types(self.dtype, kind)
        self.total_bytes = sum(tensor.nbytes for tensor in self._tensors.values())

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and values of each tensor, in the order of the file; copy what is to stay."""
        window = 0
        for name in self.shapes:
            if window > WINDOW_BYTES and self._kind != _LEGACY_PICKLE:
                self._tensors = {}
                self._tensors = self._open()
                window = 0
            tensor = self._tensors[name]
            window += tensor.nbytes
            yield name, tensor

    def _open(self) -> dict[str, torch.Tensor]:
        stored: object
        try:
            if self._kind == _SAFETENSORS:
                stored = load_file(self.path)
            else:
                stored = _load_pickle(self.path, is_mapped=self._kind == _ZIP)
        except Exception as error:  # a damaged pickle can raise anything
            raise BranchFileError(_explain(self.path, error)) from error
        return _state_dict(self.path, stored)

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise BranchFileError(
                f"{self.path}: {name!r} is {tensor.dtype} ({tensor.layout}, {tensor.device}). "
                f"Weights are dense tensors of {', '.join(map(str, DTYPES))}."
            )
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise BranchFileError(
                f"{self.path}: {name!r} of shape {tuple(tensor.shape)} is larger than what the "
                "file stores of it."
            )


def _kind_of(path: Path) -> str:
    """By the first bytes, never by the name."""
    try:
        with path.open("rb") as stored:
            head = stored.read(9)
    except OSError as error:
        raise BranchFileError(f"{path} cannot be read: {error}") from error
    if head.startswith(b"PK\x03\x04"):
        return _ZIP
    if head[8:] == b"{":
        return _SAFETENSORS
    if head.startswith(b"\x80"):
        return _LEGACY_PICKLE
    raise BranchFileError(
        f"{path} is neither a safetensors file nor one of torch.save: it begins with {head!r}. It "
        "is truncated, damaged or of another kind; get it anew."
    )


def _load_pickle(path: Path, *, is_mapped: bool) -> object:
    # Training scripts put their command line beside the weights: a plain record, without code.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_mapped)


def _explain(path: Path, error: Exception) -> str:
    """What went wrong, without torch's advice to load the file unsafely."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code is not None:
        return (
            f"{path} holds {code[1]!r} beside tensors. Loading that could run code, so it was not "
            "loaded. Save its state dict alone, with torch.save or as safetensors."
        )
    reason = (str(error).splitlines() or [""])[0]
    return (
        f"{path} cannot be read ({type(error).__name__}: {reason}). It is truncated or damaged; "
        "get it anew."
    )


def _state_dict(path: Path, stored: object) -> dict[str, torch.Tensor]:
    found: Any = stored
    if isinstance(stored, Mapping):
        found = next((stored[name] for name in WRAPPERS if name in stored), stored)
    if (
        not isinstance(found, Mapping)
        or not found
        or not all(isinstance(name, str) for name in found)
        or not all(isinstance(tensor, torch.Tensor) for tensor in found.values())
    ):
        raise BranchFileError(
            f"{path} holds no state dict (names and tensors), neither bare nor under "
            f"{' or '.join(map(repr, WRAPPERS))}."
        )
    is_parallel = all(name.startswith("module.") for name in found)
    return {
        name.removeprefix("module.") if is_parallel else name: tensor.detach()
        for name, tensor in found.items()
    }
