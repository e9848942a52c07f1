"""Which run, which step, which stream: found anew at every forward, from whoever can tell.

In this order: an explicit ``skip_cache_run``; the scheduler of an attached pipeline; the timestep
values. The name of a guidance pass, where the pipeline gives one, names the stream in all three.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from skipcache.backbone import Timestep
from skipcache.runtime.store import MAX_STREAMS, Run
from skipcache.runtime.taps import ContextTap, SchedulerTap


class PipelineLink:
    """A pipeline that calls the transformer, held weakly, and the tap on its present scheduler."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline: Callable[[], Any] = weakref.ref(pipeline)
        self._tap: SchedulerTap | None = None
        self.attach_tap(fresh=False)

    @property
    def pipeline(self) -> Any:
        return self._pipeline()

    def attach_tap(self, *, fresh: bool) -> SchedulerTap | None:
        """The tap on the pipeline's present scheduler; None where that has no timesteps."""
        scheduler = getattr(self.pipeline, "scheduler", None)
        if self._tap is not None and self._tap.scheduler is scheduler:
            return self._tap
        self.release()
        if hasattr(scheduler, "timesteps") and hasattr(scheduler, "step"):
            self._tap = SchedulerTap.of(scheduler, fresh=fresh)
            self._tap.users += 1
        return self._tap

    def release(self) -> None:
        if self._tap is not None:
            self._tap.release()
            self._tap = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PipelineLink:
        # Copied with its pipeline, it follows the copied one; the transformer alone follows none.
        copy = PipelineLink.__new__(PipelineLink)
        copied = memo.get(id(self.pipeline)) if self.pipeline is not None else None
        copy._pipeline = weakref.ref(copied) if copied is not None else _no_pipeline
        copy._tap = None
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        return (_dead_link, ())


def _no_pipeline() -> None:
    return None


def _dead_link() -> PipelineLink:
    link = PipelineLink.__new__(PipelineLink)
    link._pipeline, link._tap = _no_pipeline, None
    return link


class SchedulerRun(Run):
    """A run told by a scheduler's tap."""

    def __init__(self, tap: SchedulerTap) -> None:
        super().__init__(tap.times[tap.begin :], is_planned=True)
        self.tap, self.run_id, self.begin = tap, tap.run_id, tap.begin

    @property
    def is_over(self) -> bool:
        return self.tap.run_id != self.run_id or self.tap.is_over

    def follow(self) -> None:
        """Moves to the scheduler's step; plans anew if the run turns out to begin elsewhere."""
        if self.begin != self.tap.begin:
            self.begin = self.tap.begin
            self.times, self.plan = self.tap.times[self.begin :], None
        self.advance(self.tap.ticks)

    def is_at(self, raw: float, time: float, tolerance: float) -> bool:
        """Whether a forward at that timestep can be the scheduler's next step."""
        position = self.tap.position
        return (
            abs(self.tap.times[position] - time) <= tolerance
            or abs(self.tap.values[position] - raw) <= tolerance
        )


class ExplicitRun(Run):
    """A run told by ``skip_cache_run``: every ``streams`` calls are a step."""

    def __init__(self, streams: int, times: Sequence[float] | None) -> None:
        super().__init__(times or (), is_planned=times is not None)
        self.streams_a_step = streams
        self.total_calls = 0


