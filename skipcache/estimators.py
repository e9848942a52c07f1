"""What: the value that a reuse step takes for the deep feature.

An estimator is one small class. It is asked in two parts, so that whole-model compilation sees
tensors only: ``prepare`` runs before the forward and may look at step numbers and history;
``estimate`` runs inside it, where the shallow feature of the step is known, and is plain tensor
arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from skipcache.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

Tensors: TypeAlias = "tuple[torch.Tensor | None, ...]"
"""The tensors that flow between two layers, in the order of the adapter's ``takes``; None where a
model passes None.
"""


@dataclass(frozen=True, slots=True)
class Refresh:
    """What one refresh step left behind in one stream.

    Attributes:
        step: index of the step in its run.
        time: its normalised time, 1 = noise; NaN where unknown.
        deep: the deep feature, each tensor for example [B, T, C].
        shallow: the shallow feature; None unless the estimator has ``needs_shallow``.
    """

    step: int
    time: float
    deep: Tensors
    shallow: Tensors | None


@runtime_checkable
class Estimator(Protocol):
    """Estimates the deep feature of a reuse step. Implementations are immutable and hold no state
    of a run.
    """

    @property
    def history(self) -> int:
        """How many past refreshes it looks at; the store keeps no more."""
        ...

    @property
    def needs_shallow(self) -> bool:
        """Whether it needs the shallow feature, of the refreshes and of the step itself."""
        ...

    def prepare(self, refreshes: Sequence[Refresh], step: int, time: float) -> tuple[Tensors, ...]:
        """Everything that does not need this step's shallow feature.

        Args:
            refreshes: at least one and at most ``history`` refreshes of this run and stream, newest
                last.
            step: index of this step.
            time: normalised time of this step, NaN where unknown.
        """
        ...

    def estimate(self, prepared: tuple[Tensors, ...], shallow: Tensors | None) -> Tensors:
        """The deep feature: new tensors, of the shapes and dtypes of the cached ones."""
        ...


@runtime_checkable
class PlannedEstimator(Estimator, Protocol):
    """An estimator that prepares itself for a run whose steps and refreshes are known ahead."""

    def for_run(self, times: Sequence[float], plan: Sequence[bool]) -> Estimator:
        """What prepares in its place in a run; all else stays its own.

        Args:
            times: normalised, one a step.
            plan: whether the step refreshes. Where refreshes are added to it on the way, it is
                asked again.
        """
        ...


@dataclass(frozen=True)
class Hold:
    """The deep feature of the last refresh, unchanged (Skip-Cache, arXiv:2411.17616). Keeps one
    feature a stream.
    """

    history = 1
    needs_shallow = False

    def prepare(self, refreshes: Sequence[Refresh], step: int, time: float) -> tuple[Tensors, ...]:
        return (refreshes[-1].deep,)

    def estimate(self, prepared: tuple[Tensors, ...], shallow: Tensors | None) -> Tensors:
        # A copy: a block that works in place must not write into the cache.
        return tuple(None if held is None else held.clone() for held in prepared[0])


@dataclass(frozen=True)
class Residual:
    """The last deep feature moved by what the shallow one has moved since: deep_r + (shallow_t -
    shallow_r).

    What FBCache and DBCache do at block level. Keeps two features a stream.
    """

    history = 1
    needs_shallow = True

    def prepare(self, refreshes: Sequence[Refresh], step: int, time: float) -> tuple[Tensors, ...]:
        last = refreshes[-1]
        assert last.shallow is not None
        return last.deep, last.shallow

    def estimate(self, prepared: tuple[Tensors, ...], shallow: Tensors | None) -> Tensors:
        assert shallow is not None
        return tuple(
            None
            if deep is None or now is None or then is None
            else (deep + (now - then)).to(deep.dtype)
            for deep, then, now in zip(*prepared, shallow, strict=True)
        )


@dataclass(frozen=True)
class Taylor:
    """The polynomial through the last ``order`` + 1 deep features, extrapolated in step distance.

    The finite-difference form of TaylorSeer (arXiv:2503.06923), written for refreshes at any
    spacing: exact on a feature that is a polynomial of the step index of at most that degree. While
    fewer refreshes are cached the order is lower. Keeps ``order`` + 1 features a stream.

    Attributes:
        order: at least 0; 0 is ``hold``.

    Raises:
        ConfigError: an order that is not a whole number from 0.
    """

    order: int = 1

    needs_shallow = False

    def __post_init__(self) -> None:
        if not isinstance(self.order, int) or isinstance(self.order, bool) or self.order < 0:
            raise ConfigError(
                f"taylor order is {self.order!r}. It is a whole number from 0; 1 is usual."
            )

    @property
    def history(self) -> int:
        return self.order + 1

    def prepare(self, refreshes: Sequence[Refresh], step: int, time: float) -> tuple[Tensors, ...]:
        weights = extrapolation_weights([refresh.step for refresh in refreshes], step)
        return (weighted_sums(weights, [refresh.deep for refresh in refreshes]),)

    def estimate(self, prepared: tuple[Tensors, ...], shallow: Tensors | None) -> Tensors:
        return prepared[0]


def extrapolation_weights(steps: Sequence[float], step: float) -> list[float]:
    """Lagrange weights: the value at ``step`` of the polynomial through the points at ``steps``,
    one weight a point.

    >>> extrapolation_weights([2, 4], 5)
    [-0.5, 1.5]
    """
    weights = []
    for own in steps:
        weight = 1.0
        for other in steps:
            if other != own:
                weight *= (step - other) / (own - other)
        weights.append(weight)
    return weights


def weighted_sums(weights: Sequence[float], terms: Sequence[Tensors]) -> Tensors:
    """The sum of the terms, each times its weight, tensor by tensor; where one is None, so is the
    sum. Sums in at least fp32 (weights exceed 1 and cancel); returns the dtypes of the terms.
    """
    return tuple(_weighted_sum(weights, column) for column in zip(*terms, strict=True))


def _weighted_sum(
    weights: Sequence[float], column: Sequence[torch.Tensor | None]
) -> torch.Tensor | None:
    import torch

    total: torch.Tensor | None = None
    for weight, term in zip(weights, column, strict=True):
        if term is None:
            return None
        wide = term.to(torch.promote_types(term.dtype, torch.float32))
        total = wide * weight if total is None else total.add_(wide, alpha=weight)
    assert total is not None
    assert column[0] is not None
    return total.to(column[0].dtype)


_NAMED: dict[str, type[Hold] | type[Residual] | type[Taylor]] = {
    "hold": Hold,
    "residual": Residual,
    "taylor": Taylor,
}


def estimator_named(name: str) -> Estimator:
    """The estimator of that name: ``hold``, ``residual``, ``taylor`` (order 1) or
    ``taylor(ORDER)``.

    Raises:
        ConfigError: no estimator has that name; the message suggests the nearest.
    """
    with_order = re.fullmatch(r"taylor\((\d+)\)", name)
    if with_order:
        return Taylor(int(with_order[1]))
    if name not in _NAMED:
        raise ConfigError(
            f"unknown estimator {name!r}. {did_you_mean(name, [*_NAMED, 'taylor(2)'])}"
        )
    return _NAMED[name]()
