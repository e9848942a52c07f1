"""Guesses what an adapter would say of a transformer that none claims, from one traced forward.

A guess is used only after the checks have passed on it; what cannot be told is refused.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from skipcache.backbone import Backbone, BlockList, LayerLists, Timestep, Zipped
from skipcache.errors import AdapterError, SkipCacheError
from skipcache.testing.case import (
    AdapterCase,
    CheckFailure,
    CheckSkipped,
    Inputs,
    copy_of_inputs,
    seeded,
)
from skipcache.testing.checks import CHECKS_IN_PLACE, COVERED_SHARE
from skipcache.testing.trace import BlockCall, is_tensor, lists_in, parameters_of, recorded

# Methods that samplers of research code call in place of the module.
ENTRY_POINTS = ("forward_with_cfg",)
TIME_NAMES = ("timestep", "timesteps", "t", "sigma", "time")


def guess_backbone(transformer: nn.Module, inputs: Inputs, name: str = "auto") -> Backbone:
    """Traces forwards of a transformer, proposes a ``Backbone``, and checks it.

    Args:
        transformer: left as it was. Its weights must let every layer change the output.
        inputs: keyword arguments of one forward; tensors among them are varied for the checks.
        name: of the backbone.

    Returns:
        One on which every check that can be made in place has passed.

    Raises:
        AdapterError: no list of blocks through which tensors flow was found, or the checks failed
            on all that was proposed; the message says where and why.
    """
    failures: list[str] = []
    # Compiled, a block may not notice that its calls are recorded.
    with torch.compiler.set_stance("force_eager"):
        for proposal in propose_backbones(transformer, inputs, name):
            failure = _first_failure(transformer, inputs, proposal)
            if failure is None:
                return proposal
            failures.append(failure)
    raise AdapterError(
        f"{type(transformer).__qualname__!r} cannot be guessed: {failures[0]} Write an adapter, "
        "see docs/how-to/write-an-adapter.md."
    )


def propose_backbones(transformer: nn.Module, inputs: Inputs, name: str) -> list[Backbone]:
    """What the trace suggests, the proposal that covers most first; none of them is checked.

    Raises:
        AdapterError: no list of blocks through which tensors flow was found.
    """
    traced = _trace(transformer, inputs)
    if not traced:
        raise AdapterError(
            f"{type(transformer).__qualname__!r} cannot be guessed: its forward walks no "
            "nn.ModuleList of two or more blocks, each once, that hand a tensor on. Write an "
            "adapter, see docs/how-to/write-an-adapter.md."
        )
    timestep = _timestep_of(transformer, inputs)
    total = sum(entry.size for entry in traced)
    proposals = []
    for main in sorted(traced, key=lambda entry: -entry.size)[:3]:
        chain = _chain_of(main, traced)
        for lists in [chain, [main]] if chain != [main] else [chain]:
            covered = {path for entry in lists for path in entry.paths}
            always_run = [
                path
                for entry in traced
                for path in entry.paths
                if path not in covered and entry.size > COVERED_SHARE * total
            ]
            proposals.append(
                Backbone(
                    name=name,
                    lists=tuple(entry.said for entry in lists),
                    timestep=timestep,
                    entry_points=tuple(m for m in ENTRY_POINTS if hasattr(type(transformer), m)),
                    hidden_size=main.width,
                    always_run=tuple(always_run),
                )
            )
    return proposals


def _chain_of(main: _Traced, traced: list[_Traced]) -> list[_Traced]:
    """The lists before and after one that hand on to each other, in the order of execution."""
    at, chain = traced.index(main), [main]
    for following in traced[at + 1 :]:
        if _leads_to(chain[-1], following):
            chain.append(following)
    for earlier in reversed(traced[:at]):
        if _leads_to(earlier, chain[0]):
            chain.insert(0, earlier)
    return chain


def adapter_source(transformer: nn.Module, backbone: Backbone) -> str:
    """The source of an adapter module that says what the backbone says.

    Args:
        transformer: the model it is for.
        backbone: what was guessed.
    """
    kind = type(transformer).__name__
    names = {"Backbone", "BlockList", "hookimpl", "is_named"}
    names |= {"Zipped"} if any(isinstance(e, Zipped) for e in backbone.lists) else set()
    names |= {"Timestep"} if backbone.timestep is not None else set()
    fields = [
        f'name="{backbone.name}"',
        "lists=" + _tuple_source([_list_source(entry) for entry in backbone.lists]),
        "timestep=" + _timestep_source(backbone.timestep),
        "hidden_size=" + _width_source(transformer, backbone.hidden_size),
    ]
    if backbone.entry_points:
        fields.append(f"entry_points={_quoted(backbone.entry_points)}")
    if backbone.always_run:
        fields.append("always_run=" + _tuple_source([_quoted(p) for p in backbone.always_run]))
    unknown_time = (
        "    # The scale of time cannot be read off one call. A pipeline's scheduler knows it;\n"
        '    # for your own loop say Timestep("timestep", noise=1.0, clean=0.0), or as it is.\n'
    )
    return (
        f'"""{kind}, as suggested by ``skipcache suggest``."""\n\n'
        f"from skipcache import {', '.join(sorted(names))}\n\n"
        f'claims = ("{kind}",)\n\n\n'
        "@hookimpl\ndef skipcache_backbone(transformer):\n"
        f'    if not is_named(transformer, "{kind}"):\n        return None\n'
        + (unknown_time if backbone.timestep is None else "")
        + "    return Backbone(\n"
        + textwrap.indent("".join(f"{text},\n" for text in fields), " " * 8)
        + "    )\n"
    )


def _tuple_source(items: list[str]) -> str:
    return "(\n" + textwrap.indent("".join(f"{item},\n" for item in items), "    ") + ")"


def _list_source(entry: LayerLists) -> str:
    if isinstance(entry, Zipped):
        return f"Zipped({_tuple_source([_list_source(item) for item in entry.lists])})"
    words = [_quoted(entry.path)]
    if (entry.takes, entry.returns) != (("hidden_states",), "hidden_states"):
        words += [f"takes={_quoted(entry.takes)}", f"returns={_quoted(entry.returns)}"]
    if entry.blocks_per_layer != 1:
        words.append(f"blocks_per_layer={entry.blocks_per_layer}")
    line = ", ".join(words)
    return f"BlockList({line})" if len(line) < 70 else f"BlockList{_tuple_source(words)}"


def _timestep_source(timestep: Timestep | None) -> str:
    if timestep is None:
        return "None"
    return f"Timestep({_quoted(timestep.argument)}, noise={timestep.noise}, clean={timestep.clean})"


def _quoted(value: str | tuple[str | None, ...] | None) -> str:
    """As source, with double quotes."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_quoted, value))}{',' if len(value) == 1 else ''})"
    return "None" if value is None else f'"{value}"'


