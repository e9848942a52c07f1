"""The runtime against a slow reference that walks the layers itself, over random runs told in three
ways.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from skipcache import (
    Backbone,
    BlockList,
    IntervalSchedule,
    MaskSchedule,
    ProbeSchedule,
    Timestep,
    apply_skip_cache,
    cache_stats,
    remove_skip_cache,
    skip_cache_run,
)

WIDTH, TOKENS, FULL_BATCH = 4, 2, 3
BACKBONE = Backbone(
    "walker", (BlockList("blocks", takes=("x",), returns="x"),), timestep=Timestep("t")
)
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "flow_match": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
}


class BlockFailed(Exception):
    """Raised by a block that was told to."""


class Block(nn.Module):
    """x + tanh(Linear(x)) + a shift that depends on the time."""

    def __init__(self, works_in_place: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.calls = 0
        self.fails = False
        self.works_in_place = works_in_place

    def forward(self, x, shift):
        self.calls += 1
        if self.fails:
            raise BlockFailed
        if self.works_in_place:
            return x.add_(torch.tanh(self.linear(x))).add_(shift)
        return x + torch.tanh(self.linear(x)) + shift


class Walker(nn.Module):
    """A plain transformer: [B, T, C] in and out, and nothing in it knows of caches."""

    def __init__(self, depth: int, works_in_place: bool = False) -> None:
        super().__init__()
        torch.manual_seed(depth)
        self.blocks = nn.ModuleList(Block(works_in_place) for _ in range(depth))
        self.double()

    def shift_of(self, t):
        return torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1, 1) / 1000

    def forward(self, x, t):
        shift = self.shift_of(t)
        x = x.clone()
        for block in self.blocks:
            x = block(x, shift)
        return x


class Pipeline:
    """The least that a pipeline can be."""

    def __init__(self, transformer, scheduler) -> None:
        self.transformer = transformer
        self.scheduler = scheduler


# When, read literally from the docstrings. ``times`` are those of the run so far, this step's last.


@dataclass
class Interval:
    interval: int
    start: float
    stop: float

    def build(self):
        return IntervalSchedule(self.interval, self.start, self.stop)

    def says_refresh(self, times, since, change):
        if (len(times) - 1) % self.interval == 0 or times[-1] >= self.start:
            return True
        return any(time <= self.stop for time in times[:-1])


@dataclass
class Mask:
    named: tuple[int, ...]
    steps: int | None

    def build(self):
        return MaskSchedule(self.named, self.steps)

    def says_refresh(self, times, since, change):
        index = len(times) - 1
        if index in self.named:
            return True
        if self.steps is not None:
            return index >= self.steps
        ran = sorted({0, *self.named})
        stretch = max((late - early - 1 for early, late in pairwise(ran)), default=0)
        return index > ran[-1] + stretch


@dataclass
class AtTimes:
    named: tuple[float, ...]

    def build(self):
        return MaskSchedule.at_times(self.named)

    def says_refresh(self, times, since, change):
        if len(times) == 1:
            return True
        return any(times[-1] <= time < times[-2] for time in self.named)


@dataclass
class Probe:
    threshold: float
    longest: int
    start: float
    stop: float

    def build(self):
        return ProbeSchedule(self.threshold, self.longest, self.start, self.stop)

    def says_refresh(self, times, since, change):
        if since > self.longest or times[-1] >= self.start:
            return True
        if any(time <= self.stop for time in times[:-1]):
            return True
        return change >= self.threshold


class Reference:
    """Walks the layers with a dictionary of cached features per stream, and remembers all
    it did.
    """

    def __init__(self, model: Walker, front: int, back: int, when, estimator: str) -> None:
        self.model, self.when, self.estimator = model, when, estimator
        self.front, self.resume = front, len(model.blocks) - back
        self.begin_run()

    def begin_run(self) -> None:
        self.times: list[float] = []
        self.caches: dict[int, dict] = {}
        self.plans: dict[int, str] = {}

    def drop(self) -> None:
        self.caches = {}

    def call_uncached(self, x, t):
        """One call that is part of no step: every layer runs and nothing is remembered."""
        x = x.clone()
        for block in self.model.blocks:
            x = block(x, self.model.shift_of(t))
        return x

    def call(self, x, t, step: int, stream: int, is_past_end: bool = False):
        """One call at that step of the run; ``self.times[: step + 1]`` are the times up to it."""
        shift = self.model.shift_of(t)
        blocks = list(self.model.blocks)
        x = x.clone()
        for block in blocks[: self.front]:
            x = block(x, shift)
        shallow = x.clone()
        cache = self.caches.setdefault(stream, {"points": [], "previous": None, "change": 0.0})
        if cache["previous"] is not None and cache["previous"].shape == shallow.shape:
            before = cache["previous"]
            cache["change"] += ((shallow - before).abs().sum() / before.abs().sum()).item()
        cache["previous"] = shallow.clone()
        refresh = self.decides(cache, shallow, step, is_past_end)
        if refresh:
            for block in blocks[self.front : self.resume]:
                x = block(x, shift)
        else:
            x = self.estimate(cache["points"], shallow, step)
        deep = x.clone()
        for block in blocks[self.resume :]:
            x = block(x, shift)
        if refresh:
            cache["points"].append({"step": step, "deep": deep.clone(), "shallow": shallow.clone()})
            cache["change"] = 0.0
        self.plans[stream] = self.plans.get(stream, "") + ("F" if refresh else "r")
        return x

    def decides(self, cache, shallow, step, is_past_end) -> bool:
        if cache["points"] and cache["points"][-1]["shallow"].shape != shallow.shape:
            cache["points"].clear()
        if not cache["points"] or is_past_end:
            return True
        since = step - cache["points"][-1]["step"]
        return self.when.says_refresh(self.times[: step + 1], since, cache["change"])

    def estimate(self, points, shallow, step):
        last = points[-1]
        if self.estimator == "hold":
            return last["deep"].clone()
        if self.estimator == "residual":
            return last["deep"] + (shallow - last["shallow"])
        # Newton's divided differences, newest first, over the last order + 1 refreshes.
        order = {"taylor": 1, "taylor(2)": 2}[self.estimator]
        used = points[-(order + 1) :][::-1]
        table = [point["deep"] for point in used]
        value, product = table[0].clone(), 1.0
        for level in range(1, len(used)):
            table = [
                (table[i] - table[i + 1]) / (used[i]["step"] - used[i + level]["step"])
                for i in range(len(table) - 1)
            ]
            product *= step - used[level - 1]["step"]
            value = value + product * table[0]
        return value


# Where the next call stands: each way of telling steps, as its user would explain it.


@dataclass
class Call:
    """What the sampler does at one step."""

    batch: int
    failing_layer: int | None  # of the first stream that is asked


@dataclass
class SomeRun:
    steps: list[Call]
    gives_up: bool  # at its first exception; else it tries the whole step again
    begin: int  # of the scheduler's timesteps
    announced: int  # explicit: timesteps announced, fewer than made or more


@dataclass
class Scenario:
    depth: int
    works_in_place: bool
    front: int
    back: int
    when: object
    estimator: str
    streams: int
    runs: list[SomeRun]


units = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 0.9, 0.95, 1.0])
windows = st.sampled_from(
    [(1.0, 0.0), (0.9, 0.0), (1.0, 0.3), (0.9, 0.2), (0.95, 0.05), (0.7, 0.5)]
)
whens = st.one_of(
    st.builds(lambda n, w: Interval(n, *w), st.integers(1, 5), windows),
    st.builds(
        lambda named, more: Mask(tuple(sorted(named)), more and max(named) + more),
        st.sets(st.integers(0, 8), min_size=1, max_size=4),
        st.sampled_from([None, 1, 3]),
    ),
    st.builds(AtTimes, st.sets(units, min_size=1, max_size=3).map(tuple)),
    st.builds(
        lambda threshold, longest, window: Probe(threshold, longest, *window),
        st.sampled_from([0.0, 0.2, 0.5, 1.0, 5.0]),
        st.integers(1, 4),
        windows,
    ),
)
calls = st.builds(
    Call,
    batch=st.sampled_from([2, 2, 2, 2, 2, 1, 3]),
    failing_layer=st.sampled_from([None] * 20 + [0, 1, 2, 3]),
)
some_runs = st.builds(
    SomeRun,
    steps=st.lists(calls, min_size=2, max_size=9),
    gives_up=st.booleans(),
    begin=st.integers(0, 2),
    announced=st.integers(-2, 2),
)


@st.composite
def scenarios(draw) -> Scenario:
    depth = draw(st.integers(2, 6))
    front = draw(st.integers(0, depth - 2))
    back = draw(st.integers(1, depth - front - 1))
    return Scenario(
        depth,
        draw(st.booleans()),
        front,
        back,
        draw(whens),
        draw(st.sampled_from(["hold", "residual", "taylor", "taylor(2)"])),
        draw(st.integers(1, 3)),
        draw(st.lists(some_runs, min_size=1, max_size=3)),
    )


class Duel:
    """One model with the cache applied and one walked by the reference, given the same calls."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.model = Walker(scenario.depth, scenario.works_in_place)
        self.plain = copy.deepcopy(self.model)
        self.reference = Reference(
            self.plain, scenario.front, scenario.back, scenario.when, scenario.estimator
        )
        self.options = {
            "adapter": BACKBONE,
            "front_layers": scenario.front,
            "back_layers": scenario.back,
            "schedule": scenario.when.build(),
            "estimator": scenario.estimator,
        }
        self.inputs = torch.Generator().manual_seed(0)

    def call(
        self, x, t, failing_layer, step, stream, is_past_end=False, is_broken=False
    ) -> torch.Tensor | None:
        """One call of both; None where both raised. Broken: an earlier call of the step raised."""
        if failing_layer is not None and failing_layer < self.scenario.depth:
            for model in (self.model, self.plain):
                model.blocks[failing_layer].fails = True
        try:
            if is_broken:
                expected = self.reference.call_uncached(x, t)
            else:
                expected = self.reference.call(x, t, step, stream, is_past_end)
        except BlockFailed:
            expected = None
            self.reference.drop()
        try:
            found = self.model(x, t)
        except BlockFailed:
            found = None
        for block in (*self.model.blocks, *self.plain.blocks):
            block.fails = False
        assert (found is None) == (expected is None)
        assert self.counts(self.model) == self.counts(self.plain)
        if found is None:
            return None
        if self.scenario.estimator == "hold":
            assert torch.equal(found, expected)
        else:
            assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
        self.check_stats()
        return found

    def check_stats(self) -> None:
        stats = cache_stats(self.model)
        plans = self.reference.plans
        finished = {name: s.plan for name, s in stats.streams.items() if s.plan}
        assert finished == {str(stream): plan for stream, plan in plans.items()}
        depth, kept = self.scenario.depth, self.scenario.front + self.scenario.back
        assert stats.layers_run == sum(
            depth if letter == "F" else kept for plan in plans.values() for letter in plan
        )
        features = {"hold": 1, "residual": 2, "taylor": 2, "taylor(2)": 3}[self.scenario.estimator]
        if isinstance(self.scenario.when, Probe):
            features += 1
        limit = len(plans) * features * FULL_BATCH * TOKENS * WIDTH * 8
        assert 0 <= stats.cache_bytes <= limit

    @staticmethod
    def counts(model: Walker) -> list[int]:
        return [block.calls for block in model.blocks]

    def input(self, batch: int) -> torch.Tensor:
        return torch.randn(batch, TOKENS, WIDTH, dtype=torch.float64, generator=self.inputs)

    def finish(self) -> None:
        """With the cache taken off, both are the same model again."""
        assert remove_skip_cache(self.model)
        x = self.input(2)
        assert torch.equal(self.model(x, 500.0), self.plain(x, 500.0))


