"""Traces a forward: which blocks of which lists were called, with what, in what order."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

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
        has_tensors: whether these are the tensors themselves, or their outlines on the meta device.
    """

    path: str
    index: int
    block: nn.Module
    inputs: dict[str, Any]
    by_position: int
    output: Any
    has_tensors: bool = True

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
def recorded(lists: dict[str, nn.ModuleList], kept: int | None = None) -> Iterator[list[BlockCall]]:
    """Records the calls of all members of the lists within a ``with`` block, in the order in which
    they ended.

    Args:
        lists: whose members are recorded.
        kept: of so many first members, and of the last two, the tensors are kept, of the others
            their outlines: a large model's would not fit the memory. None: of all.
    """
    calls: list[BlockCall] = []
    handles = []
    for path, module in lists.items():
        for index, block in enumerate(module._modules.values()):
            assert block is not None
            keeps = kept is None or index < kept or (kept > 0 and index >= len(module) - 2)
            recorder = _Recorder(path, index, calls, keeps)
            handles.append(block.register_forward_hook(recorder, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    def __init__(self, path: str, index: int, calls: list[BlockCall], keeps: bool) -> None:
        self.path, self.index, self.calls, self.keeps = path, index, calls, keeps

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        parameters = parameters_of(block)
        inputs = named_inputs(parameters, args, kwargs)
        if not self.keeps:
            inputs, output = pytree.tree_map(_outline, (inputs, output))
        call = BlockCall(self.path, self.index, block, inputs, len(args), output, self.keeps)
        self.calls.append(call)


def _outline(value: Any) -> Any:
    """A tensor on the meta device: shape and dtype alone."""
    return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value


def parameters_of(module: nn.Module) -> list[str]:
    """Names of the parameters of its class's ``forward``, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def is_tensor(value: Any) -> bool:
    """Whether it is a floating-point tensor that could flow from layer to layer."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2