def _width_source(transformer: nn.Module, width: int | None) -> str:
    """Where the model says its width; the number itself where it does not."""
    for name in ("inner_dim", "hidden_size", "dim"):
        if getattr(transformer, name, None) == width:
            return f"transformer.{name}"
    return f"{width}"


@dataclass(frozen=True)
class _Traced:
    """One list, or lists that advance together, with the first and last of its calls."""

    said: LayerLists
    first: BlockCall
    last: BlockCall
    size: int

    @property
    def lists(self) -> tuple[BlockList, ...]:
        return self.said.lists if isinstance(self.said, Zipped) else (self.said,)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(spec.path for spec in self.lists)

    @property
    def width(self) -> int:
        """Of the first flowing tensor."""
        return int(self.first.inputs[self.lists[0].takes[0]].shape[-1])


def _trace(transformer: nn.Module, inputs: Inputs) -> list[_Traced]:
    lists = lists_in(transformer)
    with recorded(lists, kept=4) as calls, torch.no_grad(), seeded(0):
        transformer(**copy_of_inputs(inputs))
    counts = Counter((call.path, call.index) for call in calls)
    walked = [
        path
        for path in dict.fromkeys(call.path for call in calls)
        if len(lists[path]) > 1 and all(counts[path, i] == 1 for i in range(len(lists[path])))
    ]
    by_path = {path: [call for call in calls if call.path == path] for path in walked}
    found: dict[str, BlockList] = {}
    for path in walked:
        said = _flow_of(by_path[path])
        if said is not None and [c.index for c in by_path[path]] == list(range(len(lists[path]))):
            found[path] = said
    traced: list[_Traced] = []
    done: set[str] = set()
    order = [call.path for call in calls if call.path in found]
    for path, said in found.items():
        if path in done:
            continue
        partners = [path]
        for other in found:
            together = [p for p in order if p in (path, other)]
            if other not in partners and together == [path, other] * len(by_path[path]):
                partners.append(other)
        done.update(partners)
        size = sum(p.numel() for item in partners for p in lists[item].parameters())
        if len(partners) > 1:
            both = Zipped(tuple(found[item] for item in partners))
            last = by_path[partners[-1]][-1]
            traced.append(_Traced(both, by_path[path][0], last, size))
        else:
            traced.append(_Traced(said, by_path[path][0], by_path[path][-1], size))
    return traced