def falling(count: int) -> list[float]:
    return [1000.0 - index * (1000.0 // count) for index in range(count)]


@settings(deadline=None, max_examples=80, derandomize=True)
@given(scenarios(), st.booleans())
@torch.no_grad()
def test_explicit_runs_match_the_reference(scenario, knows_times):
    """Under skip_cache_run, with or without timesteps, every call does what the reference walk
    does.
    """
    duel = Duel(scenario)
    apply_skip_cache(duel.model, **duel.options)
    streams = scenario.streams
    for run in scenario.runs:
        announced = max(1, len(run.steps) + run.announced)
        timesteps = falling(announced) if knows_times else None
        made = falling(max(announced, len(run.steps)))
        duel.reference.begin_run()
        if knows_times:
            duel.reference.times = [t / 1000 for t in timesteps]
        count = 0
        with skip_cache_run(duel.model, streams, timesteps):
            for call, t in zip(run.steps, made, strict=False):
                has_failed = False
                for index in range(streams):
                    step, stream = divmod(count, streams)
                    if not knows_times and step == len(duel.reference.times):
                        duel.reference.times.append(t / 1000)
                    failing = call.failing_layer if index == 0 else None
                    is_past_end = knows_times and step >= announced
                    x = duel.input(call.batch)
                    output = duel.call(x, t, failing, step, stream, is_past_end)
                    count += output is not None  # a call that raised may be made again
                    has_failed = has_failed or output is None
                if has_failed and run.gives_up:
                    break
        duel.reference.drop()
    duel.finish()


@settings(deadline=None, max_examples=80, derandomize=True)
@given(scenarios(), st.sampled_from(["float", "scalar", "batch"]))
@torch.no_grad()
def test_bare_runs_match_the_reference(scenario, form):
    """Told by timestep values alone, a lower one is a step, the same one a stream, a higher one a
    run; where the number of calls a step changes, the step after it starts afresh.
    """
    duel = Duel(scenario)
    apply_skip_cache(duel.model, **duel.options)
    last_t, step, stream, passes, is_broken = -math.inf, 0, 0, 1, False
    for run in scenario.runs:
        for call, t in zip(run.steps, falling(len(run.steps)), strict=True):
            for failing in (call.failing_layer, None):
                has_failed = False
                for index in range(scenario.streams):
                    if t > last_t:
                        duel.reference.begin_run()
                        duel.reference.times, step, passes = [t / 1000], 0, 1
                    elif t < last_t:
                        if stream + 1 != passes:  # whose call was whose is not known
                            duel.reference.drop()
                        duel.reference.times.append(t / 1000)
                        step, passes = step + 1, stream + 1
                    stream = stream + 1 if t == last_t else 0
                    is_broken = is_broken and t == last_t
                    last_t = t
                    x, given_t = duel.input(call.batch), t
                    if form == "scalar":
                        given_t = torch.tensor(t)
                    elif form == "batch":
                        given_t = torch.full((call.batch,), t)
                    layer = failing if index == 0 else None
                    if duel.call(x, given_t, layer, step, stream, is_broken=is_broken) is None:
                        has_failed = is_broken = True
                        break
                if not has_failed or run.gives_up:
                    break
            if has_failed:
                break
    duel.finish()


@pytest.mark.parametrize("kind", SCHEDULERS)
@settings(deadline=None, max_examples=60, derandomize=True)
@given(scenario=scenarios())
@torch.no_grad()
def test_scheduled_runs_match_the_reference(kind, scenario):
    """In a sampling loop of a diffusers scheduler, every call does what the reference walk does."""
    make, config = SCHEDULERS[kind]
    duel = Duel(scenario)
    pipeline = Pipeline(duel.model, make(**config))
    apply_skip_cache(pipeline, **duel.options)
    for run in scenario.runs:
        scheduler = pipeline.scheduler
        scheduler.set_timesteps(len(run.steps) + 2)
        begin = 0
        if hasattr(scheduler, "set_begin_index") and len(scheduler.timesteps) > 5:
            begin = run.begin
            scheduler.set_begin_index(begin)
        timesteps = scheduler.timesteps[begin:]
        sample = duel.input(FULL_BATCH)
        reference = duel.reference
        reference.begin_run()
        reference.times = [float(t) / 1000 for t in timesteps]
        for step, (call, t) in enumerate(zip(run.steps, timesteps, strict=False)):
            outputs: list[torch.Tensor | None] = []
            is_broken = False
            for failing in (call.failing_layer, None):
                outputs = []
                for stream in range(scenario.streams):
                    x = sample[: call.batch] + stream
                    layer = failing if stream == 0 else None
                    outputs.append(duel.call(x, t, layer, step, stream, is_broken=is_broken))
                    if outputs[-1] is None:
                        is_broken = True  # whose turn it is cannot be told until the next step
                        break
                if None not in outputs:
                    break
                if run.gives_up:
                    break
            if None in outputs:
                break
            noise = torch.zeros_like(sample)
            noise[: call.batch] = 0.1 * torch.stack(outputs).mean(0)
            sample = scheduler.step(noise, t, sample).prev_sample
    duel.finish()
    assert "step" not in pipeline.scheduler.__dict__


@torch.no_grad()
@pytest.mark.parametrize("way", ["explicit", "bare", "scheduled"])
def test_a_retried_guidance_pass_never_reuses_the_other_one(way):
    """After one of two passes raised and was retried alone, neither is served the other one's
    feature.
    """
    model = Walker(4)
    plain = copy.deepcopy(model)
    pipeline = Pipeline(model, diffusers.DDIMScheduler())
    apply_skip_cache(pipeline, adapter=BACKBONE, schedule=MaskSchedule((0,), 9), estimator="hold")
    if way != "scheduled":
        pipeline.scheduler = None
    else:
        pipeline.scheduler.set_timesteps(4)
    timesteps = [750.0, 500.0, 250.0, 0.0]
    run = skip_cache_run(model, 2) if way == "explicit" else None
    if run is not None:
        run.__enter__()
    # Each pass has one input all along, so only its own feature gives its own deep part back.
    passes = [torch.full((1, TOKENS, WIDTH), value, dtype=torch.float64) for value in (0.3, -0.8)]
    owner: list[list[torch.Tensor]] = [[], []]  # outputs that a pass can have: of its own features
    for step, t in enumerate(timesteps):
        given_t = pipeline.scheduler.timesteps[step] if way == "scheduled" else t
        for index, x in enumerate(passes):
            if step == 1 and index == 1:
                model.blocks[3].fails = True
                with pytest.raises(BlockFailed):
                    model(x, given_t)
                model.blocks[3].fails = False
            found = model(x, given_t)
            owner[index].append(deep_of(plain, x, given_t))
            shift = plain.shift_of(given_t)
            own = [plain.blocks[3](deep, shift) for deep in owner[index]]
            assert any(torch.equal(found, output) for output in own), (step, index)
        if way == "scheduled":
            pipeline.scheduler.step(passes[0], given_t, passes[0])
    if run is not None:
        run.__exit__(None, None, None)


def deep_of(plain: Walker, x: torch.Tensor, t) -> torch.Tensor:
    """The feature entering the last layer, had every layer run."""
    for block in list(plain.blocks)[:-1]:
        x = block(x, plain.shift_of(t))
    return x
