"""The skip branch of Skip-DiT (arXiv:2411.17616, section 3) and the set of them that one model
carries.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import nn

from skipcache.errors import BranchError

if TYPE_CHECKING:
    from skipcache.branches.files import BranchRecord

Form: TypeAlias = Literal["replace", "residual"]
FORMS: tuple[Form, ...] = ("replace", "residual")
ATTRIBUTE = "skip_branches"
"""The name under which a transformer carries its branches."""


class SkipNorm(nn.LayerNorm):
    """LayerNorm in fp32, whatever the dtype of input, weights and autocast.

    Takes and returns [..., 2C]; the result is fp32.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(
            input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )


class SkipBranch(nn.Module):
    """One long skip connection: LayerNorm(2C) then Linear(2C, C) on ``[x ; skip]``.

    Attributes:
        form: ``"replace"``: the result is the new stream (the paper). ``"residual"``: it is added
            to x, and zero at first, so that a new branch changes nothing, bit for bit.
        skip_norm: LayerNorm with eps 1e-6, in fp32.
        skip_linear: the Linear; with a rank its second factor, r to C.
        skip_down: the first factor, 2C to r; None without a rank.

    Raises:
        BranchError: a width or rank below 1, or a form that does not exist.
    """

    def __init__(self, dim: int, *, form: Form = "residual", rank: int | None = None) -> None:
        super().__init__()
        check_shape(dim, form, rank)
        self.form: Form = form
        self.skip_norm = SkipNorm(2 * dim, eps=1e-6)
        self.skip_down = None if rank is None else nn.Linear(2 * dim, rank, bias=False)
        self.skip_linear = nn.Linear(2 * dim if rank is None else rank, dim)
        if form == "residual":
            nn.init.zeros_(self.skip_linear.weight)
            nn.init.zeros_(self.skip_linear.bias)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Merges ``skip`` [..., C] into ``x`` [..., C]; the result has the dtype of ``x``."""
        if skip.device != x.device:  # a model spread over several devices
            skip = skip.to(x.device)
        if self.skip_norm.weight.device != x.device and not self.skip_norm.weight.is_meta:
            self.to(x.device)  # one that an offloading hook, put in earlier, does not know of
        if x.shape != skip.shape:
            raise BranchError(
                f"a skip branch met a stream of shape {tuple(x.shape)} and a skip of shape "
                f"{tuple(skip.shape)}. The two layers that it joins must carry the same tokens; "
                "choose other pairs, or another tensor."
            )
        # Modules are called, not their weights used: offloading hooks sit on modules.
        # To fp32 first: autocast refuses to concatenate some half-precision tensors.
        merged = self.skip_norm(torch.cat([x.float(), skip.float()], dim=-1))
        if self.skip_down is not None:
            merged = self.skip_down(merged.to(_dtype_taken_by(self.skip_down, x)))
        merged = self.skip_linear(merged.to(_dtype_taken_by(self.skip_linear, x))).to(x.dtype)
        result: torch.Tensor = x + merged if self.form == "residual" else merged
        return result


class SkipBranches(nn.Module):
    """The skip branches of one transformer, as its submodule ``skip_branches``.

    Args:
        dim: width C of the stream.
        depth: layers of the transformer, L.
        pairs: (source, target): the output of layer ``source`` enters before layer ``target``.
            Default: layer i with layer L - 1 - i, for every i >= L / 2 (the paper).
        form: as in ``SkipBranch``; one for all.
        rank: rank of the Linears; None: full.
        tensor: name of the flowing tensor that they act on, as the adapter names it
            (``"hidden_states"``); None: the first.

    Raises:
        BranchError: pairs that are not in the model, repeat a target or do not go forward, and as
            ``SkipBranch``.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        pairs: Sequence[tuple[int, int]] | None = None,
        *,
        form: Form = "residual",
        rank: int | None = None,
        tensor: str | None = None,
    ) -> None:
        super().__init__()
        check_shape(dim, form, rank)
        if not _is_count(depth) or depth < 2:
            raise BranchError(f"depth is {depth!r}. It is a whole number of layers, at least 2.")
        if tensor is not None and not isinstance(tensor, str):
            raise BranchError(f"tensor is {tensor!r}. It is the name of a flowing tensor, or None.")
        self.dim, self.depth, self.form, self.rank, self.tensor = dim, depth, form, rank, tensor
        self.pairs = check_pairs(default_pairs(depth) if pairs is None else pairs, depth)
        self.record: BranchRecord | None = None  # what their files said of them
        self.layers = nn.ModuleDict(
            {str(target): SkipBranch(dim, form=form, rank=rank) for _, target in self.pairs}
        )

    def extra_repr(self) -> str:
        rank = "" if self.rank is None else f", rank={self.rank}"
        return f"dim={self.dim}, depth={self.depth}, form={self.form!r}{rank}"

    def by_target(self) -> dict[int, SkipBranch]:
        """The branches by the layer that they lead to."""
        return {int(name): cast("SkipBranch", module) for name, module in self.layers.items()}

    @property
    def changes_output(self) -> bool:
        """Whether any branch does anything yet: residual branches begin as zero."""
        if self.form == "replace":
            return True
        finals = [branch.skip_linear for branch in self.by_target().values()]
        return any(
            p.is_meta or bool(p.count_nonzero()) for final in finals for p in final.parameters()
        )

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        base_model: nn.Module | None = None,
        made_by: str | None = None,
        quality: dict[str, Any] | None = None,
    ) -> Path:
        """Writes ``skip_branches.safetensors``, ``skip_branches.json`` and a model card.

        Args:
            folder: created if need be.
            base_model: the transformer they belong to: its class and a fingerprint of its weights
                are written down, and checked when they are loaded onto another. Default: what the
                files that they came from said.
            made_by: how they were made, one sentence for people.
            quality: measured figures, by name.

        Returns:
            The folder.

        Raises:
            BranchFileError: weights that are not finite, or a folder that cannot be written.
        """
        from skipcache.branches.files import save_branches

        return save_branches(
            self, Path(folder), base_model=base_model, made_by=made_by, quality=quality
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> SkipBranches:
        """Reads them from a folder, or from a repository on the Hugging Face hub.

        A folder is never looked up elsewhere, so nothing touches the network.

        Args:
            source: folder, or hub id such as ``"user/my-branches"``.
            revision: of the repository.
            local_files_only: take the repository from the local hub cache only.

        Raises:
            BranchFileError: no such folder or repository, a truncated or corrupt file, missing or
                extra tensors, a newer format version, weights that are not finite.
        """
        from skipcache.branches.files import load_branches

        return load_branches(source, revision=revision, local_files_only=local_files_only)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **saving: Any) -> str:
        """Uploads what ``save_pretrained`` writes.

        Args:
            repo_id: hub id; the repository is created if need be.
            private: of a new repository.
            **saving: options of ``save_pretrained``.

        Returns:
            The address of the commit.
        """
        from skipcache.branches.files import push_folder

        return push_folder(lambda folder: self.save_pretrained(folder, **saving), repo_id, private)