def _flow_of(calls: list[BlockCall]) -> BlockList | None:
    """What flows from each call of one list to the next; None where nothing does."""
    per_layer = 1
    kinds = [type(call.block) for call in calls]
    shapes = [next((v.shape for v in c.inputs.values() if is_tensor(v)), None) for c in calls]
    if any(len(set(of)) == 2 and of == of[:2] * (len(of) // 2) for of in (kinds, shapes)):
        per_layer = 2  # of two classes, or of one class on two layouts (Latte), in turns
    votes: Counter[tuple[str | None, ...]] = Counter()
    # The last block is not asked: it may leave out what nobody takes from it.
    pairs = [(a, b) for a, b in pairwise(calls) if a.has_tensors and b.has_tensors]
    for call, following in pairs:
        names: list[str | None] = []
        for value in call.returned:
            names.append(_heir_of(value, following, names) if is_tensor(value) else None)
        votes[tuple(names)] += 1
    agreed, count = votes.most_common(1)[0]
    if count < len(pairs) or not any(agreed):
        return None
    positions = parameters_of(calls[0].block)
    if not {name for name in agreed if name is not None} <= set(positions):
        return None  # of a forward with *args
    takes = tuple(sorted((n for n in agreed if n is not None), key=positions.index))
    returns: Any = agreed if isinstance(calls[0].output, tuple) else agreed[0]
    return BlockList(calls[0].path, takes, returns, blocks_per_layer=per_layer)


def _heir_of(value: torch.Tensor, following: BlockCall, taken: list[str | None]) -> str | None:
    """The parameter of the next block that gets a returned tensor, as it is or a little changed."""
    same = [name for name, given in following.inputs.items() if given is value]
    if same:
        return same[0]
    best, nearest = None, float("inf")
    for name, given in following.inputs.items():
        if not is_tensor(given) or name in taken or given.numel() != value.numel():
            continue
        if given.shape != value.shape and given.shape[-1] != value.shape[-1]:
            continue
        if given.shape == value.shape:
            distance = float((given.float() - value.float()).norm() / value.float().norm())
        else:  # another layout of the same numbers
            pair = (given.flatten().sort().values, value.flatten().sort().values)
            distance = float((pair[0] - pair[1]).float().norm() / value.float().norm())
        if distance < nearest:
            best, nearest = name, distance
    return best if nearest < 1.0 else None


def _leads_to(one: _Traced, other: _Traced) -> bool:
    """Whether what the last block of one returned is what the first of the other takes, as it is or
    joined along the tokens.
    """
    returned = [value for value in one.last.returned if is_tensor(value)]
    taken = [other.first.inputs.get(name) for name in other.lists[0].takes]
    given = [value for value in taken if value is not None and is_tensor(value)]
    if not returned or sum(v.numel() for v in returned) != sum(v.numel() for v in given):
        return False  # something comes in besides: one of them refines a part of the tokens
    return all(any(_holds(value, part) for part in returned) for value in given)


def _holds(whole: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether a tensor is another one, or has it at one end of its tokens."""
    if whole is part:
        return True
    if whole.dim() != part.dim() or whole.dim() != 3 or whole.shape[0] != part.shape[0]:
        return False
    if whole.shape[2] != part.shape[2] or whole.shape[1] < part.shape[1]:
        return False
    length = part.shape[1]
    scale = float(part.float().norm())
    ends = (whole[:, :length], whole[:, whole.shape[1] - length :])
    return any(float((end.float() - part.float()).norm()) < 0.5 * scale for end in ends)


def _timestep_of(transformer: nn.Module, inputs: Inputs) -> Timestep | None:
    """Where a forward is told the time, if its scale can be read off one value."""
    for name in (n for n in TIME_NAMES if n in inputs):
        value = inputs[name]
        if isinstance(value, (int, float)) or (
            isinstance(value, torch.Tensor) and value.dim() <= 1
        ):
            # Below 1 it may run from 0 to 1 or from 1 to 0; the scheduler of a pipeline knows.
            largest = float(torch.as_tensor(value).float().max())
            return Timestep(name) if largest > 1 else None
    return None


def _first_failure(transformer: nn.Module, inputs: Inputs, backbone: Backbone) -> str | None:
    """The message of the first check that fails; None where all pass."""
    case = AdapterCase(
        lambda: transformer, lambda seed: varied(inputs, seed), adapter=backbone, in_place=True
    )
    for check in CHECKS_IN_PLACE:
        try:
            check(case)
        except CheckSkipped:
            continue
        except (CheckFailure, SkipCacheError) as error:
            return f"{check.__name__} on lists {_paths(backbone)}: {error}"
        except Exception as error:  # a wrong guess can end anywhere inside the model
            return f"{check.__name__} on lists {_paths(backbone)}: {type(error).__name__}: {error}"
    return None


def _paths(backbone: Backbone) -> list[str]:
    return [
        spec.path
        for entry in backbone.lists
        for spec in (entry.lists if isinstance(entry, Zipped) else (entry,))
    ]


def varied(inputs: Mapping[str, Any], seed: int) -> Inputs:
    """Other inputs of the same shapes: noise is added to the tensors that hold features, that is to
    floating-point ones of two or more axes; seed 0 leaves all as it is.
    """
    if seed == 0:
        return dict(inputs)
    draw = torch.Generator().manual_seed(seed)

    def noisy(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and all(is_tensor(part) for part in value):
            return type(value)(noisy(part) for part in value)
        if not is_tensor(value):
            return value
        noise = torch.randn(value.shape, generator=draw).to(value.device, value.dtype)
        if value.numel() == 1:  # of which there is no deviation
            return value + noise
        return value + noise * value.float().std().nan_to_num(1.0).to(value.dtype)

    return {
        name: value if name.endswith(("mask", "ids", "rotary_emb")) else noisy(value)
        for name, value in inputs.items()
    }
