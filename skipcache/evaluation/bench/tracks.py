"""Which layers of a transformer compute at each call, whoever leaves them out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from skipcache.errors import AdapterError
from skipcache.plugins import resolve_backbone
from skipcache.runtime.layout import bind


class LayerTrack:
    """Notes, a call of the transformer at a time, the layers of which some inner module ran.

    Blocks themselves say nothing: other caches replace their forward. Their linear layers tell.
    """

    def __init__(self, transformer: nn.Module) -> None:
        """Looks up the layers now, before anything is applied.

        Raises:
            AdapterError: no adapter says what the layers are.
        """
        bound = bind(resolve_backbone(transformer, None), transformer)
        self.transformer, self.depth = transformer, bound.depth
        self._leaves: list[tuple[int, nn.Module]] = []
        for entry in bound.lists:
            for seat in entry.seats():
                linears = [m for m in seat.block.modules() if isinstance(m, nn.Linear)]
                self._leaves += [(seat.layer, linear) for linear in linears]
        self.calls: list[list[bool]] = []

    @property
    def ran(self) -> tuple[str, ...]:
        """As in ``Cell.ran``."""
        return tuple("".join("1" if layer else "0" for layer in call) for call in self.calls)

    @contextmanager
    def following(self) -> Iterator[LayerTrack]:
        """Notes for the length of a ``with`` block."""

        def begin(*_: Any) -> None:
            self.calls.append([False] * self.depth)

        def mark(layer: int) -> Any:
            def hook(*_: Any) -> None:
                if self.calls:
                    self.calls[-1][layer] = True

            return hook

        handles = [self.transformer.register_forward_pre_hook(begin)]
        handles += [leaf.register_forward_pre_hook(mark(layer)) for layer, leaf in self._leaves]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def track_of(transformer: nn.Module) -> LayerTrack | None:
    """A track, or None where no adapter knows the transformer."""
    try:
        return LayerTrack(transformer)
    except AdapterError:
        return None
