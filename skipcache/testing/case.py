"""What is checked: a transformer, what to call it with, and the adapter's word for it."""

from __future__ import annotations

import copy
import math
import unittest
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from skipcache import api
from skipcache.backbone import Backbone
from skipcache.errors import ConfigError, SkipCacheError
from skipcache.plugins import resolve_backbone
from skipcache.runtime.layout import BoundBackbone, bind

Inputs = dict[str, Any]

SPANS_IN_PLACE = 6  # of a model too large to copy, which is likely slow too


class CheckFailure(AssertionError):
    """A check found the adapter wrong; the message says how."""


class CheckSkipped(unittest.SkipTest):
    """A check does not apply; pytest and unittest count it as skipped."""


@dataclass(frozen=True)
class AdapterCase:
    """A transformer of one class with what the checks need to run it.

    Attributes:
        make_transformer: builds the transformer, the same one each time, on the CPU or elsewhere;
            small is fine, but with at least four layers, and weights that let every layer change
            the output: many classes start with gates at zero. It is put into eval mode.
        make_inputs: one forward's keyword arguments, the timestep about the middle of its scale
            among them, drawn from the seed it is given: the same for one seed, others of the same
            shapes for another.
        make_other_inputs: the same of another shape (batch or resolution), for the check of a
            shape that changes within a run; None: that check is skipped.
        adapter: the name of an adapter, a ``Backbone`` or a plugin; None: the installed adapter
            that claims the transformer.
        seed: seeds torch before the transformer is built.
        in_place: check the very transformer that ``make_transformer`` gives instead of copies, for
            those too large to copy; the checks of ``CHECKS_IN_PLACE`` leave it as it was.
    """

    make_transformer: Callable[[], nn.Module]
    make_inputs: Callable[[int], Inputs]
    make_other_inputs: Callable[[int], Inputs] | None = None
    adapter: str | Backbone | object | None = None
    seed: int = 0
    in_place: bool = False

    @cached_property
    def _built(self) -> nn.Module:
        with seeded(self.seed):
            transformer = self.make_transformer()
        return transformer if self.in_place else transformer.eval()

    def build(self) -> nn.Module:
        """A transformer of one's own."""
        return self._built if self.in_place else copy.deepcopy(self._built)

    @cached_property
    def backbone(self) -> Backbone:
        """The adapter's word for it."""
        return resolve_backbone(self._built, self.adapter)

    def bind(self, transformer: nn.Module) -> BoundBackbone:
        """The backbone on one transformer, every word of it checked."""
        return bind(self.backbone, transformer)

    @cached_property
    def depth(self) -> int:
        """Number of layers, L."""
        return self.bind(self._built).depth

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """(front, back) layers to check: every place to resume at after one front layer, and every
        place to leave off at before one back layer.
        """
        if self.depth < 3:
            raise CheckFailure(
                f"{self.depth} layers: build a transformer with at least four, so that there is "
                "something to leave out."
            )
        wanted = [(1, back) for back in range(1, self.depth - 1)]
        wanted += [(front, 1) for front in range(self.depth - 1) if front != 1]
        wanted += [(0, 0), (1, 0), (self.depth - 1, 0)]
        bound = self.bind(self._built)
        allowed = [pair for pair in wanted if _is_allowed(bound, *pair)]
        if self.in_place and len(allowed) > SPANS_IN_PLACE:
            every = len(allowed) / SPANS_IN_PLACE
            return [allowed[int(i * every)] for i in range(SPANS_IN_PLACE)]
        return allowed

    @cached_property
    def span(self) -> tuple[int, int]:
        """The (front, back) with the longest deep span that leaves a front."""
        return self.spans[0]

    def at_noise(self, seed: int, time: float = 0.5) -> Inputs:
        """Inputs at a normalised time, 1 = noise."""
        return self.at_time(self.make_inputs(seed), time)

    def at_time(self, inputs: Inputs, time: float) -> Inputs:
        """The same inputs at another normalised time, where the model is told it."""
        scale = self.backbone.timestep
        if scale is None or scale.argument not in inputs:
            return inputs
        value = scale.clean + time * (scale.noise - scale.clean)
        given = inputs[scale.argument]
        told: Any = value
        if isinstance(given, torch.Tensor):
            told = torch.full_like(given, value)
        return {**inputs, scale.argument: told}

    @torch.no_grad()
    def run(self, transformer: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
        """One forward; the tensors in what it returned. Noise that the model draws is seeded, and
        the caller's random state is left as it was.
        """
        with seeded(self.seed):
            return tensors_in(transformer(**copy_of_inputs(inputs)))

    def cached(
        self, transformer: nn.Module, span: tuple[int, int] | None = None, **options: Any
    ) -> AbstractContextManager[nn.Module]:
        """The cache on the transformer for a ``with`` block; the longest deep span and ``hold``
        unless told otherwise.
        """
        front, back = span or self.span
        layers = {"front_layers": front, "back_layers": back}
        return api.skip_cache(
            transformer, adapter=self.backbone, **{"estimator": "hold", **layers, **options}
        )

    def run_of(
        self, transformer: nn.Module, steps: int, streams: int = 1
    ) -> AbstractContextManager[nn.Module]:
        """One run of a cached transformer for a ``with`` block, its times on the model's scale."""
        scale = self.backbone.timestep
        noise, clean = (1000.0, 0.0) if scale is None else (scale.noise, scale.clean)
        times = [noise + (clean - noise) * i / steps for i in range(steps)]
        return api.skip_cache_run(transformer, streams, times)


def _is_allowed(bound: BoundBackbone, front: int, back: int) -> bool:
    try:
        bound.check_layers(front, back, needs_shallow=False)
    except ConfigError:
        return False
    return True


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds every random state for a ``with`` block, and puts the caller's back after it."""
    has_cuda = torch.cuda.is_initialized()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if has_cuda else ()):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed reaches devices not in use
        if has_cuda:
            torch.cuda.manual_seed_all(seed)
        yield


