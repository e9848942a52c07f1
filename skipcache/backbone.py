"""Where: what an adapter says of a model. Frozen descriptions; no code runs in a forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeAlias

from skipcache.errors import AdapterError


@dataclass(frozen=True)
class BlockList:
    """One ``nn.ModuleList`` of repeated blocks that the transformer's forward iterates.

    Attributes:
        path: dotted attribute path from the transformer, for example ``"transformer_blocks"``.
        takes: names of the parameters of the block's ``forward`` through which tensors flow from
            layer to layer. The model may pass them by position or by keyword, in any order.
        returns: what a block returns: one name (a bare tensor) or a tuple of them in the returned
            order. Names are those of ``takes``; ``None`` stands for a place where the block returns
            None.

    Raises:
        AdapterError: an empty path, no flowing tensor, or a returned name that is not taken.
    """

    path: str
    takes: tuple[str, ...] = ("hidden_states",)
    returns: str | tuple[str | None, ...] = "hidden_states"

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise AdapterError(
                f"BlockList path is {self.path!r}. It is an attribute path such as "
                "'transformer_blocks'."
            )
        if isinstance(self.takes, str) or not self.takes or len(set(self.takes)) != len(self.takes):
            raise AdapterError(
                f"BlockList {self.path!r}: takes={self.takes!r}. It is a tuple of distinct "
                "parameter names of the "
                "block's forward, at least one: ('hidden_states',)."
            )
        names = {name for name in self.returned if name is not None}
        if not names or not names <= set(self.takes):
            raise AdapterError(
                f"BlockList {self.path!r}: returns={self.returns!r} must name tensors that it "
                f"takes: {self.takes!r}."
            )

    @property
    def returned(self) -> tuple[str | None, ...]:
        """``returns`` as a tuple, also where it is a bare tensor."""
        return (self.returns,) if isinstance(self.returns, str) else tuple(self.returns)


@dataclass(frozen=True)
class Zipped:
    """Lists that advance together: layer i is block i of each, run in this order (Latte: spatial,
    temporal).

    Features are captured and injected where the first list's block is entered.

    Raises:
        AdapterError: fewer than two lists.
    """

    lists: tuple[BlockList, ...]

    def __post_init__(self) -> None:
        if len(self.lists) < 2 or not all(isinstance(item, BlockList) for item in self.lists):
            raise AdapterError(f"Zipped needs at least two BlockLists, found {self.lists!r}.")


@dataclass(frozen=True)
class Timestep:
    """How a transformer is told the time, used where no scheduler is there to ask.

    Attributes:
        argument: parameter of the transformer's ``forward`` that holds it, a number or a tensor.
        noise: the value at pure noise: 1000 for most, 1 for models that take t / 1000.
        clean: the value at no noise. Models that take 1 - t have ``noise=0.0, clean=1.0``.

    Raises:
        AdapterError: the two values are equal or not finite.
    """

    argument: str = "timestep"
    noise: float = 1000.0
    clean: float = 0.0

    def __post_init__(self) -> None:
        if not (
            math.isfinite(self.noise) and math.isfinite(self.clean) and self.noise != self.clean
        ):
            raise AdapterError(
                f"Timestep(noise={self.noise!r}, clean={self.clean!r}): two different finite "
                "numbers are needed."
            )

    def normalise(self, value: float) -> float:
        """The value as a normalised time: 1 = pure noise, 0 = clean."""
        return (value - self.clean) / (self.noise - self.clean)


LayerLists: TypeAlias = BlockList | Zipped


@dataclass(frozen=True)
class Backbone:
    """All that skipcache needs to know of one transformer.

    Attributes:
        name: plugin id of the adapter, for example ``"dit_xl"``.
        lists: block lists in execution order; each a ``BlockList``, or a ``Zipped`` group forming
            one layer.
        timestep: how the forward is told the time; None when it is not.
        entry_points: other methods that a sampler calls in place of the module
            (``forward_with_cfg``).
        native_skips: pairs (source layer, target layer) of skip branches that the model was born
            with.
        hidden_size: width C of the first flowing tensor, if known.
        branch_weights: hub id or folder of known skip-branch weights, if any.

    Raises:
        AdapterError: a field of the wrong kind, or a skip that does not go forward.
    """

    name: str
    lists: tuple[LayerLists, ...]
    timestep: Timestep | None = field(default_factory=Timestep)
    entry_points: tuple[str, ...] = ()
    native_skips: tuple[tuple[int, int], ...] = ()
    hidden_size: int | None = None
    branch_weights: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise AdapterError(
                f"Backbone name is {self.name!r}. It is the adapter's id, such as 'dit_xl'."
            )
        if (
            not isinstance(self.lists, tuple)
            or not self.lists
            or not all(isinstance(item, (BlockList, Zipped)) for item in self.lists)
        ):
            raise AdapterError(
                f"Backbone {self.name!r}: lists={self.lists!r}. It is a tuple of BlockList or "
                "Zipped, at least one."
            )
        if self.timestep is not None and not isinstance(self.timestep, Timestep):
            raise AdapterError(
                f"Backbone {self.name!r}: timestep={self.timestep!r} is not a Timestep or None."
            )
        for source, target in self.native_skips:
            if not 0 <= source < target:
                raise AdapterError(
                    f"Backbone {self.name!r}: native skip ({source}, {target}) does not go from a "
                    "layer to a later one."
                )
