"""Conducts one transformer: decides before each forward, hands the lists their stand-ins, and files
what came of it.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from skipcache.errors import ConfigError, NotCachingWarning
from skipcache.estimators import Estimator, PlannedEstimator, Refresh, Tensors
from skipcache.runtime.blocklist import Slot, copy_of
from skipcache.runtime.clock import Clock
from skipcache.runtime.compiled import outside_graphs
from skipcache.runtime.conductor import Conductor, conductor_of
from skipcache.runtime.inputs import CallReader
from skipcache.runtime.layout import BoundBackbone
from skipcache.runtime.ranks import agreed, shared_along
from skipcache.runtime.stats import CacheStats, stats_of
from skipcache.runtime.store import Run, Stream, relative_change, relative_errors
from skipcache.runtime.taps import ContextTap
from skipcache.schedules import AdaptiveSchedule, Miss, Progress, Schedule


class Controller(Conductor):
    """Everything that a cache adds to one transformer."""

    def __init__(
        self,
        transformer: nn.Module,
        bound: BoundBackbone,
        front_layers: int,
        back_layers: int,
        schedule: Schedule,
        estimator: Estimator,
    ) -> None:
        """Builds without touching the transformer.

        Raises:
            ConfigError: the deep span or the schedule cannot be.
        """
        bound.check_layers(front_layers, back_layers, estimator.needs_shallow)
        _check_schedule(schedule)
        super().__init__(bound)
        self.schedule, self.estimator = schedule, estimator
        self.is_adaptive = isinstance(schedule, AdaptiveSchedule) and schedule.is_adaptive
        self.config: Any = None  # what it was built from, to build it anew
        self.preset: str | None = None  # its name, where one filled in what was not given
        self.front_layers, self.back_layers = front_layers, back_layers
        self.slot = Slot(estimator, needs_shallow=estimator.needs_shallow)
        if estimator.needs_shallow:
            self.slot.joined = bound.joined(front_layers, bound.depth - back_layers)
        span = range(front_layers, bound.depth - back_layers)
        self.stand_ins = bound.cached_stand_ins(span, self.slot)
        self.interleaved = bound.interleaved_stand_ins(self.slot)
        parameters = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self.clock = Clock(bound.backbone.timestep, parameters, schedule.needs_times)
        self.reader = CallReader(bound.backbone, parameters)
        self.last_run: Run | None = None
        self._current: tuple[Run, Stream] | None = None
        self._has_warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_run": None, "_current": None, "is_inside_method": False}

    def install(self, transformer: nn.Module) -> None:
        super().install(transformer)
        if hasattr(type(transformer), "cache_context"):
            self.clock.context = ContextTap(transformer)
            transformer.__dict__["cache_context"] = self.clock.context

    def uninstall(self, transformer: nn.Module) -> None:
        self.clock.release()
        if isinstance(transformer.__dict__.get("cache_context"), ContextTap):
            del transformer.__dict__["cache_context"]
        super().uninstall(transformer)

    # The two ends of a forward.

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._end_forward(succeeded=False)  # one that Ctrl-C stopped ended without a word
        self.reader.check_sizes(args, kwargs)
        self.yield_branches()
        if not self.reader.is_step(args, kwargs):
            return
        if torch.is_grad_enabled():
            self._warn_once(
                "gradients are on, so nothing is cached and every layer runs. Sample under "
                "torch.no_grad(), or call "
                "remove_skip_cache before training."
            )
            return
        located = self.clock.locate(args, kwargs)
        if located is None:
            self._warn_once(
                "it cannot be told which step this forward belongs to, so nothing is cached. Use "
                "skipcache.skip_cache_run around your sampling loop."
            )
            return
        run, key = located
        self.last_run = run
        stream = run.stream(key, self.estimator.history)
        if stream is None:
            return
        self._current = run, stream
        self._decide(run, stream)
        if self.schedule.needs_times and math.isnan(run.time) and not run.is_planned:
            self._warn_once(
                "the schedule has a window, and no call says its time, so every step refreshes. "
                "Pass timesteps=... to skip_cache_run, or use a schedule without a window."
            )
        for entry, stand_ins in zip(self.bound.lists, self.stand_ins, strict=True):
            entry.module._stand_ins = stand_ins  # type: ignore[assignment]
        for entry, stand_ins in zip(self.bound.interleaved, self.interleaved, strict=True):
            entry.module._stand_ins = stand_ins  # type: ignore[assignment]

    def after(self, output: Any) -> Any:
        instead = None
        if self.back_layers == 0 and self._current is not None and output is not None:
            instead = self._exchange(output)
        self._end_forward(succeeded=output is not None)
        return instead

    def _exchange(self, output: Any) -> Any:
        """Where no layers run behind the span, it is the transformer's output that a refresh keeps
        and that a reuse takes an estimate for.
        """
        slot = self.slot
        leaves, structure = pytree.tree_flatten(output)
        places = [i for i, leaf in enumerate(leaves) if _is_feature(leaf)]
        if not slot.is_reuse:
            slot.deep = copy_of(tuple(leaves[i] for i in places)) if slot.keeps else None
            return None
        estimate = slot.estimator.estimate(slot.prepared, None)
        for i, tensor in zip(places, estimate, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, structure)

    def _end_forward(self, *, succeeded: bool) -> None:
        self.yield_real_blocks()
        if self._current is not None:
            run, stream = self._current
            self._current = None
            if succeeded:
                self._file(run, stream)
            else:
                run.fail()
        self.slot.clear()

    @property
    def current(self) -> tuple[Run, Stream] | None:
        """Those of the forward under way."""
        return self._current

    def stats(self) -> CacheStats:
        """Of the last run."""
        kept_layers = self.front_layers + self.back_layers
        return stats_of(self.last_run, self.bound.depth, kept_layers, self.preset)

    def _decide(self, run: Run, stream: Stream) -> None:
        slot = self.slot
        if run.plan is None and run.is_planned:
            self._plan(run, self.schedule.plan(run.times))
        step = run.step
        self._add_refresh(run)
        is_cached = bool(stream.refreshes)
        # A pass that was away at a refresh makes up for it when it comes back.
        missed = range(min(stream.last_step + 1, step), step + 1)
        due: Sequence[bool]
        is_probing = self.schedule.needs_probe
        slot.probe = None
        if not is_cached:
            slot.is_reuse = False
        elif run.plan is not None:
            due = run.plan[missed.start : missed.stop]
            slot.is_reuse = step < len(run.plan) and not any(due)
        elif run.is_planned and step >= len(run.times):
            slot.is_reuse = False
        elif is_probing:
            slot.is_reuse = False  # until the front has run
        else:
            due = [self.schedule.is_refresh(self._progress(run, stream, at)) for at in missed]
            slot.is_reuse = not any(due)
        slot.keeps = run.last_reuse >= 0
        slot.expected = stream.entered
        if is_probing:
            slot.probe = self._probe
        elif slot.is_reuse:
            slot.prepared = self._prepared(run, stream)

    def _plan(self, run: Run, plan: tuple[bool, ...] | None) -> None:
        run.plan, run.estimator = plan, None
        run.last_reuse = _last_reuse(run)
        if plan is not None and isinstance(self.estimator, PlannedEstimator):
            run.estimator = self.estimator.for_run(run.times, plan)

    def _add_refresh(self, run: Run) -> None:
        """Adds one at this step, where the last refresh was missed by too much: to the plan, so
        that all streams of the step do alike.
        """
        step, miss = run.step, run.misses[-1] if run.misses else None
        if miss is None or run.plan is None or step >= len(run.plan) or run.plan[step]:
            return
        assert isinstance(self.schedule, AdaptiveSchedule)
        if self.schedule.adds_refresh(run.times, step, miss):
            self._plan(run, (*run.plan[:step], True, *run.plan[step + 1 :]))

    def _prepared(self, run: Run, stream: Stream) -> tuple[Tensors, ...]:
        estimator = run.estimator or self.estimator
        return estimator.prepare(tuple(stream.refreshes), run.step, run.time)

    def _miss(self, run: Run, stream: Stream, deep: Tensors) -> Miss:
        """By how much an estimate would have missed what this refresh computed."""
        estimate = self.estimator.estimate(self._prepared(run, stream), self.slot.shallow)
        seen = tuple(refresh.step for refresh in stream.refreshes)
        error, worst = self._agreed(run, relative_errors(estimate, deep))
        return Miss(run.step, seen, error, worst)

    def _agreed(self, run: Run, values: Sequence[float]) -> list[float]:
        """What all ranks that share the transformer go by."""
        if run.shared is None:
            run.shared = shared_along(self.transformer)
        return agreed(values, run.shared)

    def _progress(self, run: Run, stream: Stream, step: int) -> Progress:
        since = step - stream.last_refresh_step if stream.refreshes else None
        return Progress(run.times[: step + 1], since, stream.change)

    @outside_graphs
    def _probe(self, flow: Tensors) -> None:
        """Called at the entry of the deep span: measures, and lets the schedule decide."""
        assert self._current is not None
        run, stream = self._current
        if stream.previous is not None:
            same = [
                (a is None) == (b is None) and (a is None or b is None or a.shape == b.shape)
                for a, b in zip(stream.previous, flow, strict=True)
            ]
            change = relative_change(stream.previous, flow) if all(same) else float("inf")
            stream.change += self._agreed(run, [change])[0]
        stream.previous = copy_of(flow)
        if not stream.refreshes or (run.is_planned and run.step >= len(run.times)):
            return
        self.slot.is_reuse = not self.schedule.is_refresh(self._progress(run, stream, run.step))
        if self.slot.is_reuse:
            self.slot.prepared = self._prepared(run, stream)

    def _file(self, run: Run, stream: Stream) -> None:
        slot = self.slot
        is_refresh = not slot.is_reuse
        stream.record.append(is_refresh)
        stream.last_step = run.step
        if is_refresh:
            stream.last_refresh_step, stream.change = run.step, 0.0
            if slot.keeps and slot.deep is None:
                self._warn_once(
                    "a forward ended without running the layer that a reuse would resume at, so "
                    "nothing is kept of it. If it is so in every forward, correct the adapter, or "
                    "loop over the list itself."
                )
            # Without a layout from the entry (a pass that leaves that block out itself) there is
            # nothing to guard a reuse by.
            if slot.deep is not None and slot.entered and run.step < run.last_reuse:
                if (
                    self.is_adaptive
                    and run.plan
                    and stream.refreshes
                    and stream.entered == slot.entered
                ):
                    run.take(self._miss(run, stream, slot.deep))
                refresh = Refresh(run.step, run.time, slot.deep, slot.shallow)
                stream.keep(refresh, slot.entered)
        run.measure()
        if run.step >= run.last_reuse:
            stream.drop()

    def _warn_once(self, message: str) -> None:
        if message not in self._has_warned:
            self._has_warned.add(message)
            warnings.warn(
                f"skipcache on {self.bound.backbone.name!r}: {message}",
                NotCachingWarning,
                stacklevel=3,
            )


def _is_feature(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _last_reuse(run: Run) -> int:
    """The last step of a run of known length that may reuse; -1 where none does."""
    if run.plan is None:
        return len(run.times) - 1
    return max((i for i, is_refresh in enumerate(run.plan) if not is_refresh), default=-1)


def _check_schedule(schedule: Schedule) -> None:
    """Tries the plan on a run of 50 steps, so that a schedule that answers nonsense fails now and
    not while sampling.
    """
    times = [1.0 - i / 50 for i in range(50)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a run that nobody asked for
        plan: Sequence[object] | None = schedule.plan(times)
    if schedule.needs_probe and plan is None:
        return
    if (
        plan is None
        or len(plan) != len(times)
        or not all(isinstance(entry, bool) for entry in plan)
    ):
        raise ConfigError(
            f"{schedule!r} planned {plan!r} for a run of {len(times)} steps. A plan is one bool a "
            "step, True = refresh."
        )


def controller_of(transformer: nn.Module) -> Controller | None:
    """The controller that is installed on the transformer, if any."""
    found = conductor_of(transformer)
    return found if isinstance(found, Controller) else None
