"""How smooth a model is along its sampling: the change of every layer's output between neighbouring
denoising steps (arXiv:2411.17616, stability analysis).
"""

from __future__ import annotations

import csv
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from skipcache.api import is_skip_cached
from skipcache.backbone import Backbone
from skipcache.errors import ConfigError, TargetError
from skipcache.plugins import resolve_backbone
from skipcache.runtime.blocklist import Ports
from skipcache.runtime.clock import Clock
from skipcache.runtime.layout import BoundBackbone, bind
from skipcache.runtime.store import Run
from skipcache.targets import is_module, transformers_of

Array: TypeAlias = npt.NDArray[np.float64]
Compare: TypeAlias = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True, eq=False)
class Smoothness:
    """How much each layer's output changed between neighbouring steps of one run.

    Attributes:
        similarity: [L, S - 1], cosine similarity; column j compares step j + 1 with step j. NaN
            where a layer did not run at both.
        change: [L, S - 1], relative L1 change: mean|now - before| / mean|before|.
        times: [S], normalised time of each step, 1 = noise.
    """

    similarity: Array
    change: Array
    times: Array

    def save_csv(self, folder: str | Path, name: str = "smoothness") -> Path:
        """Writes ``name.csv``: layer, step (the later of the two), its time, similarity, change.

        Args:
            folder: created if need be.
            name: of the file, without its ending.
        """
        rows = (
            (layer, step + 1, self.times[step + 1], value, self.change[layer, step])
            for (layer, step), value in np.ndenumerate(self.similarity)
        )
        header = ("layer", "step", "time", "similarity", "relative_l1_change")
        return write_csv(Path(folder) / f"{name}.csv", header, rows)


def measure_smoothness(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    seed: int = 0,
    adapter: str | Backbone | object | None = None,
    component: str = "transformer",
) -> Smoothness:
    """Samples once, uncached, and compares every layer's output with that of the step before.

    A layer's output is its first flowing tensor. Compared are the entries of the first dimension
    (pictures and guidance passes of a batch), each as one vector; the values are means over them
    and over the calls of a step. One earlier output of every layer is kept while it runs.

    Args:
        pipe: a diffusers pipeline, compiled or not.
        call: keywords of the one call, ``pipe(**call)``.
        seed: of the noise, where ``call`` brings no generator; the global generators are left as
            they were.
        adapter: the name of an adapter, a ``Backbone``, or a plugin; default: the adapter that
            claims the model.
        component: name of the transformer in the pipeline.

    Raises:
        ConfigError: a cache is applied, ``call`` is no mapping, or there are no two steps to
            compare.
        TargetError: the pipeline has no such transformer.
        AdapterError: no adapter claims the model (``NoAdapterError``), or it does not fit.
    """
    transformer, bound = find_transformer(pipe, component, adapter)
    watch = StepWatch(pipe, transformer, bound)
    changes: dict[tuple[int, int], list[torch.Tensor]] = {}
    previous: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}

    def compare(layer: int, output: torch.Tensor) -> None:
        if not watch.is_watching:
            return
        step, earlier = watch.step, previous.get((layer, watch.index))
        is_next = earlier is not None and earlier[0] == step - 1
        if earlier is not None and is_next and earlier[1].shape == output.shape:
            pair = torch.stack([similarity_of(output, earlier[1]), change_of(output, earlier[1])])
            changes.setdefault((layer, step), []).append(pair)
        # A copy: the next block may work in place.
        previous[layer, watch.index] = (step, output.detach().clone())

    handles = []
    try:
        for layer, (block, ports) in _last_blocks(bound).items():
            handles.append(block.register_forward_hook(_OutputHook(layer, ports, compare)))
        with watch:
            sample(pipe, call, seed)
    finally:
        for handle in handles:
            handle.remove()
    if not changes:
        raise ConfigError(
            f"{type(pipe).__qualname__!r} ran the layers of its {component!r} in no two "
            f"neighbouring steps (its scheduler has {len(watch.times)}). Ask for two or more: "
            "num_inference_steps."
        )
    values = np.full((2, bound.depth, len(watch.times) - 1), np.nan)
    for (layer, step), pairs in changes.items():
        values[:, layer, step - 1] = torch.stack(pairs).mean(dim=0).cpu().numpy()
    return Smoothness(values[0], values[1], np.array(watch.times))


class _OutputHook:
    """Forward hook of the block that ends a layer: hands its first flowing tensor on."""

    def __init__(self, layer: int, ports: Ports, compare: Compare) -> None:
        self.layer, self.compare = layer, compare
        flowing = [place for place, index in enumerate(ports.returns) if index is not None]
        self.place = ports.returns.index(0) if 0 in ports.returns else flowing[0]
        self.is_bare = ports.is_bare

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.compare(self.layer, output if self.is_bare else output[self.place])


