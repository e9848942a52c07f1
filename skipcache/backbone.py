"""Where: what an adapter says of a model. Frozen descriptions; no code runs in a forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeAlias

from skipcache.errors import AdapterError, ConfigError
from skipcache.presets import preset_named


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
        blocks_per_layer: blocks in a row that form one layer, entered at the first of them
            (research Latte: spatial, temporal).
        relayouts: whether the model copies what flows into another layout between blocks, and
            nowhere writes into it. Layers that are left out then hand on an outline of it, a zero
            expanded to its shape, whose relayouts are views and cost nothing.
        joins: where the one tensor that flows here is several of the list before, joined along
            their tokens (axis 1): the names of those, in that order. Estimators that compare the
            shallow feature with the deep one then work across the two lists.
        breaks: indices of blocks from which on the same names hold other tensors (the first block
            of a decoder that begins anew): such estimators do not work across them.

    Raises:
        AdapterError: an empty path, no flowing tensor, a returned name that is not taken, layers
            without a block, or joins where several tensors flow.
    """

    path: str
    takes: tuple[str, ...] = ("hidden_states",)
    returns: str | tuple[str | None, ...] = "hidden_states"
    blocks_per_layer: int = 1
    relayouts: bool = False
    joins: tuple[str, ...] = ()
    breaks: tuple[int, ...] = ()

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
        if type(self.blocks_per_layer) is not int or self.blocks_per_layer < 1:
            raise AdapterError(
                f"BlockList {self.path!r}: blocks_per_layer={self.blocks_per_layer!r}. It is a "
                "whole number, at least 1."
            )
        if self.joins and (isinstance(self.joins, str) or len(self.takes) != 1):
            raise AdapterError(
                f"BlockList {self.path!r}: joins={self.joins!r} is a tuple of names, for a list in "
                f"which one tensor flows, not {self.takes!r}."
            )

    @property
    def returned(self) -> tuple[str | None, ...]:
        """``returns`` as a tuple, also where it is a bare tensor."""
        return (self.returns,) if isinstance(self.returns, str) else tuple(self.returns)

    def form_from(self, earlier: BlockList) -> tuple[int, ...] | None:
        """How what flows in an earlier list gets the form of what flows in this one.

        Returns:
            Indices of the earlier list's tensors that are to be joined along their tokens; none of
            them where the tensors are the same; None where they cannot be compared.
        """
        if earlier == self or (earlier.takes == self.takes and not self.joins):
            return ()
        if self.joins and set(self.joins) <= set(earlier.takes):
            return tuple(earlier.takes.index(name) for name in self.joins)
        return None


@dataclass(frozen=True)
class Zipped:
    """Lists that advance together: layer i is block i of each, run in this order (Latte: spatial,
    temporal).

    Features are captured and injected where the first list's block is entered.

    Raises:
        AdapterError: fewer than two lists, or one with several blocks a layer.
    """

    lists: tuple[BlockList, ...]

    def __post_init__(self) -> None:
        if len(self.lists) < 2 or not all(isinstance(item, BlockList) for item in self.lists):
            raise AdapterError(f"Zipped needs at least two BlockLists, found {self.lists!r}.")
        if any(item.blocks_per_layer != 1 for item in self.lists):
            raise AdapterError(
                "Zipped lists give one block each to a layer, so blocks_per_layer is 1 in all of "
                f"them; found {self.lists!r}."
            )


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


@dataclass(frozen=True)
class InputSize:
    """A size that the model was made for, of an argument of the transformer's ``forward``.

    A cached model that is given another one refuses before its first layer, and says why, where it
    would fail somewhere inside by itself.

    Attributes:
        argument: parameter of the transformer's ``forward``; None and what has no such axis pass.
        axis: of the tensor; None for the number of tensors in a list.
        allowed: the sizes that it can have.
        what: what is counted, for the error: ``"frames"``.
        unless_false: another parameter, a bool that is True by default; given as False, any size
            goes.

    Raises:
        AdapterError: no size is allowed.
    """

    argument: str
    axis: int | None
    allowed: tuple[int, ...]
    what: str
    unless_false: str | None = None

    def __post_init__(self) -> None:
        if not self.allowed:
            raise AdapterError(f"InputSize of {self.argument!r}: allowed is empty.")


@dataclass(frozen=True)
class WholeCall:
    """Calls of the transformer that are no denoising step: those that fill a cache of keys and
    values, for example. Such a call runs every layer and is not counted.

    Attributes:
        argument: parameter of the transformer's ``forward`` that tells.
        value: what it is then: a string, number or bool.
        item: the key to look under, where the argument is a dict.

    Raises:
        AdapterError: the value is none that can be compared at once.
    """

    argument: str
    value: str | int | float | bool
    item: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.value, (str, int, float, bool)):
            raise AdapterError(
                f"WholeCall of {self.argument!r}: value is {self.value!r}. It is a string, a "
                "number or a bool."
            )


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
        preset: name of the settings (``skipcache.presets``) that its released models with skip
            branches were shown with, if any: the default where such branches are at work.
        input_sizes: sizes of the forward's arguments that the model was made for, where another
            would end in an error that does not say so.
        whole_calls: how to tell calls that are no denoising step.
        interleaved: lists whose members the forward calls by index between the blocks, adding what
            they return to what flows (face adapters). Those between layers that are left out are
            left out too: they return zeros in the shape of the first tensor that they take.
        always_run: paths of other lists of blocks that the forward walks and that are left alone on
            purpose: refiners, control branches.

    Raises:
        AdapterError: a field of the wrong kind, a skip that does not go forward, or a preset that
            does not exist.
    """

    name: str
    lists: tuple[LayerLists, ...]
    timestep: Timestep | None = field(default_factory=Timestep)
    entry_points: tuple[str, ...] = ()
    native_skips: tuple[tuple[int, int], ...] = ()
    hidden_size: int | None = None
    branch_weights: str | None = None
    preset: str | None = None
    input_sizes: tuple[InputSize, ...] = ()
    whole_calls: tuple[WholeCall, ...] = ()
    interleaved: tuple[BlockList, ...] = ()
    always_run: tuple[str, ...] = ()

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
        if self.preset is not None:
            try:
                preset_named(self.preset)
            except ConfigError as error:
                raise AdapterError(f"Backbone {self.name!r}: {error}") from None


def is_named(transformer: object, *names: str) -> bool:
    """Whether its class, or one that it derives from, has one of these names.

    For adapters, which match by name: the model's own package need not be imported.

    Args:
        transformer: any object.
        *names: class names without their modules: ``"FluxTransformer2DModel"``.
    """
    return not {kind.__name__ for kind in type(transformer).__mro__}.isdisjoint(names)
