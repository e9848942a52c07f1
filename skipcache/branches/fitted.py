"""Fitted branches: the deep feature as a linear function of what is known, and their files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skipcache.branches.files import (
    RECORD_FILE,
    WEIGHTS_FILE,
    BranchRecord,
    base_model_of,
    check_base_model,
    check_keys,
    find_folder,
    folder_of,
    is_made_for,
    push_folder,
    read_record,
    read_tensors,
    write_folder,
)
from skipcache.errors import BranchError, BranchFileError, ConfigError
from skipcache.estimators import Refresh, Residual, Tensors, extrapolation_weights

HISTORY = 2
FARTHEST = 1.5  # a distance is served by one that is at most so many times nearer or farther
OTHER_TIME = 0.04  # a time is served by a bucket that is at most so far away
AWAY = 5.0  # times how far away it is, beside the logarithm of a distance


@dataclass(frozen=True)
class Cell:
    """Where one matrix applies, and what it was worth on held-out trajectories.

    Attributes:
        distance: normalised time since the last refresh.
        spacing: that between the last two refreshes; 0 where there was one only.
        bucket: index of the time bucket, 0 = noise.
        samples: tokens it was fitted on.
        error_before: squared error of ``residual``, relative to that of ``hold``.
        error_after: that of the fit, likewise.
    """

    distance: float
    spacing: float
    bucket: int
    samples: int
    error_before: float
    error_after: float

    @property
    def refreshes(self) -> int:
        """Number of refreshes looked at."""
        return 2 if self.spacing > 0 else 1

    @property
    def r2_before(self) -> float:
        """Share of the change since the refresh that ``residual`` explains."""
        return 1.0 - self.error_before

    @property
    def r2_after(self) -> float:
        """Share of the change since the refresh that the fit explains."""
        return 1.0 - self.error_after


@dataclass(frozen=True)
class FittedBranches:
    """A skip branch in closed form past the layers that a reuse step leaves out: an ``Estimator``.

    With f the shallow and d the deep feature, e = d - f, r the last refresh and r' the one before,
    the estimate at step t is ``f_t + e_r + W [f_t - f_r ; e_r ; s (e_r - e_r') ; 1]`` with
    s = (t - r) / (r - r'), and one W per distance to the refresh, spacing of the two refreshes and
    bucket of time. Where none is near enough it is ``residual``. Only the first of several flowing
    tensors is corrected.

    Attributes:
        dim: width C of the first flowing tensor, which is [..., C].
        front_layers: of the cache that it was fitted for.
        back_layers: likewise.
        cells: where each matrix applies.
        matrices: one a cell: (W [G, D, C/G],), or (down [G, D, r], up [G, r, C/G]); G channel
            groups, D = (1 + refreshes) C / G + 1.
        time_buckets: number of buckets that normalised time is divided into.
        record: what its file says of base model, making and quality.
    """

    dim: int
    front_layers: int
    back_layers: int
    cells: tuple[Cell, ...]
    matrices: tuple[tuple[torch.Tensor, ...], ...] = field(repr=False)
    time_buckets: int = 1
    record: BranchRecord | None = field(default=None, repr=False)
    _moved: dict[Any, torch.Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    history = HISTORY
    needs_shallow = True

    # As an estimator.

    def prepare(self, refreshes: Sequence[Refresh], step: int, time: float) -> tuple[Tensors, ...]:
        deep, shallow = Residual().prepare(refreshes, step, time)
        spacing = refreshes[0].time - refreshes[-1].time
        cell = self.cell_at(refreshes[-1].time - time, spacing, time)
        first = deep[0]
        if cell is None or first is None or first.shape[-1] != self.dim:
            return deep, shallow, (None,)
        weight, *up = (self._on(cell, part, first) for part in range(len(self.matrices[cell])))
        groups, width = len(weight), self.dim // len(weight)
        total = weight[:, -1].unsqueeze(-2)  # [G, 1, .]: the constant
        for place, part in enumerate(known_inputs(refreshes, step), start=1):
            rows = weight[:, place * width : (place + 1) * width]
            total = total + grouped(part, groups) @ rows
        for matrix in up:
            total = total @ matrix
        known = first.float() + total.transpose(0, 1).reshape(first.shape)
        parts = (weight[:, :width].to(first.dtype), *(part.to(first.dtype) for part in up))
        return (known.to(first.dtype), *deep[1:]), shallow, parts

    def estimate(self, prepared: tuple[Tensors, ...], shallow: Tensors | None) -> Tensors:
        deep, then, parts = prepared
        base = Residual().estimate((deep, then), shallow)
        if parts[0] is None:
            return base
        assert shallow is not None
        first, now, before = base[0], shallow[0], then[0]
        assert first is not None
        assert now is not None
        assert before is not None
        moved = grouped(now - before, len(parts[0]))
        for matrix in parts:
            assert matrix is not None
            moved = moved @ matrix
        return first + moved.transpose(0, 1).reshape(first.shape), *base[1:]

    def cell_at(self, distance: float, spacing: float, time: float) -> int | None:
        """Index of the cell that serves this distance, spacing of refreshes and time, if any: the
        nearest in all three.
        """
        if not (distance > 0 and spacing >= 0 and math.isfinite(time)):
            return None
        bucket = bucket_of(time, self.time_buckets)
        near = []
        for index, cell in enumerate(self.cells):
            away = abs(cell.bucket - bucket) / self.time_buckets
            if away <= OTHER_TIME + 1e-9 and (cell.spacing > 0) == (spacing > 0):
                gap = abs(math.log(cell.distance / distance))
                other = abs(math.log(cell.spacing / spacing)) if spacing > 0 else 0.0
                if gap <= math.log(FARTHEST):
                    near.append((gap + other + AWAY * away, index))
        return min(near)[1] if near else None

    def _on(self, cell: int, part: int, like: torch.Tensor) -> torch.Tensor:
        key = (cell, part, like.device)
        if key not in self._moved:
            self._moved[key] = self.matrices[cell][part].to(like.device, torch.float32)
        return self._moved[key]

    # As something that belongs to a model.

    def check_for(self, transformer: nn.Module, front_layers: int, back_layers: int) -> None:
        """Refuses a model or a deep span that it was not fitted for, and warns of other weights.

        Raises:
            BranchError: another class of model.
            ConfigError: other front or back layers.
        """
        if (front_layers, back_layers) != (self.front_layers, self.back_layers):
            raise ConfigError(
                f"front_layers={front_layers} and back_layers={back_layers}, but these branches "
                f"were fitted with {self.front_layers} and {self.back_layers}. Use those, or fit "
                "anew."
            )
        if self.record is not None:
            check_base_model(self.record, transformer)

    def save_pretrained(self, folder: str | Path, *, quality: dict[str, Any] | None = None) -> Path:
        """Writes ``skip_branches.safetensors``, ``skip_branches.json`` and a model card.

        Args:
            folder: created if need be.
            quality: measured figures, by name.

        Returns:
            The folder.

        Raises:
            BranchFileError: the folder cannot be written.
        """
        settings = {
            "dim": self.dim,
            "front_layers": self.front_layers,
            "back_layers": self.back_layers,
            "time_buckets": self.time_buckets,
            "groups": len(self.matrices[0][0]) if self.matrices else 1,
            "ranks": [m[0].shape[2] if len(m) == 2 else None for m in self.matrices],
            "cells": [asdict(cell) for cell in self.cells],
        }
        earlier = self.record or BranchRecord("fitted", {})
        record = BranchRecord(
            "fitted",
            settings,
            earlier.base_model,
            earlier.made_by,
            dict(earlier.quality if quality is None else quality),
        )
        return write_folder(Path(folder), record, self._named())

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, local_files_only: bool = False
    ) -> FittedBranches:
        """Reads a fit from a folder, or from a repository on the Hugging Face hub.

        Args:
            source: folder, or hub id such as ``"user/my-fit"``.
            revision: of the repository.
            local_files_only: take the repository from the local hub cache only.

        Raises:
            BranchFileError: no such folder or repository, a truncated or corrupt file, missing or
                extra tensors, a newer format version, weights that are not finite.
        """
        folder = find_folder(source, revision=revision, local_files_only=local_files_only)
        record = read_record(folder, "fitted")
        path, settings = folder / RECORD_FILE, record.settings
        names = ("dim", "front_layers", "back_layers", "time_buckets", "groups", "ranks", "cells")
        check_keys(path, settings, required=names, optional=())
        try:
            cells = tuple(Cell(**cell) for cell in settings["cells"])
            shapes = _shapes(cells, settings["ranks"], settings["dim"], settings["groups"])
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise BranchFileError(f"{path} describes no fit: {error}") from error
        stored = read_tensors(folder / WEIGHTS_FILE, shapes)
        matrices = tuple(
            tuple(stored[name] for name in _names(index, rank is not None))
            for index, rank in enumerate(settings["ranks"])
        )
        sizes = (settings["dim"], settings["front_layers"], settings["back_layers"])
        return cls(*sizes, cells, matrices, settings["time_buckets"], record)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None) -> str:
        """Uploads what ``save_pretrained`` writes.

        Args:
            repo_id: hub id; the repository is created if need be.
            private: of a new repository.

        Returns:
            The address of the commit.
        """
        return push_folder(self.save_pretrained, repo_id, private)

    def _named(self) -> Mapping[str, torch.Tensor]:
        return {
            name: part
            for index, parts in enumerate(self.matrices)
            for name, part in zip(_names(index, len(parts) == 2), parts, strict=True)
        }


def known_inputs(refreshes: Sequence[Refresh], step: int) -> list[torch.Tensor]:
    """What the estimate at ``step`` looks at besides the shallow feature's change: e of the last
    refresh, and its change since the one before, scaled to the distance; fp32 [..., C] each.
    """
    residuals = []
    for refresh in refreshes[-HISTORY:]:
        assert refresh.shallow is not None
        shallow, deep = refresh.shallow[0], refresh.deep[0]
        assert shallow is not None
        assert deep is not None
        residuals.append(deep.float() - shallow.float())
    known = [residuals[-1]]
    if len(residuals) > 1:
        weight = extrapolation_weights([refresh.step for refresh in refreshes[-HISTORY:]], step)[0]
        known.append((residuals[0] - residuals[1]) * weight)
    return known


def grouped(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[..., C] as [G, N, C/G]."""
    split: torch.Tensor = tensor.unflatten(-1, (groups, -1))
    return split.flatten(0, -3).transpose(0, 1)


def bucket_of(time: float, time_buckets: int) -> int:
    """Index of the bucket of a normalised time; 0 = noise."""
    return min(time_buckets - 1, max(0, int((1.0 - time) * time_buckets)))


def fit_from(source: object) -> FittedBranches:
    """What ``apply_skip_cache(branches=...)`` was given, as a fit.

    Raises:
        BranchError: it is neither a fit nor a folder or hub id.
        BranchFileError: the files cannot be read.
    """
    if isinstance(source, FittedBranches):
        return source
    if isinstance(source, (str, Path)):
        return FittedBranches.from_pretrained(source)
    raise BranchError(
        f"branches is {source!r}. Pass what fit_skip_branches returned, its folder or a hub id; "
        "trained SkipBranches are attached with add_skip_branches."
    )


def fit_beside(transformer: nn.Module) -> FittedBranches | None:
    """The fit whose files lie beside the weights that the transformer was loaded from, if it was
    made for these very weights.

    Raises:
        BranchFileError: the files are there, and cannot be read.
    """
    folder = folder_of(transformer)
    if folder is None or not (folder / RECORD_FILE).is_file():
        return None
    record = read_record(folder)
    if record.kind != "fitted" or not is_made_for(record.base_model, transformer):
        return None
    return FittedBranches.from_pretrained(folder)


def with_base_model(fit: FittedBranches, transformer: nn.Module, made_by: str) -> FittedBranches:
    """The same fit, marked as that transformer's."""
    return replace(fit, record=BranchRecord("fitted", {}, base_model_of(transformer), made_by))


def _names(index: int, is_factored: bool) -> tuple[str, ...]:
    leaves = ("down", "up") if is_factored else ("weight",)
    return tuple(f"cells.{index}.{leaf}" for leaf in leaves)


def _shapes(
    cells: Sequence[Cell], ranks: Sequence[int | None], dim: int, groups: int
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    width = dim // groups
    for index, (cell, rank) in enumerate(zip(cells, ranks, strict=True)):
        inputs = (1 + cell.refreshes) * width + 1
        if not cell.distance > 0 or not cell.spacing >= 0:
            raise ValueError(f"cell {cell} cannot be")
        if rank is None:
            shapes[f"cells.{index}.weight"] = (groups, inputs, width)
        else:
            shapes[f"cells.{index}.down"] = (groups, inputs, rank)
            shapes[f"cells.{index}.up"] = (groups, rank, width)
    return shapes
