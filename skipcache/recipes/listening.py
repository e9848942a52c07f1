"""Listens to a pipeline's scheduler: the outputs that it is given, and the samples it makes of
them.
"""

from __future__ import annotations

import copy
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from skipcache.errors import ConfigError
from skipcache.recipes.statistics import Array
from skipcache.runtime.taps import normalised_times

Change = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass
class Listened:
    """One run.

    Attributes:
        before: the scheduler as it was when the first step was made.
        calls: of each step, the arguments of ``step``, model output and sample left out.
        outputs: what of each step's model output was kept.
        seconds: at which each step was made.
        sample: the last one, [B, ...]; where the pipeline samples everything twice, once.
    """

    before: Any = None
    calls: list[inspect.BoundArguments] = field(default_factory=list)
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
        ConfigError: the pipeline has no scheduler with ``step``.
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

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not scheduler:  # a copy, for a second kind of sample
            return kind.step(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        output = bound.arguments["model_output"]
        if heard.before is None:
            heard.before = _plain_copy(scheduler, kind)
        index = len(heard.calls)
        if keep is not None:
            heard.outputs.append(keep(output))
        if change is not None:
            bound.arguments["model_output"] = change(index, output)
        made = kind.step(*bound.args, **bound.kwargs)
        for name in ("self", "model_output", "sample"):
            del bound.arguments[name]
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
            heard.sample = unrepeated(heard.sample)
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


def unrepeated(sample: torch.Tensor) -> torch.Tensor:
    """The first half of a batch whose halves are equal: guidance may carry two copies along."""
    if len(sample) % 2 == 0:
        first, second = sample.chunk(2)
        if torch.equal(first, second):
            return first
    return sample


def effects_of(heard: Listened) -> Array:
    """By how much the last sample changes when the output of one step does: half of what the
    scheduler makes of a unit output at that step and none at the others, less what it makes of the
    opposite, so that constants and noise of its own cancel.

    Where the scheduler cannot be asked so, the time that each step spans.

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
    except Exception:  # schedulers check and reshape in many ways
        effects = np.full(0, np.nan)
    if effects.shape != (len(heard.calls),) or not np.isfinite(effects).all():
        return -np.diff(np.array([*heard.times, 0.0]))
    return np.asarray(effects, dtype=np.float64)


def _replayed(
    heard: Listened, shape: tuple[int, ...], device: torch.device, unit: float
) -> torch.Tensor:
    """The last sample, where row i [1, ...] had an output of that value at step i."""
    scheduler = copy.deepcopy(heard.before)
    sample = torch.zeros(shape, device=device)
    for index, bound in enumerate(heard.calls):
        output = torch.zeros(shape, device=device)
        output[index] = unit
        given = {name: value for name, value in bound.arguments.items() if name != "generator"}
        torch.manual_seed(index)
        sample = sample_of(scheduler.step(model_output=output, sample=sample, **given))
    return sample