def default_pairs(depth: int) -> tuple[tuple[int, int], ...]:
    """Layer i with layer L - 1 - i, for every i >= L / 2 (arXiv:2411.17616).

    >>> default_pairs(5)
    ((1, 3), (0, 4))
    """
    return tuple((depth - 1 - i, i) for i in range((depth + 1) // 2, depth))


def attached_branches(transformer: nn.Module) -> SkipBranches | None:
    """The branches that a transformer carries, if any."""
    found = transformer._modules.get(ATTRIBUTE)
    return found if isinstance(found, SkipBranches) else None


def check_shape(dim: object, form: object, rank: object) -> None:
    """Refuses a width, form or rank that cannot be.

    Raises:
        BranchError: with what is allowed.
    """
    if not _is_count(dim):
        raise BranchError(f"dim is {dim!r}. It is the width of the stream, at least 1.")
    if form not in FORMS:
        raise BranchError(f"form is {form!r}. Allowed: {', '.join(map(repr, FORMS))}.")
    if rank is not None and not _is_count(rank):
        raise BranchError(f"rank is {rank!r}. It is a whole number from 1, or None for full rank.")


def check_pairs(pairs: Sequence[tuple[int, int]], depth: int) -> tuple[tuple[int, int], ...]:
    """The pairs in order of target.

    Raises:
        BranchError: none at all, a layer that is not there, a skip that does not go forward, or two
            into one layer.
    """
    try:
        listed = sorted(
            ((operator.index(s), operator.index(t)) for s, t in pairs), key=lambda pair: pair[1]
        )
    except (TypeError, ValueError):
        raise BranchError(
            f"pairs are {pairs!r}. They are (source, target) layers: [(1, 3), (0, 4)]."
        ) from None
    for source, target in listed:
        if not 0 <= source < target < depth:
            raise BranchError(
                f"pair ({source}, {target}) does not go from a layer to a later one of {depth} "
                f"layers (0 to {depth - 1})."
            )
    if not listed or len({target for _, target in listed}) < len(listed):
        raise BranchError(
            f"pairs are {listed!r}. At least one is needed, and one branch at most enters a layer."
        )
    return tuple(listed)


def _dtype_taken_by(linear: nn.Linear, x: torch.Tensor) -> torch.dtype:
    """That of its weights, but for weights only stored so, which a hook casts first (fp8)."""
    kept: torch.dtype = linear.weight.dtype
    return kept if kept.is_floating_point and kept.itemsize > 1 else x.dtype


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
