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
from skipcache.errors import TargetError
from skipcache.runtime.callers import Caller, calling_pipeline, has_timesteps
from skipcache.runtime.store import MAX_STREAMS, Run
from skipcache.runtime.taps import ContextTap, SchedulerTap


class PipelineLink:
    """A pipeline that calls the transformer, held weakly, and the tap on its present scheduler."""

    def __init__(self, pipeline: Any, *, fresh: bool) -> None:
        try:
            self._pipeline: Callable[[], Any] = weakref.ref(pipeline)
        except TypeError:
            raise TargetError(
                f"{type(pipeline).__qualname__!r} takes no weak references, so its scheduler "
                "cannot be followed. Apply to its transformer, or add '__weakref__' to its slots."
            ) from None
        self._tap: SchedulerTap | None = None
        self.attach_tap(fresh=fresh)

    @property
    def pipeline(self) -> Any:
        return self._pipeline()

    @property
    def tap(self) -> SchedulerTap | None:
        return self._tap

    def attach_tap(self, *, fresh: bool) -> SchedulerTap | None:
        """The tap on the pipeline's present scheduler; None where that has no timesteps.

        ``fresh``: the timesteps of a scheduler not tapped before are those of a run under way.
        """
        scheduler = getattr(self.pipeline, "scheduler", None)
        if self._tap is not None and self._tap.scheduler is scheduler:
            return self._tap
        self.release()
        if has_timesteps(scheduler):
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
    """A run told by a scheduler's tap, of one call of a pipeline (or of a loop that is none)."""

    def __init__(self, tap: SchedulerTap, caller: Caller | None) -> None:
        super().__init__(tap.times[tap.begin :], is_planned=True)
        self.tap, self.run_id, self.begin = tap, tap.run_id, tap.begin
        tap.runs.add(self)
        self.token = caller.token if caller is not None else None

    @property
    def is_over(self) -> bool:
        return self.tap.run_id != self.run_id or self.tap.is_over

    def follow(self) -> None:
        """Moves to the scheduler's step; plans anew if the run turns out to begin elsewhere."""
        if self.begin != self.tap.begin:
            self.begin = self.tap.begin
            self.times, self.plan = self.tap.times[self.begin :], None
            self.misses.clear()
        self.advance(self.tap.ticks)

    def tick(self) -> None:
        """The scheduler made a step: a pass that was away at a refresh will refresh when it comes
        back, if it does, and after the last reuse none will; so they keep nothing.
        """
        made = self.tap.ticks
        for stream in self.streams.values():
            missed = self.plan is not None and any(self.plan[stream.last_step + 1 : made])
            if missed or made > self.last_reuse or self.is_over:
                stream.drop()

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
        caller = calling_pipeline()
        self.token = caller.token if caller is not None else None

    def fail(self) -> None:
        """The call is taken back: it may be made again, in the same place."""
        self.drop()
        self.total_calls -= 1
        self.calls[self.last_name] -= 1


