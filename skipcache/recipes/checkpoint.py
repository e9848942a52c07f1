"""Keeps what a calibration has measured so far, so that one that was stopped goes on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from skipcache.errors import RecipeFileError
from skipcache.recipes.statistics import Array

FORMAT = 2  # of what is measured


class Checkpoint:
    """A file of measurements by name; without a path, nothing is kept.

    Raises:
        RecipeFileError: the file is broken, or of another calibration.
    """

    def __init__(self, path: str | Path | None, described: str) -> None:
        self.path = Path(path) if path is not None else None
        self.key = hashlib.sha256(described.encode()).hexdigest()
        self.found: dict[str, Array] = {}
        if self.path is not None and self.path.exists():
            self.found = self._read(self.path)

    def measured(self, name: str, measure: Callable[[], Mapping[str, Array]]) -> dict[str, Array]:
        """What was measured under that name, now or before.

        Raises:
            RecipeFileError: the file cannot be written.
        """
        prefix = f"{name}/"
        if not any(key.startswith(prefix) for key in self.found):
            self.found |= {prefix + key: value for key, value in measure().items()}
            self._write()
        return {
            key.removeprefix(prefix): value
            for key, value in self.found.items()
            if key.startswith(prefix)
        }

    def _read(self, path: Path) -> dict[str, Array]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as stored:
                key = (stored.metadata() or {}).get("key")
                names = stored.keys()
                found = {name: stored.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise RecipeFileError(f"{path} cannot be read: {error}. Delete it.") from error
        if key != self.key:
            raise RecipeFileError(
                f"{path} was left by another calibration (other weights, calls, seed or "
                "version). Delete it, or name another file."
            )
        return found

    def _write(self) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        if self.path is None:
            return
        part = self.path.with_name(f"{self.path.name}.part")
        arrays = {name: np.ascontiguousarray(value) for name, value in self.found.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(arrays, part, metadata={"key": self.key})
            os.replace(part, self.path)
        except (OSError, SafetensorError) as error:
            raise RecipeFileError(f"{self.path} cannot be written: {error}") from error


def described(base: object, calls: Sequence[Mapping[str, object]], seed: int) -> str:
    """A calibration in words that are the same in another process."""
    return repr((FORMAT, base, [_in_words(dict(call)) for call in calls], seed))


def _in_words(value: object) -> object:
    """Tensors, generators, arrays and pictures by their content, other objects by their class."""
    if isinstance(value, torch.Generator):
        value = value.get_state()
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        return tuple(value.shape), hashlib.sha256(content).hexdigest()
    if hasattr(value, "__array_interface__"):  # numpy's and Pillow's
        array = np.asarray(value)
        return array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).hexdigest()
    if isinstance(value, dict):
        return {str(name): _in_words(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_in_words(part) for part in value]
    simple = (str, int, float, bool, type(None))
    return value if isinstance(value, simple) else type(value).__name__
