"""Skip branches on any transformer: attach, take off, train them alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from skipcache.api import conduct_branches
from skipcache.errors import BranchError
from skipcache.plugins import resolve_backbone
from skipcache.targets import transformers_of

if TYPE_CHECKING:
    from torch import nn

    from skipcache.backbone import Backbone
    from skipcache.branches.module import Form, SkipBranches

Target = TypeVar("Target")


def add_skip_branches(
    target: Target,
    branches: SkipBranches | str | Path | None = None,
    *,
    form: Form = "residual",
    rank: int | None = None,
    adapter: str | Backbone | object | None = None,
) -> Target:
    """Makes a transformer a Skip-DiT (arXiv:2411.17616): long skip connections from its shallow
    layers to its deep ones.

    They act in every forward, with or without a cache, and are the transformer's submodule
    ``skip_branches``: ``.to``, ``parameters`` and offloading see them. ``save_pretrained`` of the
    model or pipeline leaves them out; save them with ``transformer.skip_branches.save_pretrained``.
    All or nothing: on an error nothing is attached.

    Args:
        target: a pipeline, or a transformer.
        branches: ready ones, or the folder or hub id to load them from; None: new ones.
        form: of new branches: ``"residual"`` changes nothing until trained, ``"replace"`` is the
            paper's, with random weights.
        rank: of the Linears of new branches; None: full.
        adapter: as in ``apply_skip_cache``.

    Returns:
        ``target`` itself.

    Raises:
        BranchError: the model carries branches already or was born with some, or these do not fit
            it.
        BranchFileError: files that cannot be read, or that belong to a model of another class or
            shape.
        AdapterError: as ``apply_skip_cache``.
        TargetError: the target has no transformer.
    """
    from skipcache.branches.module import SkipBranches, check_shape

    check_shape(1, form, rank)
    transformers = transformers_of(target)
    if isinstance(branches, (str, Path)):
        branches = SkipBranches.from_pretrained(branches)
    if branches is not None:
        _check_given(branches, form, rank, len(transformers))
    prepared = []
    for transformer in transformers.values():
        backbone = resolve_backbone(transformer, adapter)
        chosen = branches or _new_branches(transformer, backbone, form, rank)
        _check_fit(transformer, backbone, chosen)
        prepared.append((transformer, backbone, chosen))
    done: list[nn.Module] = []
    try:
        for transformer, backbone, chosen in prepared:
            _attach(transformer, backbone, chosen)
            done.append(transformer)
    except BaseException:
        for transformer in done:
            remove_skip_branches(transformer)
        raise
    return target


def remove_skip_branches(target: object) -> bool:
    """Takes the branches off again: the same objects with the same attributes, and the base model's
    output, bit for bit.

    Args:
        target: what ``add_skip_branches`` was given, or its transformer.

    Returns:
        Whether there were any.

    Raises:
        TargetError: the target has no transformer.
    """
    from skipcache.branches.module import ATTRIBUTE, attached_branches
    from skipcache.runtime.conductor import conductor_of
    from skipcache.runtime.taps import MethodTap

    removed = False
    for transformer in transformers_of(target).values():
        if attached_branches(transformer) is None:
            continue
        delattr(transformer, ATTRIBUTE)
        if isinstance(transformer.__dict__.get("save_pretrained"), MethodTap):
            del transformer.__dict__["save_pretrained"]
        conductor = conductor_of(transformer)
        if conductor is not None:
            conduct_branches(transformer, conductor.bound.backbone)
        removed = True
    return removed


def freeze_backbone(target: Target) -> Target:
    """Lets the skip branches train and nothing else: ``requires_grad`` is True for their parameters
    only.

    Args:
        target: a pipeline or transformer with skip branches.

    Returns:
        ``target`` itself.

    Raises:
        BranchError: it has none.
    """
    for transformer in transformers_of(target).values():
        branches = _required_branches(transformer)
        transformer.requires_grad_(False)
        branches.requires_grad_(True)
    return target


def _required_branches(transformer: nn.Module) -> SkipBranches:
    from skipcache.branches.module import attached_branches

    branches = attached_branches(transformer)
    if branches is None:
        raise BranchError(
            f"{type(transformer).__qualname__!r} carries no skip branches. Call add_skip_branches "
            "on it first."
        )
    return branches


def _check_given(branches: object, form: Form, rank: int | None, transformers: int) -> None:
    from skipcache.branches.module import SkipBranches

    if not isinstance(branches, SkipBranches):
        raise BranchError(
            f"branches is {branches!r}. Pass SkipBranches, or the folder or hub id of saved ones."
        )
    if transformers > 1:
        raise BranchError(
            f"the pipeline has {transformers} transformers, and branches belong to one. Pass the "
            "transformer."
        )
    if (rank is not None and rank != branches.rank) or (
        form != "residual" and form != branches.form
    ):
        raise BranchError(
            f"form={form!r} and rank={rank!r} are of new branches; these have "
            f"form={branches.form!r} and rank={branches.rank!r}. Leave them out."
        )


def _new_branches(
    transformer: nn.Module, backbone: Backbone, form: Form, rank: int | None
) -> SkipBranches:
    from skipcache.branches.module import SkipBranches
    from skipcache.runtime.layout import bind

    if backbone.hidden_size is None:
        raise BranchError(
            f"adapter {backbone.name!r} does not say the width of "
            f"{type(transformer).__qualname__!r}, so branches cannot be made for it. Set "
            "hidden_size in its Backbone, or pass SkipBranches(dim, depth)."
        )
    return SkipBranches(
        backbone.hidden_size, bind(backbone, transformer).depth, form=form, rank=rank
    )


def _check_fit(transformer: nn.Module, backbone: Backbone, branches: SkipBranches) -> None:
    from skipcache.branches.files import check_base_model
    from skipcache.branches.module import ATTRIBUTE, attached_branches
    from skipcache.runtime.layout import bind
    from skipcache.runtime.skips import bind_branches

    kind = type(transformer).__qualname__
    if backbone.native_skips:
        raise BranchError(
            f"{kind!r} was born with {len(backbone.native_skips)} skip branches of its own, which "
            "the cache uses already. A second set would bypass them; call apply_skip_cache alone."
        )
    if attached_branches(transformer) is not None:
        raise BranchError(
            f"{kind!r} carries skip branches already. Call remove_skip_branches first; it does not "
            "save them."
        )
    if hasattr(transformer, ATTRIBUTE):
        raise BranchError(f"{kind!r} has an attribute {ATTRIBUTE!r} of its own.")
    if backbone.hidden_size not in (None, branches.dim):
        raise BranchError(
            f"the skip branches are for streams of width {branches.dim}, and {kind!r} has width "
            f"{backbone.hidden_size}. Make or load branches for this model."
        )
    bound = bind(backbone, transformer)
    bind_branches(branches, bound.lists, bound.depth, backbone.name)
    if branches.record is not None:
        check_base_model(branches.record, transformer)


def _attach(transformer: nn.Module, backbone: Backbone, branches: SkipBranches) -> None:
    import torch

    from skipcache.branches.module import ATTRIBUTE
    from skipcache.runtime.taps import MethodTap

    first = next(
        (p for p in transformer.parameters() if p.is_floating_point() and not p.is_meta), None
    )
    if first is not None and first.dtype in (torch.float32, torch.float16, torch.bfloat16):
        branches.to(device=first.device, dtype=first.dtype)
    branches.train(transformer.training)
    transformer.add_module(ATTRIBUTE, branches)
    try:
        conduct_branches(transformer, backbone)
    except BaseException:
        delattr(transformer, ATTRIBUTE)
        raise
    if hasattr(type(transformer), "save_pretrained"):
        transformer.__dict__["save_pretrained"] = MethodTap(
            transformer, "save_pretrained", Stripped(transformer)
        )


class Stripped:
    """Takes the branches off a transformer while it is being saved."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.is_inside_method = False
        self._taken: Any = None

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Takes them off."""
        from skipcache.branches.module import ATTRIBUTE

        modules = self.transformer._modules
        self._taken = dict(modules)
        modules.pop(ATTRIBUTE, None)

    def after(self, output: Any) -> None:
        """Puts them back where they were, also when saving failed."""
        if self._taken is not None:
            self.transformer._modules.clear()
            self.transformer._modules.update(self._taken)
            self._taken = None
