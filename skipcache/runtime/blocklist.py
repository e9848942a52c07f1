"""Stand-ins: what a transformer's own block loop meets while a cached forward is under way.

The loop ``for block in self.blocks`` keeps its full length. Blocks at the front and the back are
the real ones; those of the deep span, and the resume layer, are stand-ins that look at one bool,
``slot.is_reuse``, which was decided outside the forward. Everything here is traceable by
``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from skipcache.estimators import Estimator, Tensors

FlowLayout: TypeAlias = "tuple[tuple[torch.Size, torch.dtype, torch.device] | None, ...]"


def layout_of(flow: Tensors) -> FlowLayout:
    """Shape, dtype and device of every flowing tensor: what must agree for a reuse."""
    return tuple(
        None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in flow
    )


def copy_of(flow: Tensors) -> Tensors:
    """Copies: safe from blocks that work in place, and no view that keeps a larger tensor alive."""
    return tuple(None if tensor is None else tensor.clone() for tensor in flow)


def join_of(flow: Tensors, order: tuple[int, ...]) -> torch.Tensor:
    """The tensors of these indices, joined along their tokens."""
    return torch.cat([tensor for i in order if (tensor := flow[i]) is not None], dim=1)


def outline_of(flow: Tensors) -> Tensors:
    """Shape, dtype and device alone: one zero, expanded, so that any relayout of it is a view."""
    return tuple(
        None if tensor is None else tensor.new_zeros(()).expand(tensor.shape) for tensor in flow
    )


@dataclass(frozen=True)
class Ports:
    """Where the flowing tensors sit in a block's call and in what it returns.

    Attributes:
        takes: (parameter name, position) of each.
        returns: index into ``takes`` of each returned value, None where the block returns None.
        is_bare: whether the block returns a bare tensor, not a tuple.
    """

    takes: tuple[tuple[str, int], ...]
    returns: tuple[int | None, ...]
    is_bare: bool

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensors:
        return tuple(
            kwargs[name] if name in kwargs else args[position] if position < len(args) else None
            for name, position in self.takes
        )

    def write(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], flow: Tensors
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for index, tensor in enumerate(flow):
            args, kwargs = self.replace(args, kwargs, index, tensor)
        return args, dict(kwargs)

    def replace(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        index: int,
        tensor: torch.Tensor | None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with one of the flowing tensors exchanged."""
        positional, named = list(args), dict(kwargs)
        name, position = self.takes[index]
        if name not in named and position < len(positional):
            positional[position] = tensor
        else:
            named[name] = tensor
        return tuple(positional), named

    def hand_through(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The input, in the shape that the block would have returned."""
        flow = self.read(args, kwargs)
        if self.is_bare:
            index = self.returns[0]
            return None if index is None else flow[index]
        return tuple(None if index is None else flow[index] for index in self.returns)


@dataclass
class Slot:
    """The one mutable thing that stand-ins see: what this forward is to do and what it captured."""

    estimator: Estimator
    is_reuse: bool = False
    keeps: bool = False  # capture the features of this forward, should it turn out a refresh
    needs_shallow: bool = False
    joined: tuple[int, ...] = ()  # see BoundBackbone.joined
    is_inside_span: bool = False  # of a reuse: between the entry of the span and the resume layer
    expected: FlowLayout = ()
    prepared: tuple[Tensors, ...] = ()
    probe: Callable[[Tensors], None] | None = None
    # Is shown the shallow and deep feature of a forward that keeps none.
    witness: Callable[[Tensors, Tensors], None] | None = None
    shallow: Tensors | None = None
    deep: Tensors | None = None
    entered: FlowLayout = field(default=())

    def clear(self) -> None:
        """Lets go of every tensor."""
        self.prepared, self.probe, self.shallow, self.deep = (), None, None, None
        self.entered, self.is_inside_span = (), False


class StandIn:
    """Stands for a block in the transformer's loop. ``block`` is the real one, or another stand-in
    of it.
    """

    def __init__(self, block: Any, ports: Ports) -> None:
        self.block, self.ports = block, ports

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their blocks in the loop (SD3: context_pre_only).
        if name.startswith("__") or "block" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.block, name)


class SpanBlock(StandIn):
    """Stands for a block of the deep span: runs it, or on a reuse hands its input through."""

    def __init__(self, block: Any, ports: Ports, slot: Slot) -> None:
        super().__init__(block, ports)
        self.slot = slot

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.slot.is_reuse:
            return self.ports.hand_through(args, kwargs)
        return self.block(*args, **kwargs)


class EntryBlock(SpanBlock):
    """The first block of the deep span: here the shallow feature is known and guarded.

    ``hands_outline``: on a reuse it goes on with an outline of what enters, for nothing looks at it
    before the resume layer puts the estimate in.
    """

    def __init__(self, block: Any, ports: Ports, slot: Slot, hands_outline: bool = False) -> None:
        super().__init__(block, ports, slot)
        self.hands_outline = hands_outline

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        slot = self.slot
        flow = self.ports.read(args, kwargs)
        if slot.probe is not None:
            slot.probe(flow)
        slot.entered = layout_of(flow)
        if slot.is_reuse and slot.entered != slot.expected:
            slot.is_reuse = False
        if slot.needs_shallow and (slot.is_reuse or slot.keeps or slot.witness is not None):
            slot.shallow = (join_of(flow, slot.joined),) if slot.joined else copy_of(flow)
        if slot.is_reuse:
            slot.is_inside_span = True
            if self.hands_outline:
                args, kwargs = self.ports.write(args, kwargs, outline_of(flow))
            return self.ports.hand_through(args, kwargs)
        return self.block(*args, **kwargs)


class ResumeBlock(SpanBlock):
    """The first block of the back: a refresh captures the deep feature here, a reuse puts the
    estimate in.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        slot = self.slot
        slot.is_inside_span = False
        if slot.is_reuse:
            deep = slot.estimator.estimate(slot.prepared, slot.shallow)
            args, kwargs = self.ports.write(args, kwargs, deep)
        elif slot.keeps:
            slot.deep = copy_of(self.ports.read(args, kwargs))
        elif slot.witness is not None and slot.shallow is not None:
            slot.witness(slot.shallow, self.ports.read(args, kwargs))
        return self.block(*args, **kwargs)


class InterleavedBlock(SpanBlock):
    """Stands for a module that the forward calls between blocks: inside the span of a reuse it
    returns zeros, which add nothing to what nobody looks at.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.slot.is_inside_span:
            return outline_of(self.ports.read(args, kwargs))[0]
        return self.block(*args, **kwargs)


class SteppedBlockList(nn.ModuleList):
    """The class that a retrofitted or cached transformer's block lists take on: an
    ``nn.ModuleList`` that can iterate stand-ins.

    Names, ``state_dict`` and indexing are those of ``nn.ModuleList``; outside a forward so are
    iteration and slicing.
    """

    _stand_ins: tuple[Any, ...] | None = None
    _is_indexed: bool = False  # the forward takes its members by index, not in a loop
    _taping: tuple[Any, Any] | None = None  # how to make stand-ins that a backward can run again

    def __iter__(self) -> Iterator[nn.Module]:
        if self._stand_ins is None:
            return super().__iter__()
        return iter(self._at_hand())

    def __getitem__(self, index: Any) -> Any:
        # An index is asked for a block's attributes (DiT's head), a slice for blocks to run.
        if self._stand_ins is None or not (isinstance(index, slice) or self._is_indexed):
            return super().__getitem__(index)
        return self._at_hand()[index]

    def _at_hand(self) -> tuple[Any, ...]:
        assert self._stand_ins is not None
        if self._taping is not None and not torch.compiler.is_compiling():
            bound_list, branches = self._taping
            stand_ins: tuple[Any, ...] = branches.stand_ins(bound_list)
            return stand_ins
        return self._stand_ins
