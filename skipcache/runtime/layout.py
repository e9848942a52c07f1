"""Binds a ``Backbone`` to a transformer: finds its lists, checks them, and builds the stand-ins."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from skipcache.backbone import Backbone, BlockList, Zipped
from skipcache.errors import AdapterError, ConfigError
from skipcache.runtime.blocklist import (
    EntryBlock,
    Ports,
    ResumeBlock,
    Slot,
    SpanBlock,
    SteppedBlockList,
)


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

    def stand_ins(self, front_layers: int, resume_layer: int, slot: Slot) -> tuple[Any, ...]:
        """What the list yields during a cached forward, one a block."""
        return tuple(
            self._stand_in(self.first_layer + i, block, ports, front_layers, resume_layer, slot)
            for i, (block, ports) in enumerate(
                zip(_real_blocks(self.module), self.ports, strict=True)
            )
        )

    def _stand_in(
        self,
        layer: int,
        block: nn.Module,
        ports: Ports,
        front_layers: int,
        resume_layer: int,
        slot: Slot,
    ) -> Any:
        if layer < front_layers or layer > resume_layer:
            return block
        if layer == resume_layer:
            return ResumeBlock(block, ports, slot) if self.is_leading else block
        if layer == front_layers and self.is_leading:
            return EntryBlock(block, ports, slot)
        return SpanBlock(block, ports, slot)


@dataclass(frozen=True)
class BoundBackbone:
    """A backbone whose every word was checked against one transformer. ``depth`` is its number of
    layers, L.
    """

    backbone: Backbone
    lists: tuple[BoundList, ...]
    depth: int

    def check_layers(self, front_layers: int, back_layers: int, needs_shallow: bool) -> None:
        """Refuses a deep span that this model or estimator cannot leave out.

        Raises:
            ConfigError: a native skip would start inside the span and end behind it, or the
                estimator compares shallow and deep features that are not of one form.
        """
        resume = self.depth - back_layers
        for source, target in self.backbone.native_skips:
            if front_layers <= source < resume <= target:
                raise ConfigError(
                    f"back_layers={back_layers} with front_layers={front_layers}: the native skip "
                    f"of layer {target} of "
                    f"{self.backbone.name!r} starts at layer {source}, which a reuse step leaves "
                    "out. "
                    "Use back_layers no larger than front_layers."
                )
        if needs_shallow and self._takes_at(front_layers) != self._takes_at(resume):
            raise ConfigError(
                f"the estimator compares the feature entering layer {front_layers} with that "
                f"entering layer {resume}, "
                f"and in {self.backbone.name!r} they are different tensors: "
                f"{self._takes_at(front_layers)} and "
                f"{self._takes_at(resume)}. Use estimator='hold' or 'taylor'."
            )

    def _takes_at(self, layer: int) -> tuple[str, ...]:
        found = [b for b in self.lists if b.is_leading and b.first_layer <= layer]
        return found[-1].spec.takes


def bind(backbone: Backbone, transformer: nn.Module) -> BoundBackbone:
    """Finds and checks everything that the backbone names.

    Raises:
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
        for position, (spec, module) in enumerate(zip(group, modules, strict=True)):
            ports = tuple(
                _ports_of(backbone, spec, block, transformer) for block in _real_blocks(module)
            )
            lists.append(BoundList(spec, module, ports, layer, is_leading=position == 0))
        layer += len(modules[0])
    for source, target in backbone.native_skips:
        if target >= layer:
            raise _mismatch(
                backbone,
                transformer,
                f"native skip ({source}, {target}) ends past the last of {layer} layers",
            )
    return BoundBackbone(backbone, tuple(lists), layer)


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
