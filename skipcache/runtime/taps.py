"""Listening posts on instances: ``scheduler.step``, ``transformer.cache_context``, and methods like
``forward_with_cfg``.

Each is a callable object in the ``__dict__`` of the instance, over the method of its class. Both
survive ``deepcopy`` (the copy listens to the copy) and ``pickle``, and leave no trace when taken
out.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from skipcache.runtime.clock import SchedulerRun


class SchedulerTap:
    """Counts the steps of one scheduler and tells its runs apart, without a device sync.

    A new ``scheduler.timesteps`` object is a new run. ``ticks`` counts the steps since;
    ``position`` is the index in ``timesteps`` of the step to come, read off the timestep given to
    ``step``, which is a view of them; ``begin`` that of the run's first step (image to image begins
    late).
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.users = 0
        self.timesteps = (
            scheduler.timesteps
        )  # those there already belong to no run that we will see
        self.run_id = 0
        self.ticks = 0
        self.begin = 0
        self.position = 0
        self.values: list[float] = []  # the timesteps as the scheduler has them
        self.times: list[float] = []  # and normalised
        self.shadowed: Any = None
        self.runs: weakref.WeakSet[SchedulerRun] = weakref.WeakSet()  # those that it tells

    def __getstate__(self) -> dict[str, Any]:
        # Whoever uses a copy has yet to say so.
        return {**{k: v for k, v in self.__dict__.items() if k != "runs"}, "users": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, runs=weakref.WeakSet())

    @staticmethod
    def of(scheduler: Any, *, fresh: bool) -> SchedulerTap:
        """The scheduler's tap; puts one in where there is none. ``fresh``: its timesteps are a
        run's already.
        """
        tap = scheduler.__dict__.get("step")
        if not isinstance(tap, SchedulerTap):
            tap = SchedulerTap(scheduler)
            if fresh:
                tap.timesteps = None
            tap.shadowed = scheduler.__dict__.get("step")
            scheduler.__dict__["step"] = tap
        return tap

    @property
    def _original(self) -> Any:
        if self.shadowed is not None:
            return self.shadowed
        return type(self.scheduler).step.__get__(self.scheduler)

    @property
    def __signature__(
        self,
    ) -> inspect.Signature:  # pipelines ask whether ``step`` takes eta or generator
        return inspect.signature(self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._original(*args, **kwargs)
        self.refresh_run()
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        index = self._index_of(timestep)
        if index is not None and self.ticks > 0 and index == self.position - 1:
            return output  # one step in two calls (Cosmos)
        if index is not None:
            if self.ticks == 0:
                self.begin = index
            self.position = index
        self.position += 1
        self.ticks += 1
        for run in self.runs:
            run.tick()
        return output

    def refresh_run(self) -> None:
        """Notices that ``set_timesteps`` was called since the last look."""
        if self.scheduler.timesteps is not self.timesteps:
            self.timesteps = self.scheduler.timesteps
            self.run_id += 1
            self.ticks = 0
            self.begin = self.position = getattr(self.scheduler, "begin_index", None) or 0
            self.values = [
                float(value) for value in torch.as_tensor(self.timesteps).flatten().tolist()
            ]
            config = getattr(self.scheduler, "config", None)
            total = getattr(config, "num_train_timesteps", None) or 1000
            self.times = normalised_times(self.values, total)

    @property
    def is_over(self) -> bool:
        """Whether every step of the current run has been made."""
        return self.position >= len(self.times)

    def _index_of(self, timestep: Any) -> int | None:
        steps = self.timesteps
        if not isinstance(steps, torch.Tensor) or not isinstance(timestep, torch.Tensor):
            return None
        if (
            timestep.numel() != 1
            or timestep.dtype != steps.dtype
            or timestep.device != steps.device
        ):
            return None
        offset = timestep.data_ptr() - steps.data_ptr()
        width = steps.element_size() * (steps.stride(0) if steps.dim() else 1)
        if width <= 0 or offset < 0 or offset % width or offset // width >= len(self.times):
            return None
        return int(offset // width)

    def release(self) -> None:
        """One user less; the last one takes the tap out."""
        self.users -= 1
        if self.users <= 0 and self.scheduler.__dict__.get("step") is self:
            if self.shadowed is None:
                del self.scheduler.__dict__["step"]
            else:
                self.scheduler.__dict__["step"] = self.shadowed


def normalised_times(timesteps: Sequence[float], train_timesteps: int) -> list[float]:
    """Timesteps as fractions of the training noise levels, 1 = noise, falling.

    Timesteps that are no such fractions (EDM's log-sigmas) are replaced by their rank, evenly from
    1 to 0.
    """
    highest = max(timesteps, default=0.0)
    scale = 1 if highest <= 1.0 else train_timesteps
    times = [value / scale for value in timesteps]
    is_other_scale = 1.0 < highest < 0.01 * train_timesteps
    if is_other_scale or not all(-1e-6 <= time <= 1.0 + 1e-3 for time in times):
        return [1.0 - index / len(times) for index in range(len(times))]
    times = [min(1.0, max(0.0, time)) for time in times]
    return [1.0 - time for time in times] if times and times[0] < times[-1] else times


class ContextTap:
    """Notes the name that a pipeline gives to a guidance pass: ``with
    transformer.cache_context("cond")``.
    """

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.name: str | None = None

    @contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Iterator[None]:
        outer, self.name = self.name, name
        try:
            with type(self.transformer).cache_context(self.transformer, name, **kwargs):
                yield
        finally:
            self.name = outer


class MethodTap:
    """A method that a sampler calls in place of the module and that goes past its hooks
    (``forward_with_cfg``).
    """

    def __init__(self, transformer: Any, method: str, controller: Any) -> None:
        self.transformer, self.method, self.controller = transformer, method, controller

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(
            getattr(type(self.transformer), self.method).__get__(self.transformer)
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = instead = None
        self.controller.before(args, kwargs)
        self.controller.is_inside_method = True
        try:
            output = getattr(type(self.transformer), self.method)(self.transformer, *args, **kwargs)
        finally:
            self.controller.is_inside_method = False
            instead = self.controller.after(output)
        return output if instead is None else instead
