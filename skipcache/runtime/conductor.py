"""What is installed on a transformer: lists that can yield stand-ins, and the two hooks of its
forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from skipcache.runtime.blocklist import SteppedBlockList
from skipcache.runtime.compiled import outside_graphs
from skipcache.runtime.layout import BoundBackbone
from skipcache.runtime.taps import MethodTap


class PreForwardHook:
    """Forward pre-hook of the transformer; a module-level class: copies and pickles carry it."""

    def __init__(self, conductor: Conductor) -> None:
        self.conductor = conductor

    @outside_graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.conductor.is_inside_method:
            self.conductor.before(args, kwargs)


class PostForwardHook:
    """Forward hook of the transformer, also called when the forward raised."""

    def __init__(self, conductor: Conductor) -> None:
        self.conductor = conductor

    @outside_graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return None if self.conductor.is_inside_method else self.conductor.after(output)


class Conductor:
    """Puts the stand-ins of a transformer's branches in place for the length of a forward.

    One conductor is installed on a transformer at most; a ``Controller`` is one that caches too.
    """

    def __init__(self, bound: BoundBackbone) -> None:
        self.bound = bound
        self.branch_stand_ins = bound.branch_stand_ins()
        self.transformer: nn.Module | None = None
        self.is_inside_method = False  # of a MethodTap, which stands for the hooks
        self._handles: list[Any] = []

    # Installing: nothing below may fail half-way, so everything that can fail was done before.

    def install(self, transformer: nn.Module) -> None:
        """Puts the hooks and taps in."""
        self.transformer = transformer
        for entry in (*self.bound.lists, *self.bound.interleaved):
            entry.module.__class__ = SteppedBlockList
        for entry in self.bound.interleaved:
            entry.module._is_indexed = True  # type: ignore[assignment]
        self._handles = [
            transformer.register_forward_pre_hook(PreForwardHook(self), with_kwargs=True),
            transformer.register_forward_hook(PostForwardHook(self), always_call=True),
        ]
        for method in self.bound.backbone.entry_points:
            if hasattr(type(transformer), method):
                transformer.__dict__[method] = MethodTap(transformer, method, self)

    def uninstall(self, transformer: nn.Module) -> None:
        """Takes them out: the same objects as before, with the same attributes."""
        for handle in self._handles:
            handle.remove()
        for name in self.bound.backbone.entry_points:
            if isinstance(transformer.__dict__.get(name), MethodTap):
                del transformer.__dict__[name]
        for entry in (*self.bound.lists, *self.bound.interleaved):
            for name in ("_stand_ins", "_taping", "_is_indexed"):
                entry.module.__dict__.pop(name, None)
            entry.module.__class__ = nn.ModuleList

    # The two ends of a forward.

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decides what the forward under way does."""
        self.yield_branches()

    def after(self, output: Any) -> Any:
        """Ends the forward; ``output`` is None when it raised. Returns what is to take its place,
        None for nothing.
        """
        self.yield_real_blocks()

    def yield_branches(self) -> None:
        """The lists yield what an uncached forward is to meet."""
        branches = self.bound.branches
        if branches is None:
            self.yield_real_blocks()
            return
        taping = branches.tape() if torch.is_grad_enabled() else None
        is_rerun = taping is not None and getattr(self.transformer, "gradient_checkpointing", False)
        for entry, lasting in zip(self.bound.lists, self.branch_stand_ins, strict=True):
            # Blocks that run again need stand-ins of this forward, in a compiled model too.
            fresh = taping.stand_ins(entry) if taping is not None and is_rerun else None
            taped = (entry, taping) if taping is not None and fresh is None else None
            entry.module._stand_ins = fresh or lasting  # type: ignore[assignment]
            entry.module._taping = taped  # type: ignore[assignment]

    def yield_real_blocks(self) -> None:
        """The lists yield their blocks, and nothing of the forward is kept."""
        for entry in (*self.bound.lists, *self.bound.interleaved):
            entry.module._stand_ins = None  # type: ignore[assignment]
        if self.bound.branches is not None:
            for entry in self.bound.lists:
                entry.module._taping = None  # type: ignore[assignment]
            self.bound.branches.skips.held.clear()


def conductor_of(transformer: nn.Module) -> Conductor | None:
    """The conductor that is installed on the transformer, if any."""
    for hook in transformer._forward_pre_hooks.values():
        if isinstance(hook, PreForwardHook):
            return hook.conductor
    return None
