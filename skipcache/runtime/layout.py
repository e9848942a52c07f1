"""Binds a ``Backbone`` to a transformer: finds its lists, checks them, and builds the stand-ins."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from skipcache.backbone import Backbone, BlockList, Zipped
from skipcache.branches.module import attached_branches
from skipcache.errors import AdapterError, ConfigError
from skipcache.runtime.blocklist import (
    EntryBlock,
    InterleavedBlock,
    Ports,
    ResumeBlock,
    Slot,
    SpanBlock,
    SteppedBlockList,
)
from skipcache.runtime.skips import BoundBranches, bind_branches


@dataclass(frozen=True)
class Seat:
    """Where a block sits.

    Attributes:
        layer: the layer that it belongs to.
        enters_layer: whether features are captured and injected at it.
        block: the real block.
        ports: of it.
    """

    layer: int
    enters_layer: bool
    block: nn.Module
    ports: Ports


@dataclass(frozen=True)
class BoundList:
    """One block list found on a transformer.

    Attributes:
        spec: the adapter's word on it.
        module: the list itself.
        ports: of every block.
        first_layer: index of the layer that its first block belongs to.
        is_leading: whether features are captured and injected at its blocks (the first of zipped
            lists).
    """

    spec: BlockList
    module: nn.ModuleList
    ports: tuple[Ports, ...]
    first_layer: int
    is_leading: bool

    @property
    def layers(self) -> range:
        """The layers that its blocks belong to."""
        count = len(self.ports) // self.spec.blocks_per_layer
        return range(self.first_layer, self.first_layer + count)

    def seats(self) -> Iterator[Seat]:
        """Where each block sits."""
        for i, (block, ports) in enumerate(zip(_real_blocks(self.module), self.ports, strict=True)):
            layer, position = divmod(i, self.spec.blocks_per_layer)
            enters = self.is_leading and position == 0
            yield Seat(self.first_layer + layer, enters, block, ports)

    def cached_stand_in(self, seat: Seat, block: Any, span: range, slot: Slot) -> Any:
        """What stands for the block where a cache may leave the layers of ``span`` out."""
        if seat.layer < span.start or seat.layer > span.stop:
            return block
        if seat.layer == span.stop:
            return ResumeBlock(block, seat.ports, slot) if seat.enters_layer else block
        if seat.layer == span.start and seat.enters_layer:
            return EntryBlock(block, seat.ports, slot, self.spec.relayouts)
        return SpanBlock(block, seat.ports, slot)


@dataclass(frozen=True)
class BoundBackbone:
    """A backbone whose every word was checked against one transformer.

    Attributes:
        backbone: the adapter's word.
        lists: the block lists found.
        depth: number of layers, L.
        interleaved: the lists found whose members the forward calls between blocks.
        branches: the skip branches that the transformer carries, if any.
    """

    backbone: Backbone
    lists: tuple[BoundList, ...]
    depth: int
    interleaved: tuple[BoundList, ...] = ()
    branches: BoundBranches | None = None

    @property
    def skips(self) -> tuple[tuple[int, int], ...]:
        """(source, target) of every skip branch, native or attached."""
        attached = self.branches.branches.pairs if self.branches is not None else ()
        return (*self.backbone.native_skips, *attached)

    @property
    def has_working_branches(self) -> bool:
        """Whether skip branches, native or attached, do anything yet."""
        attached = self.branches is not None and self.branches.branches.changes_output
        return attached or bool(self.backbone.native_skips)

    def branch_stand_ins(self) -> tuple[tuple[Any, ...] | None, ...]:
        """What each list yields while nothing is cached; None for the blocks themselves."""
        if self.branches is None:
            return (None,) * len(self.lists)
        return tuple(self.branches.stand_ins(entry) for entry in self.lists)

    def cached_stand_ins(self, span: range, slot: Slot) -> tuple[tuple[Any, ...], ...]:
        """What each list yields where a cache may leave the layers of ``span`` out."""
        return tuple(self._cached_stand_ins(entry, span, slot) for entry in self.lists)

    def _cached_stand_ins(self, entry: BoundList, span: range, slot: Slot) -> tuple[Any, ...]:
        def between(seat: Seat, block: Any) -> Any:
            return entry.cached_stand_in(seat, block, span, slot)

        if self.branches is not None:
            return self.branches.stand_ins(entry, between)
        return tuple(between(seat, seat.block) for seat in entry.seats())

    def interleaved_stand_ins(self, slot: Slot) -> tuple[tuple[Any, ...], ...]:
        """What each interleaved list gives by index."""
        return tuple(
            tuple(InterleavedBlock(seat.block, seat.ports, slot) for seat in entry.seats())
            for entry in self.interleaved
        )

    def check_layers(self, front_layers: int, back_layers: int, needs_shallow: bool) -> None:
        """Refuses a deep span that this model or estimator cannot leave out.

        Raises:
            ConfigError: a skip would start inside the span and end behind it, or the estimator
                compares shallow and deep features that are not of one form.
        """
        resume = self.depth - back_layers
        for source, target in self.skips:
            if front_layers <= source < resume <= target:
                raise ConfigError(
                    f"back_layers={back_layers} with front_layers={front_layers}: the skip branch "
                    f"of layer {target} of "
                    f"{self.backbone.name!r} starts at layer {source}, which a reuse step leaves "
                    "out. "
                    "Use back_layers no larger than front_layers."
                )
        if needs_shallow:
            self.joined(front_layers, resume)

    def joined(self, front_layers: int, resume: int) -> tuple[int, ...]:
        """Which tensors that enter layer ``front_layers``, joined along their tokens, are of the
        form of the one that enters the resume layer; none where they are as they are.

        Raises:
            ConfigError: they are different tensors, and no adapter says how they are joined.
        """
        if resume == self.depth:
            raise ConfigError(
                "the estimator compares the shallow feature with the deep one, and with "
                "back_layers=0 it is the transformer's output that is kept. Use estimator='hold' "
                "or 'taylor', or back_layers=1."
            )
        entered, resumed = self._list_at(front_layers), self._list_at(resume)
        order = resumed.spec.form_from(entered.spec)
        # What enters a layer is other tensors if a block of the layer before began anew.
        breaks = {
            e.first_layer + math.ceil(i / e.spec.blocks_per_layer)
            for e in self.lists
            for i in e.spec.breaks
        }
        if order is None or any(front_layers < layer <= resume for layer in breaks):
            raise ConfigError(
                f"the estimator compares the feature entering layer {front_layers} with that "
                f"entering layer {resume}, and in {self.backbone.name!r} they are different "
                f"tensors: {entered.spec.takes} of {entered.spec.path!r} and {resumed.spec.takes} "
                f"of {resumed.spec.path!r}. Use estimator='hold' or 'taylor'."
            )
        return order

    def _list_at(self, layer: int) -> BoundList:
        return [b for b in self.lists if b.is_leading and b.first_layer <= layer][-1]


def bind(backbone: Backbone, transformer: nn.Module) -> BoundBackbone:
    """Finds and checks everything that the backbone names, and the branches that the model carries.

    Raises:
        BranchError: branches that do not fit the layers.
        AdapterError: a path that is not there or no ``nn.ModuleList``, an empty list, zipped lists
            of different lengths, a parameter that a block's forward does not have, a native skip
            past the last layer.
    """
    lists: list[BoundList] = []
    layer = 0
    for entry in backbone.lists:
        group = entry.lists if isinstance(entry, Zipped) else (entry,)
        modules = [_find_list(backbone, spec, transformer) for spec in group]
        lengths = {spec.path: len(module) for spec, module in zip(group, modules, strict=True)}
        if len(set(lengths.values())) > 1:
            raise _mismatch(backbone, transformer, f"zipped lists differ in length: {lengths}")
        count, per_layer = len(modules[0]), group[0].blocks_per_layer
        if count % per_layer:
            raise _mismatch(
                backbone, transformer, f"{count} blocks do not make layers of {per_layer}"
            )
        for position, (spec, module) in enumerate(zip(group, modules, strict=True)):
            ports = tuple(
                _ports_of(backbone, spec, block, transformer) for block in _real_blocks(module)
            )
            lists.append(BoundList(spec, module, ports, layer, is_leading=position == 0))
        layer += count // per_layer
    interleaved = []
    for spec in backbone.interleaved:
        module = _find_list(backbone, spec, transformer)
        ports = tuple(_ports_of(backbone, spec, b, transformer) for b in _real_blocks(module))
        interleaved.append(BoundList(spec, module, ports, 0, is_leading=False))
    for source, target in backbone.native_skips:
        if target >= layer:
            raise _mismatch(
                backbone,
                transformer,
                f"native skip ({source}, {target}) ends past the last of {layer} layers",
            )
    attached = attached_branches(transformer)
    branches = (
        bind_branches(attached, tuple(lists), layer, backbone.name)
        if attached is not None
        else None
    )
    return BoundBackbone(backbone, tuple(lists), layer, tuple(interleaved), branches)


def _real_blocks(module: nn.ModuleList) -> Iterator[nn.Module]:
    return iter(module._modules.values())


def _find_list(backbone: Backbone, spec: BlockList, transformer: nn.Module) -> nn.ModuleList:
    found: Any = transformer
    for name in spec.path.split("."):
        found = getattr(found, name, None)
    if type(found) not in (nn.ModuleList, SteppedBlockList):
        what = "nothing" if found is None else f"a {type(found).__name__}"
        raise _mismatch(backbone, transformer, f"at {spec.path!r} is {what}, not an nn.ModuleList")
    if len(found) == 0:
        raise _mismatch(backbone, transformer, f"the list {spec.path!r} is empty")
    assert isinstance(found, nn.ModuleList)
    return found


def _ports_of(
    backbone: Backbone, spec: BlockList, block: nn.Module, transformer: nn.Module
) -> Ports:
    # Of the class: offloading and quantisation replace the instance's forward.
    parameters = list(inspect.signature(type(block).forward).parameters)[1:]
    missing = [name for name in spec.takes if name not in parameters]
    if missing:
        raise _mismatch(
            backbone,
            transformer,
            f"{type(block).__name__}.forward in {spec.path!r} takes {parameters}, not {missing}",
        )
    return Ports(
        takes=tuple((name, parameters.index(name)) for name in spec.takes),
        returns=tuple(None if name is None else spec.takes.index(name) for name in spec.returned),
        is_bare=isinstance(spec.returns, str),
    )


def _mismatch(backbone: Backbone, transformer: nn.Module, what: str) -> AdapterError:
    return AdapterError(
        f"adapter {backbone.name!r} does not fit {type(transformer).__qualname__!r}: {what}. "
        "Correct the adapter's "
        "Backbone (docs/how-to/write-an-adapter.md)."
    )