class Clock:
    """Locates every forward of one transformer in a run."""

    def __init__(
        self, timestep: Timestep | None, parameters: Sequence[str], needs_times: bool
    ) -> None:
        self.timestep = timestep
        self.position = (
            list(parameters).index(timestep.argument)
            if timestep is not None and timestep.argument in parameters
            else None
        )
        self.needs_times = needs_times
        self.links: list[PipelineLink] = []
        self.context: ContextTap | None = None
        self._reset()

    def _reset(self) -> None:
        self.explicit: list[ExplicitRun] = []
        self._scheduled: list[SchedulerRun] = []  # unfinished ones, the innermost last
        self._bare: Run | None = None
        self._silent: tuple[SchedulerTap, int] | None = (
            None  # a run in which somebody else does the sampling
        )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.update(
            explicit=[], _scheduled=[], _bare=None, _silent=None
        )  # a copy starts with no run
        return state

    def attach(self, pipeline: Any) -> None:
        """Follows a pipeline's scheduler too; a pipeline already followed is not doubled."""
        self.links = [link for link in self.links if link.pipeline not in (None, pipeline)]
        self.links.append(PipelineLink(pipeline))

    def release(self) -> None:
        """Takes every tap out and lets go of what is cached."""
        for link in self.links:
            link.release()
        for run in [*self.explicit, *self._scheduled, *([self._bare] if self._bare else [])]:
            run.drop()
        self._reset()

    def forget(self, run: Run) -> None:
        """Ends a run that an exception has stopped."""
        run.drop()
        self._scheduled = [other for other in self._scheduled if other is not run]
        if self._bare is run:
            self._bare = None

    def locate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Run, Any] | None:
        """The run of the forward under way, moved to its step, and its stream; None when it cannot
        be told.
        """
        name = self.context.name if self.context is not None else None
        if self.explicit:
            return self._locate_explicit(self.explicit[-1], name, args, kwargs)
        scheduled = self._current_scheduled(args, kwargs)
        if scheduled is not None:
            scheduled.follow()
            key = scheduled.next_stream(name)
            if sum(scheduled.calls.values()) <= MAX_STREAMS:
                return scheduled, key
            self._silent = (scheduled.tap, scheduled.run_id)
            self.forget(scheduled)
        return self._locate_bare(name, args, kwargs)

    def _locate_explicit(
        self, run: ExplicitRun, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Run, Any]:
        step, index = divmod(run.total_calls, run.streams_a_step)
        run.total_calls += 1
        run.advance(step)
        key = run.next_stream(name)
        if step >= len(run.times):
            time = self._read_time(args, kwargs, sync=True) if self.needs_times else None
            run.times.append(math.nan if time is None else time)
        return run, index if name is None else key

    def _current_scheduled(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> SchedulerRun | None:
        for link in self.links:
            tap = link.attach_tap(fresh=True)
            if tap is None:
                continue
            tap.refresh_run()
            is_known = any(
                run.tap is tap and run.run_id == tap.run_id for run in self._scheduled
            ) or self._silent == (tap, tap.run_id)
            if not is_known and not tap.is_over:
                self._scheduled.append(SchedulerRun(tap))
        self._drop_over()
        if not self._scheduled:
            return None
        # One pipeline inside another's loop, or a run given up: the time says whose call this is.
        is_contested = len(self._scheduled) > 1
        raw = self._read_raw(args, kwargs, sync=is_contested)
        if raw is None or self.timestep is None:
            return None if is_contested else self._scheduled[-1]
        value, is_half = raw
        time, tolerance = self.timestep.normalise(value), 1e-2 if is_half else 1e-4
        matching = [run for run in self._scheduled if run.is_at(value, time, tolerance)]
        return matching[0] if len(matching) == 1 else None

    def _drop_over(self) -> None:
        for run in self._scheduled:
            if run.is_over:
                run.drop()
        self._scheduled = [run for run in self._scheduled if not run.is_over]

    def _locate_bare(
        self, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Run, Any] | None:
        time = self._read_time(args, kwargs, sync=True)
        if time is None or not math.isfinite(time):
            return None
        run = self._bare
        if run is None or time > run.times[-1]:
            if run is not None:
                run.drop()
            run = self._bare = Run([time])
        elif time < run.times[-1]:
            run.times.append(time)
            run.advance(run.step + 1)
        return run, run.next_stream(name)

    def _read_time(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, sync: bool
    ) -> float | None:
        raw = self._read_raw(args, kwargs, sync=sync)
        return None if raw is None or self.timestep is None else self.timestep.normalise(raw[0])

    def _read_raw(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, sync: bool
    ) -> tuple[float, bool] | None:
        """The timestep of the forward (the noisiest of several), and whether in half precision.

        None where there is none, or where reading it would need a device sync that was not asked
        for.
        """
        if self.timestep is None:
            return None
        given = kwargs.get(self.timestep.argument)
        if given is None and self.position is not None and self.position < len(args):
            given = args[self.position]
        if isinstance(given, (int, float)):
            return float(given), False
        if not isinstance(given, torch.Tensor) or given.numel() == 0:
            return None
        if given.device.type != "cpu" and not sync:
            return None
        is_one_value = all(
            stride == 0 or size == 1
            for stride, size in zip(given.stride(), given.shape, strict=True)
        )
        flat = given.detach().flatten()
        values = (flat[:1] if is_one_value else flat).tolist()
        value = max(values) if self.timestep.noise > self.timestep.clean else min(values)
        return float(value), given.dtype in (torch.float16, torch.bfloat16)
