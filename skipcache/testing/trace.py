"""Traces a forward: which blocks of which lists were called, with what, in what order."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from skipcache.testing.case import named_inputs


@dataclass(frozen=True)
class BlockCall:
    """One call of one member of a list.

    Attributes:
        path: of the list, as in ``BlockList.path``.
        index: of the block in it.
        block: the block.
        inputs: its arguments by parameter name.
        by_position: how many of them were passed by position.
        output: what it returned.
    """

    path: str
    index: int
    block: nn.Module
    inputs: dict[str, Any]
    by_position: int
    output: Any

    @property
    def returned(self) -> tuple[Any, ...]:
        """What it returned as a tuple, also where that is a bare tensor."""
        return self.output if isinstance(self.output, tuple) else (self.output,)


def lists_in(transformer: nn.Module, named: Iterable[str] = ()) -> dict[str, nn.ModuleList]:
    """Every ``nn.ModuleList`` that is not inside a member of another, by path; of one that has a
    named list inside, those inside in its place.
    """
    found: dict[str, nn.ModuleList] = {}
    for path, module in transformer.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and not any(path.startswith(f"{outer}.") for outer in found)
            and not any(name.startswith(f"{path}.") for name in named)
        ):
            found[path] = module
    return found


@contextmanager
def recorded(lists: dict[str, nn.ModuleList]) -> Iterator[list[BlockCall]]:
    """Records the calls of all members of the lists within a ``with`` block, in the order in which
    they ended.
    """
    calls: list[BlockCall] = []
    handles = []
    for path, module in lists.items():
        for index, block in enumerate(module._modules.values()):
            assert block is not None
            handles.append(
                block.register_forward_hook(_Recorder(path, index, calls), with_kwargs=True)
            )
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    def __init__(self, path: str, index: int, calls: list[BlockCall]) -> None:
        self.path, self.index, self.calls = path, index, calls

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        parameters = parameters_of(block)
        inputs = named_inputs(parameters, args, kwargs)
        self.calls.append(BlockCall(self.path, self.index, block, inputs, len(args), output))


def parameters_of(module: nn.Module) -> list[str]:
    """Names of the parameters of its class's ``forward``, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def is_tensor(value: Any) -> bool:
    """Whether it is a floating-point tensor that could flow from layer to layer."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2
