"""Skip branches at work: stand-ins that take a skip where a layer is entered, and merge it where
another is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from skipcache.branches.module import SkipBranch, SkipBranches
from skipcache.errors import BranchError
from skipcache.runtime.blocklist import Ports, StandIn, join_of

if TYPE_CHECKING:
    from skipcache.runtime.layout import BoundList, Seat


@dataclass
class Skips:
    """The skips of one forward by source layer, each until its last branch has taken it.

    Attributes:
        held: [B, T, C] each.
        is_tape: kept for a backward that runs blocks again (gradient checkpointing).
    """

    held: dict[int, torch.Tensor] = field(default_factory=dict)
    is_tape: bool = False


class SourceBlock(StandIn):
    """The block after a source layer: what enters it is the skip."""

    def __init__(
        self,
        block: Any,
        ports: Ports,
        skips: Skips,
        source: int,
        index: int,
        joined: tuple[int, ...] = (),
    ) -> None:
        super().__init__(block, ports)
        self.skips, self.source, self.index, self.joined = skips, source, index, joined

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._take(args, kwargs)
        return self.block(*args, **kwargs)

    def _take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps what enters, for the branches to come."""
        flow = self.ports.read(args, kwargs)
        entering = join_of(flow, self.joined) if self.joined else flow[self.index]
        if entering is not None:
            # Without gradients a block may work in place; with them copies would cost memory.
            is_safe = torch.is_grad_enabled()
            self.skips.held[self.source] = entering if is_safe else entering.clone()


class TargetBlock(StandIn):
    """The block that a branch leads to: its input is merged with the skip first."""

    def __init__(
        self,
        block: Any,
        ports: Ports,
        skips: Skips,
        source: int,
        index: int,
        branch: SkipBranch,
        is_last: bool,
    ) -> None:
        super().__init__(block, ports)
        self.skips, self.source, self.index = skips, source, index
        self.branch, self.is_last = branch, is_last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._merge(args, kwargs)
        return self.block(*args, **kwargs)

    def _merge(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with what enters merged with its skip.

        Raises:
            BranchError: there is no such skip, or no such tensor.
        """
        entering = self.ports.read(args, kwargs)[self.index]
        skip = self.skips.held.get(self.source)
        if entering is None or skip is None:
            missing = "tensor to act on" if entering is None else f"output of layer {self.source}"
            raise BranchError(
                f"a skip branch found no {missing}: the model left a block out, or ran one again. "
                "Choose other pairs or another tensor. To compile a model with gradient "
                "checkpointing, compile its blocks, not the whole."
            )
        if self.is_last and not self.skips.is_tape:
            del self.skips.held[self.source]
        return self.ports.replace(args, kwargs, self.index, self.branch(entering, skip))


class TapedSourceBlock(SourceBlock):
    """One that gradient checkpointing may run again: in no graph, which would lose the skip's
    gradient. The block itself may be in one.
    """

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        self._take(args, kwargs)
        return self.block(*args, **kwargs)

    __call__ = torch.compiler.disable(_run, recursive=False)


class TapedTargetBlock(TargetBlock):
    """Likewise."""

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._merge(args, kwargs)
        return self.block(*args, **kwargs)

    __call__ = torch.compiler.disable(_run, recursive=False)


@dataclass(frozen=True)
class BoundBranches:
    """A model's branches, checked against its layers.

    Attributes:
        branches: the module.
        indices: of the tensor they act on among the flowing ones, by the list's path.
        joined: where a skip is several tensors joined, as its target's list has them: their
            indices, by the source layer.
        skips: those of the forward under way.
    """

    branches: SkipBranches
    indices: dict[str, int]
    joined: dict[int, tuple[int, ...]] = field(default_factory=dict)
    skips: Skips = field(default_factory=Skips)

    def tape(self) -> BoundBranches:
        """The same with skips of its own, which outlive the forward as long as the graph needs
        them.
        """
        return replace(self, skips=Skips(is_tape=True))

    def stand_ins(
        self, bound_list: BoundList, between: Callable[[Seat, Any], Any] | None = None
    ) -> tuple[Any, ...]:
        """What the list yields, one a block.

        Args:
            bound_list: one of the model's lists.
            between: wraps a block, given with its seat, inside the taking of a skip and outside the
                merging of one: where a cache looks at features and overwrites them.
        """
        return tuple(self._stand_in(bound_list, seat, between) for seat in bound_list.seats())

    def _stand_in(
        self,
        bound_list: BoundList,
        seat: Seat,
        between: Callable[[Seat, Any], Any] | None,
    ) -> Any:
        layer, ports = seat.layer, seat.ports
        is_tape = self.skips.is_tape
        source_kind, target_kind = (
            (TapedSourceBlock, TapedTargetBlock) if is_tape else (SourceBlock, TargetBlock)
        )
        targets = self.branches.by_target()
        pairs = self.branches.pairs if seat.enters_layer else ()
        index = self.indices.get(bound_list.spec.path, 0)
        stand_in: Any = seat.block
        for source, target in pairs:
            if target == layer:
                is_last = all(t <= target for s, t in pairs if s == source)
                stand_in = target_kind(
                    stand_in, ports, self.skips, source, index, targets[target], is_last
                )
        if between is not None:
            stand_in = between(seat, stand_in)
        if any(source + 1 == layer for source, _ in pairs):
            joined = self.joined.get(layer - 1, ())
            stand_in = source_kind(stand_in, ports, self.skips, layer - 1, index, joined)
        return stand_in


def bind_branches(
    branches: SkipBranches, lists: tuple[BoundList, ...], depth: int, name: str
) -> BoundBranches:
    """Checks that the branches fit the layers.

    Raises:
        BranchError: another depth, a tensor that a joined layer does not take, or one source for
            targets in which it has different forms.
    """
    if branches.depth != depth:
        raise BranchError(
            f"the skip branches are for {branches.depth} layers, and this {name!r} model has "
            f"{depth}. Make or load branches for this model."
        )
    touched = {layer for source, target in branches.pairs for layer in (source + 1, target)}
    indices = {}
    for entry in lists:
        if not entry.is_leading or not touched & set(entry.layers):
            continue
        takes = entry.spec.takes
        tensor = branches.tensor or takes[0]
        if tensor not in takes:
            raise BranchError(
                f"the skip branches act on {tensor!r}, and the blocks of {entry.spec.path!r} take "
                f"{', '.join(map(repr, takes))}. Pass SkipBranches(..., tensor=...) with one of "
                "these, or pairs that leave this list out."
            )
        indices[entry.spec.path] = takes.index(tensor)
    joined: dict[int, tuple[int, ...]] = {}
    for source, target in branches.pairs:
        taken, merged = _list_at(lists, source + 1), _list_at(lists, target)
        order = merged.spec.form_from(taken.spec) or ()
        if joined.setdefault(source, order) != order:
            raise BranchError(
                f"layer {source} is the source of several skip branches, and in {name!r} their "
                "targets take different tensors. Choose other pairs."
            )
    return BoundBranches(branches, indices, joined)


def _list_at(lists: tuple[BoundList, ...], layer: int) -> BoundList:
    return [entry for entry in lists if entry.is_leading and entry.first_layer <= layer][-1]
