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
from skipcache.runtime.blocklist import Ports, StandIn

if TYPE_CHECKING:
    from skipcache.runtime.layout import BoundList


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

    def __init__(self, block: Any, ports: Ports, skips: Skips, source: int, index: int) -> None:
        super().__init__(block, ports)
        self.skips, self.source, self.index = skips, source, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        entering = self.ports.read(args, kwargs)[self.index]
        if entering is not None:
            self.skips.held[self.source] = entering
        return self.block(*args, **kwargs)


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
        entering = self.ports.read(args, kwargs)[self.index]
        skip = self.skips.held[self.source]
        if self.is_last and not self.skips.is_tape:
            del self.skips.held[self.source]
        args, kwargs = self.ports.replace(args, kwargs, self.index, self.branch(entering, skip))
        return self.block(*args, **kwargs)


@dataclass(frozen=True)
class BoundBranches:
    """A model's branches, checked against its layers.

    Attributes:
        branches: the module.
        indices: of the tensor they act on among the flowing ones, by the list's path.
        skips: those of the forward under way.
    """

    branches: SkipBranches
    indices: dict[str, int]
    skips: Skips = field(default_factory=Skips)

    def tape(self) -> BoundBranches:
        """The same with skips of its own, which outlive the forward as long as the graph needs
        them.
        """
        return replace(self, skips=Skips(is_tape=True))

    def stand_ins(
        self, bound_list: BoundList, between: Callable[[int, Any, Ports], Any] | None = None
    ) -> tuple[Any, ...]:
        """What the list yields, one a block.

        Args:
            bound_list: one of the model's lists.
            between: wraps a block, given with its layer and ports, inside the taking of a skip and
                outside the merging of one: where a cache looks at features and overwrites them.
        """
        return tuple(
            self._stand_in(bound_list, layer, block, ports, between)
            for layer, block, ports in bound_list.entries()
        )

    def _stand_in(
        self,
        bound_list: BoundList,
        layer: int,
        block: Any,
        ports: Ports,
        between: Callable[[int, Any, Ports], Any] | None,
    ) -> Any:
        targets = self.branches.by_target()
        pairs = self.branches.pairs if bound_list.is_leading else ()
        index = self.indices.get(bound_list.spec.path, 0)
        stand_in = block
        for source, target in pairs:
            if target == layer:
                is_last = all(t <= target for s, t in pairs if s == source)
                stand_in = TargetBlock(
                    stand_in, ports, self.skips, source, index, targets[target], is_last
                )
        if between is not None:
            stand_in = between(layer, stand_in, ports)
        if any(source + 1 == layer for source, _ in pairs):
            stand_in = SourceBlock(stand_in, ports, self.skips, layer - 1, index)
        return stand_in


def bind_branches(
    branches: SkipBranches, lists: tuple[BoundList, ...], depth: int, name: str
) -> BoundBranches:
    """Checks that the branches fit the layers.

    Raises:
        BranchError: another depth, a tensor that a joined layer does not take.
    """
    if branches.depth != depth:
        raise BranchError(
            f"the skip branches are for {branches.depth} layers, and this {name!r} model has "
            f"{depth}. Make or load branches for this model."
        )
    joined = {layer for source, target in branches.pairs for layer in (source + 1, target)}
    indices = {}
    for entry in lists:
        if not entry.is_leading or not joined & set(entry.layers):
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
    return BoundBranches(branches, indices)