def tensors_in(output: Any) -> list[torch.Tensor]:
    """Every tensor of a nested output, in order."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    leaves = pytree.tree_leaves(output)
    return [leaf.detach().clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def copy_of_inputs(inputs: Inputs) -> Inputs:
    """Lists and dicts of one's own: some forwards empty those that they are given."""
    return {
        name: copy.copy(value) if isinstance(value, (list, dict)) else value
        for name, value in inputs.items()
    }


def largest_difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Over all tensors, relative to the largest magnitude of each; inf where shapes or NaNs
    differ.
    """
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if not one.is_floating_point() or torch.equal(one, other):
            worst = max(worst, 0.0 if torch.equal(one, other) else float("inf"))
            continue
        difference = float((one.double() - other.double()).abs().max())
        scale = float(other.double().abs().max())
        ratio = difference / scale if scale > 0 else float("inf")
        worst = max(worst, float("inf") if math.isnan(ratio) else ratio)
    return worst


def require_equal(found: list[torch.Tensor], expected: list[torch.Tensor], message: str) -> None:
    """Bit for bit.

    Raises:
        CheckFailure: they are not, with the message and by how much.
    """
    difference = largest_difference(found, expected)
    if difference > 0:
        raise CheckFailure(f"{message} (relative difference {difference:.2g})")


@dataclass(frozen=True)
class Check:
    """One named check of one case. Call it: it returns, or raises.

    Attributes:
        name: ``"check_remove_restores"``, for example.
        function: the check itself.
        case: what it is run on.
        expected_failure: why it is known to fail, if it is.

    Raises:
        CheckFailure: when called, if the adapter is wrong, or if a failure was expected and did not
            come.
        CheckSkipped: when called, if the check does not apply, or failed as expected.
    """

    name: str
    function: Callable[[AdapterCase], None] = field(repr=False)
    case: AdapterCase = field(repr=False)
    expected_failure: str | None = None

    def __str__(self) -> str:
        return self.name

    def __call__(self) -> None:
        try:
            self.function(self.case)
        except CheckSkipped:
            raise
        except Exception as error:
            if self.expected_failure is not None:
                raise CheckSkipped(f"fails as expected: {self.expected_failure}") from error
            if isinstance(error, (CheckFailure, SkipCacheError)):
                raise
            raise CheckFailure(f"{type(error).__name__}: {error}") from error
        if self.expected_failure is not None:
            raise CheckFailure(
                f"{self.name} was expected to fail ({self.expected_failure}) and passes. Take it "
                "out of expected_failures."
            )


def named_inputs(
    parameters: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """A call's arguments by name, whichever way they were passed."""
    return {**dict(zip(parameters, args, strict=False)), **kwargs}
