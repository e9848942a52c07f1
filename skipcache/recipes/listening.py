"""Listens to a pipeline's scheduler: the outputs that it is given, and the samples it makes of
them.
"""

from __future__ import annotations

import copy
import functools
import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from skipcache.errors import ConfigError, RecipeWarning
from skipcache.recipes.statistics import Array
from skipcache.runtime.taps import normalised_times

Change = Callable[[int, torch.Tensor], torch.Tensor]

# Of the arguments of ``step``: what a replay gives itself, and noise, which cancels.
NOT_KEPT = ("self", "model_output", "sample", "generator", "variance_noise")


@dataclass(frozen=True)
class Returned:
    """Stands for an argument of ``step`` that the step before returned.

    Attributes:
        place: in what it returned.
    """

    place: int


@dataclass
class Listened:
    """One run.

    Attributes:
        before: the scheduler as it was when the first step was made.
        calls: of each step, the arguments of ``step``; model output, sample and noise left out.
        is_doubled: whether the pipeline samples everything twice: guidance may carry two copies
            along, and gives the scheduler the same output for both.
        outputs: what of each step's model output was kept.
        seconds: at which each step was made.
        sample: the last one, [B, ...]; of a doubled batch the first half.
    """

    before: Any = None
    calls: list[inspect.BoundArguments] = field(default_factory=list)
    is_doubled: bool = False
    outputs: list[torch.Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sample: torch.Tensor | None = None

    @property
    def times(self) -> tuple[float, ...]:
        """Normalised, of each step."""
        scheduler = self.before
        values = [float(value) for value in torch.as_tensor(scheduler.timesteps).flatten()]
        total = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000
        times = normalised_times(values, total)
        begin = len(times) - len(self.calls)
        if begin < 0:
            raise ConfigError(
                f"the scheduler made {len(self.calls)} steps for {len(times)} timesteps, so what a "
                "step's error does to the sample cannot be told. Calibrate with another scheduler."
            )
        return tuple(times[begin:])

    def once(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, ...] of what may be doubled."""
        return tensor.chunk(2)[0] if self.is_doubled else tensor


@contextmanager
def listening(
    pipeline: Any,
    keep: Callable[[torch.Tensor], torch.Tensor] | None = None,
    change: Change | None = None,
) -> Iterator[Listened]:
    """Listens to ``pipeline.scheduler`` while its class is one that tells.

    Args:
        pipeline: with a diffusers scheduler.
        keep: what to keep of each model output [B, ...]; default nothing.
        change: from step and model output to the one that the scheduler is given instead.

    Raises:
        ConfigError: the pipeline has no scheduler that steps from a model output and a sample.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None or not callable(getattr(scheduler, "step", None)):
        raise ConfigError(
            f"{type(pipeline).__name__} has no scheduler to listen to. A recipe is calibrated on a "
            "diffusers pipeline."
        )
    kind = type(scheduler)
    heard = Listened()
    signature = inspect.signature(kind.step)
    for name in ("model_output", "sample"):
        if name not in signature.parameters:
            raise ConfigError(
                f"the step of {kind.__name__} takes no {name!r}, so it cannot be listened to. "
                "Calibrate with another scheduler."
            )
    returned: tuple[Any, ...] = ()

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal returned
        if self is not scheduler:  # a copy, for a second kind of sample
            return kind.step(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        output = bound.arguments["model_output"]
        if heard.before is None:
            heard.before = _plain_copy(scheduler, kind)
            heard.is_doubled = _is_doubled(output) and _is_doubled(bound.arguments["sample"])
        index = len(heard.calls)
        if keep is not None:
            heard.outputs.append(keep(output))
        if change is not None:
            bound.arguments["model_output"] = change(index, output)
        made = kind.step(*bound.args, **bound.kwargs)
        for name in NOT_KEPT:
            bound.arguments.pop(name, None)
        for name, value in bound.arguments.items():
            places = [i for i, part in enumerate(returned) if part is value and part is not None]
            if places:
                bound.arguments[name] = Returned(places[0])
        returned = _parts_of(made)
        heard.calls.append(bound)
        heard.sample = sample_of(made)
        if heard.sample.device.type == "cuda":
            torch.cuda.synchronize(heard.sample.device)
        heard.seconds.append(time.perf_counter())
        return made

    scheduler.__class__ = type(kind.__name__, (kind,), {"step": step})
    try:
        yield heard
        if heard.sample is not None:
            heard.sample = heard.once(heard.sample)
    finally:
        scheduler.__class__ = kind


def _plain_copy(scheduler: Any, kind: type) -> Any:
    taken = copy.copy(scheduler)
    taken.__dict__ = {
        name: copy.deepcopy(value) for name, value in scheduler.__dict__.items() if name != "step"
    }
    taken.__class__ = kind
    return taken


def sample_of(made: Any) -> torch.Tensor:
    """The sample among what ``scheduler.step`` returned."""
    found: torch.Tensor = made[0] if isinstance(made, tuple) else made.prev_sample
    return found


def _parts_of(made: Any) -> tuple[Any, ...]:
    """All that ``scheduler.step`` returned; an object of one's own serves as well."""
    if isinstance(made, tuple):
        return made
    return tuple(made.values() if isinstance(made, Mapping) else vars(made).values())


def _is_doubled(output: torch.Tensor) -> bool:
    return len(output) % 2 == 0 and torch.equal(*output.chunk(2))


def effects_of(heard: Listened) -> Array:
    """By how much the last sample changes when the output of one step does: half of what the
    scheduler makes of a unit output at that step and none at the others, less what it makes of the
    opposite, so that constants and noise of its own cancel.

    Where the scheduler cannot be asked so, the time that each step spans, with a warning.

    Returns:
        [n].
    """
    assert heard.sample is not None
    device = heard.sample.device
    shape = (len(heard.calls), *[1] * (heard.sample.dim() - 1))
    try:
        with torch.no_grad(), torch.random.fork_rng():
            more, less = (_replayed(heard, shape, device, unit) for unit in (1.0, -1.0))
        effects = (more - less).double().flatten().cpu().numpy() / 2
    except Exception as error:  # schedulers check and reshape in many ways
        effects, why = np.full(0, np.nan), f" ({type(error).__name__}: {error})"
    else:
        why = ""
    if effects.shape != (len(heard.calls),) or not np.isfinite(effects).all():
        warnings.warn(
            f"{type(heard.before).__name__} does not tell what its steps do to the sample{why}, so "
            "the recipe takes the time that each spans instead. It will be less good than with "
            "another scheduler.",
            RecipeWarning,
            stacklevel=2,
        )
        return -np.diff(np.array([*heard.times, 0.0]))
    return np.asarray(effects, dtype=np.float64)


def _replayed(
    heard: Listened, shape: tuple[int, ...], device: torch.device, unit: float
) -> torch.Tensor:
    """The last sample, where row i [1, ...] had an output of that value at step i."""
    scheduler = copy.deepcopy(heard.before)
    # Clipping is there for outliers. A unit output on a sample of nothing would be one.
    settings = getattr(scheduler, "config", None) or {}
    unclipped = {name: False for name in ("clip_sample", "thresholding") if settings.get(name)}
    if unclipped:
        scheduler.register_to_config(**unclipped)
    sample = torch.zeros(shape, device=device)
    returned: tuple[Any, ...] = ()
    for index, bound in enumerate(heard.calls):
        output = torch.zeros(shape, device=device)
        output[index] = unit
        given = {
            name: returned[value.place] if isinstance(value, Returned) else value
            for name, value in bound.arguments.items()
        }
        torch.manual_seed(index)
        made = scheduler.step(model_output=output, sample=sample, **given)
        returned, sample = _parts_of(made), sample_of(made)
    return sample