class BareRun(Run):
    """A run told by the timestep values of calls from one place."""

    def __init__(self, time: float, token: tuple[int, int] | None) -> None:
        super().__init__([time])
        self.token = token
        self.passes = 1

    def next_step(self, time: float) -> None:
        """Moves on. Where the number of unnamed calls changes, whose call was whose is not known.

        So what they left is dropped: two calls at the first timestep may be two guidance passes, or
        a single call and then the first one of another run. The next step refreshes, and tells.
        """
        passes = self.calls.get(None, 0)
        if passes not in (0, self.passes):
            self.drop()
            self.passes = passes
        self.times.append(time)
        self.advance(self.step + 1)


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
        self._scheduled: list[SchedulerRun] = []  # unfinished ones
        self._bare: BareRun | None = None
        # A run of a scheduler that never steps: somebody else does the sampling.
        self._silent: tuple[SchedulerTap, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.update(explicit=[], _scheduled=[], _bare=None, _silent=None)  # a copy has no run
        return state

    def attach(self, pipeline: Any, *, fresh: bool = False) -> PipelineLink:
        """Follows a pipeline's scheduler too; one that is followed already is followed anew."""
        attached = PipelineLink(pipeline, fresh=fresh)
        self._detach(lambda link: link.pipeline in (None, pipeline))
        self.links.append(attached)
        return attached

    def _detach(self, is_wanted: Callable[[PipelineLink], bool]) -> None:
        for link in self.links:
            if is_wanted(link):
                link.release()
        self.links = [link for link in self.links if not is_wanted(link)]

    def release(self) -> None:
        """Takes every tap out and lets go of what is cached."""
        for link in self.links:
            link.release()
        for run in [*self.explicit, *self._scheduled, *([self._bare] if self._bare else [])]:
            run.drop()
        self._reset()

    def locate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Run, Any] | None:
        """The run of the forward under way, moved to its step, and its stream; None if untold."""
        name = self.context.name if self.context is not None else None
        caller = calling_pipeline()
        token = caller.token if caller is not None else None
        if self.explicit and self.explicit[-1].token == token:
            return self._locate_explicit(self.explicit[-1], name, args, kwargs)
        if caller is not None:
            candidates = self._runs_of_pipeline(caller)
        else:
            candidates = self._runs_of_loop(args, kwargs)
        if len(candidates) > 1:
            return None  # loops over several schedulers, and any of them may have made this call
        for scheduled in candidates:
            scheduled.follow()
            key = scheduled.next_stream(name)
            if sum(scheduled.calls.values()) <= MAX_STREAMS:
                return scheduled, key
            self._silent = (scheduled.tap, scheduled.run_id)
            scheduled.drop()
            self._scheduled.remove(scheduled)
        return self._locate_bare(name, token, args, kwargs)

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

    def _runs_of_pipeline(self, caller: Caller) -> list[SchedulerRun]:
        """The run of that very call of that pipeline, which need not have been attached before."""
        link = next((link for link in self.links if link.pipeline is caller.pipeline), None)
        if link is None:
            link = self.attach(caller.pipeline, fresh=True)
        tap = link.attach_tap(fresh=True)
        run = self._run_of_tap(tap, caller) if tap is not None else None
        return [run] if run is not None else []

    def _run_of_tap(self, tap: SchedulerTap, caller: Caller | None) -> SchedulerRun | None:
        tap.refresh_run()
        self._drop_over()
        token = caller.token if caller is not None else None
        for run in self._scheduled:
            if run.tap is tap and run.token == token:
                return run
        if tap.is_over or self._silent == (tap, tap.run_id):
            return None
        run = SchedulerRun(tap, caller)
        self._scheduled.append(run)
        return run

    def _runs_of_loop(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[SchedulerRun]:
        """For hand-written loops over followed schedulers: those whose next step this can be."""
        taps = [link.attach_tap(fresh=True) for link in self.links]
        runs = [run for tap in taps if tap is not None and (run := self._run_of_tap(tap, None))]
        raw = self._read_raw(args, kwargs, sync=len(runs) > 1) if runs else None
        if raw is None or self.timestep is None:
            return runs
        value, is_half = raw
        time, tolerance = self.timestep.normalise(value), 1e-2 if is_half else 1e-4
        return [run for run in runs if run.is_at(value, time, tolerance)]

    def _drop_over(self) -> None:
        taps = [link.tap for link in self.links]
        kept = [r for r in self._scheduled if not r.is_over and any(r.tap is tap for tap in taps)]
        for run in self._scheduled:
            if all(run is not other for other in kept):
                run.drop()
        self._scheduled = kept

    def _locate_bare(
        self,
        name: str | None,
        token: tuple[int, int] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Run, Any] | None:
        time = self._read_time(args, kwargs, sync=True)
        if time is None or not math.isfinite(time):
            return None
        run = self._bare
        if run is None or run.token != token or time > run.times[-1]:
            if run is not None:
                run.drop()
            run = self._bare = BareRun(time, token)
        elif time < run.times[-1]:
            run.next_step(time)
        elif name is not None and name in run.calls:
            # The pass again, at a time that does not tell (each frame may have one of its own).
            run.drop()
            return None
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