def _last_blocks(bound: BoundBackbone) -> dict[int, tuple[nn.Module, Ports]]:
    """By layer, the block that it ends with (of zipped lists the last), and its ports."""
    return {seat.layer: (seat.block, seat.ports) for e in bound.lists for seat in e.seats()}


class StepWatch:
    """Knows, in every forward of a pipeline's transformer, which step it is and which call of it.

    A context manager, and a forward pre-hook of the transformer while it is entered. The first run
    of the sampler is watched; forwards of a later one are not.

    Attributes:
        step: index of the step, from 0.
        index: of the call within its step; guidance passes are calls of their own in many
            pipelines.
        is_watching: whether the forward under way belongs to the run.
    """

    def __init__(self, pipe: Any, transformer: nn.Module, bound: BoundBackbone) -> None:
        parameters = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self.clock = Clock(bound.backbone.timestep, parameters, needs_times=True)
        self.pipe, self.transformer = pipe, transformer
        self.step, self.index, self.is_watching = 0, 0, False
        self.run: Run | None = None

    def __enter__(self) -> StepWatch:
        self.clock.attach(self.pipe)
        self._handle = self.transformer.register_forward_pre_hook(self, with_kwargs=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()
        self.clock.release()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        located = self.clock.locate(args, kwargs)
        if located is None:
            raise ConfigError(
                f"it cannot be told which step of {type(self.pipe).__qualname__!r} this call of "
                f"its {type(module).__qualname__!r} belongs to: the pipeline has no scheduler that "
                "tells."
            )
        run = located[0]
        self.run = self.run or run
        self.is_watching = run is self.run and run.step < len(run.times)
        self.step, self.index = run.step, sum(run.calls.values()) - 1

    @property
    def times(self) -> list[float]:
        """Normalised times of the steps, 1 = noise, as far as known: of all where planned."""
        return self.run.times if self.run is not None else []


def find_transformer(
    pipe: Any, component: str, adapter: str | Backbone | object | None
) -> tuple[nn.Module, BoundBackbone]:
    """The transformer of a pipeline, unwrapped from ``torch.compile``, and its layers.

    Raises:
        TargetError, ConfigError, AdapterError: as ``measure_smoothness``.
    """
    if is_module(pipe):
        raise TargetError(
            f"{type(pipe).__qualname__!r} is a bare module. Smoothness is measured in a pipeline's "
            "own sampling loop; pass the pipeline that it is part of."
        )
    found = transformers_of(pipe)
    if component not in found:
        raise TargetError(
            f"{type(pipe).__qualname__!r} has no transformer named {component!r}. Pass one of: "
            f"component={' or '.join(map(repr, found))}."
        )
    transformer = found[component]
    if is_skip_cached(transformer):
        raise ConfigError(
            f"a cache is applied to {type(transformer).__qualname__!r}, and a reused feature would "
            "look smooth. Call remove_skip_cache(pipe) first."
        )
    return transformer, bind(resolve_backbone(transformer, adapter), transformer)


def sample(pipe: Any, call: Mapping[str, Any], seed: int) -> None:
    """Calls the pipeline once, in eager mode (hooks are not part of compiled code).

    Raises:
        ConfigError: ``call`` is no mapping of keywords, or not of those that the pipeline takes.
    """
    if not isinstance(call, Mapping):
        raise ConfigError(
            f"call is {call!r}. It is the keywords of one call of the pipeline: "
            "{'prompt': 'a fox', 'num_inference_steps': 20}."
        )
    signature = inspect.signature(pipe.__call__)
    try:
        signature.bind(**call)
    except TypeError as error:
        raise ConfigError(
            f"call does not fit {type(pipe).__qualname__!r}: {error}. It takes: "
            f"{', '.join(signature.parameters)}."
        ) from None
    keywords = dict(call)
    if "generator" in signature.parameters:
        keywords.setdefault("generator", torch.Generator().manual_seed(seed))
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), torch.no_grad():
        torch.manual_seed(seed)  # some schedulers draw without a generator
        pipe(**keywords)


def similarity_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of each entry of the first dimension, as one vector each; their mean.

    Exactly 1 for equal tensors, two of zeros included; 0 if only one is zero.
    """
    a, b = a.detach().flatten(1).float(), b.detach().flatten(1).float()
    dot, aa, bb = ((x * y).sum(dim=1, dtype=torch.float64) for x, y in ((a, b), (a, a), (b, b)))
    scale = (aa * bb).sqrt()
    return torch.where(scale == 0, (aa == bb).double(), dot / scale).mean()


def change_of(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Relative L1 change, mean|now - before| / mean|before|, of each entry of the first dimension;
    their mean. Infinite where only ``before`` is zero.
    """
    now, before = now.detach().flatten(1).float(), before.detach().flatten(1).float()
    moved = (now - before).abs().sum(dim=1, dtype=torch.float64)
    size = before.abs().sum(dim=1, dtype=torch.float64)
    return torch.where(moved == 0, moved, moved / size).mean()


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> Path:
    """Writes a CSV file; floats in full precision. Creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path
