"""Which run, which step, which stream: taps on schedulers, normalised times, and runs that do not
go to plan.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

from skipcache import (
    Backbone,
    BlockList,
    IntervalSchedule,
    MaskSchedule,
    SkipCacheError,
    Timestep,
    WholeCall,
    apply_skip_cache,
    cache_stats,
    is_skip_cached,
    remove_skip_cache,
    skip_cache_run,
)
from skipcache.errors import ConfigError, NotAppliedError, NotCachingWarning, TargetError
from skipcache.runtime.controller import controller_of
from skipcache.runtime.taps import SchedulerTap, normalised_times
from tiny import TINY

WIDTH = 4
BACKBONE = Backbone(
    "toy", (BlockList("blocks", takes=("x",), returns="x"),), timestep=Timestep("timestep")
)
ONCE = MaskSchedule((0,), steps=99)  # whatever is cached is reused for the rest of the run
ALWAYS_HOLD = {"adapter": BACKBONE, "schedule": ONCE, "estimator": "hold"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Transformer(nn.Module):
    """A stack without conditioning; ``timestep`` only tells the time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x, timestep=None):
        for block in self.blocks:
            x = block(x)
        return x


class Pipeline:
    def __init__(self, scheduler, transformer=None) -> None:
        self.transformer = Transformer() if transformer is None else transformer
        self.scheduler = scheduler

    @torch.no_grad()
    def __call__(self, steps=6, begin=0, tells_begin=True, stop_after=None, sample=None):
        """The loop of every diffusers pipeline; image to image leaves out the first timesteps."""
        self.scheduler.set_timesteps(steps)
        if begin and tells_begin:
            self.scheduler.set_begin_index(begin)
        sample = noise() if sample is None else sample
        outputs = []
        for count, t in enumerate(self.scheduler.timesteps[begin:]):
            outputs.append(self.transformer(sample, timestep=t.expand(sample.shape[0])))
            if stop_after == count:
                break
            self.scheduler.step(torch.zeros_like(sample), t, sample)
        return outputs


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(seed))


def clock_of(transformer):
    return controller_of(transformer).clock


def plan_of(target) -> str:
    return cache_stats(target).plan


SCHEDULERS = [
    diffusers.DDIMScheduler,
    diffusers.HeunDiscreteScheduler,
    diffusers.FlowMatchEulerDiscreteScheduler,
    diffusers.UniPCMultistepScheduler,
]

# The tap


@pytest.mark.parametrize("make", SCHEDULERS)
def test_tap_keeps_the_signature_of_step(make):
    """Pipelines inspect scheduler.step for eta and generator, and find what they found before."""
    scheduler = make()
    before = inspect.signature(scheduler.step)
    pipeline = apply_skip_cache(Pipeline(scheduler), **ALWAYS_HOLD)
    assert isinstance(scheduler.__dict__["step"], SchedulerTap)
    assert inspect.signature(scheduler.step) == before
    remove_skip_cache(pipeline)
    assert inspect.signature(scheduler.step) == before


@pytest.mark.parametrize("make", SCHEDULERS)
def test_remove_restores_the_scheduler(make):
    """Taken off, the cache leaves no attribute on the scheduler, and step is the method of the
    class again.
    """
    scheduler = make()
    before = list(scheduler.__dict__)
    pipeline = Pipeline(scheduler)
    for _ in range(2):
        apply_skip_cache(pipeline, **ALWAYS_HOLD)
        remove_skip_cache(pipeline)
        assert list(scheduler.__dict__) == before
        assert scheduler.step.__func__ is make.step


@pytest.mark.parametrize("times_applied", [2, 3])
def test_applying_again_does_not_pile_up_taps(times_applied):
    """However often the cache was applied, one removal takes the tap out, and one step is
    one tick.
    """
    pipeline = Pipeline(diffusers.DDIMScheduler())
    for _ in range(times_applied):
        apply_skip_cache(pipeline, **ALWAYS_HOLD)
    pipeline(steps=5)
    assert plan_of(pipeline) == "Frrrr"
    assert remove_skip_cache(pipeline)
    assert "step" not in pipeline.scheduler.__dict__


def test_remove_restores_a_step_that_somebody_else_put_there():
    """A step that was set on the instance is called under the tap and is there again afterwards."""
    scheduler = diffusers.DDIMScheduler()
    seen = []
    original = scheduler.step

    def logged(model_output, timestep, sample):
        seen.append(int(timestep))
        return original(model_output, timestep, sample)

    scheduler.step = logged
    pipeline = apply_skip_cache(Pipeline(scheduler), **ALWAYS_HOLD)
    pipeline(steps=4)
    assert seen == scheduler.timesteps.tolist()
    assert plan_of(pipeline) == "Frrr"
    remove_skip_cache(pipeline)
    assert scheduler.__dict__["step"] is logged


def test_tap_gives_back_what_step_gives():
    """Arguments and result of scheduler.step go through the tap untouched."""
    scheduler, plain = diffusers.DDIMScheduler(), diffusers.DDIMScheduler()
    apply_skip_cache(Pipeline(scheduler), **ALWAYS_HOLD)
    for one in (scheduler, plain):
        one.set_timesteps(5)
    args = (noise(1), scheduler.timesteps[1], noise(2))
    expected = plain.step(*args, eta=0.0, return_dict=False)[0]
    assert torch.equal(scheduler.step(*args, eta=0.0, return_dict=False)[0], expected)
    named = dict(zip(("model_output", "timestep", "sample"), args, strict=True))
    assert torch.equal(scheduler.step(**named).prev_sample, expected)


def test_tap_is_shared_and_leaves_with_its_last_user():
    """Two pipelines on one scheduler share a tap, which stays until both caches are off."""
    scheduler = diffusers.DDIMScheduler()
    first, second = Pipeline(scheduler), Pipeline(scheduler)
    for pipeline in (first, second):
        apply_skip_cache(pipeline, **ALWAYS_HOLD)
    tap = scheduler.__dict__["step"]
    remove_skip_cache(first)
    assert scheduler.__dict__["step"] is tap
    second(steps=5)
    assert plan_of(second) == "Frrrr"
    remove_skip_cache(second)
    assert "step" not in scheduler.__dict__


@pytest.mark.parametrize("make", SCHEDULERS)
def test_deepcopy_of_a_scheduler_ticks_on_its_own(make):
    """The copy's tap counts the copy's steps, and the original's those of the original."""
    scheduler = make()
    pipeline = apply_skip_cache(Pipeline(scheduler), **ALWAYS_HOLD)
    scheduler.set_timesteps(5)
    scheduler.step(noise(), scheduler.timesteps[0], noise())
    twin = copy.deepcopy(scheduler)
    assert twin.step.scheduler is twin
    assert (scheduler.step.ticks, twin.step.ticks) == (1, 1)
    for t in twin.timesteps[1:3]:
        twin.step(noise(), t, noise())
    assert (scheduler.step.ticks, twin.step.ticks) == (1, 3)
    assert scheduler.step.position == 1
    remove_skip_cache(pipeline)
    assert "step" not in scheduler.__dict__


@pytest.mark.parametrize("way", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copy_of_a_pipeline_follows_its_own_scheduler(way):
    """A copied pipeline caches by its own scheduler, mid-run or not, and both can be taken off."""
    pipeline = apply_skip_cache(Pipeline(diffusers.DDIMScheduler()), **ALWAYS_HOLD)
    pipeline(steps=6, stop_after=3)
    twin = way(pipeline)
    if way is not copy.deepcopy:
        apply_skip_cache(
            twin, **ALWAYS_HOLD
        )  # a pickled transformer follows no pipeline until told
    outputs = twin(steps=4, sample=noise(5))
    assert plan_of(twin) == "Frrr"
    assert plan_of(pipeline) == "Frrr"
    assert cache_stats(pipeline).reused == 3
    pipeline(steps=5)
    assert plan_of(pipeline) == "Frrrr"
    assert plan_of(twin) == "Frrr"
    assert remove_skip_cache(pipeline)
    assert is_skip_cached(twin)
    assert remove_skip_cache(twin)
    assert "step" not in twin.scheduler.__dict__
    with torch.no_grad():
        assert torch.equal(outputs[0], twin.transformer(noise(5)))


def test_scheduler_replaced_by_the_user():
    """A scheduler put in later is followed from its first run on, and the old one is let go."""
    pipeline = apply_skip_cache(Pipeline(diffusers.DDIMScheduler()), **ALWAYS_HOLD)
    pipeline(steps=4)
    old = pipeline.scheduler
    pipeline.scheduler = diffusers.UniPCMultistepScheduler()
    pipeline(steps=7)
    assert plan_of(pipeline) == "Frrrrrr"
    assert "step" not in old.__dict__
    remove_skip_cache(pipeline)
    assert "step" not in pipeline.scheduler.__dict__


class PlainScheduler:
    """Somebody's own scheduler: timesteps and a step, no config."""

    def __init__(self) -> None:
        self.timesteps = torch.linspace(1000, 0, 4)

    def set_timesteps(self, steps):
        self.timesteps = torch.linspace(1000, 0, steps)

    def step(self, model_output, timestep, sample):
        return sample


def test_scheduler_without_a_config():
    """A scheduler that is not diffusers' own needs timesteps and step, nothing else."""
    pipeline = apply_skip_cache(Pipeline(PlainScheduler()), **ALWAYS_HOLD)
    pipeline(steps=5)
    assert plan_of(pipeline) == "Frrrr"


def test_pipeline_that_takes_no_weak_reference():
    """A plain holder object is followed like a pipeline, or refused and left exactly as it was."""
    model = Transformer()
    holder = SimpleNamespace(transformer=model, scheduler=diffusers.DDIMScheduler())
    before = dict(model.__dict__), type(model.blocks), list(holder.scheduler.__dict__)
    try:
        apply_skip_cache(holder, **ALWAYS_HOLD)
    except SkipCacheError:
        after = dict(model.__dict__), type(model.blocks), list(holder.scheduler.__dict__)
        assert after == before
        assert not is_skip_cached(model)
    else:
        Pipeline.__call__(holder, steps=4)
        assert plan_of(model) == "Frrr"


# Times


@pytest.mark.parametrize(
    ("timesteps", "expected"),
    [
        ([999, 666, 333, 0], [0.999, 0.666, 0.333, 0.0]),
        ([1000.0, 500.0], [1.0, 0.5]),
        ([0.0, 250.0, 750.0], [1.0, 0.75, 0.25]),  # 1 - t, ascending
        ([999.0, 500.0, 500.0, 0.0], [0.999, 0.5, 0.5, 0.0]),  # Heun
        ([1.0955, 0.5686, -0.1888, -1.5537], [1.0, 0.75, 0.5, 0.25]),  # EDM: log sigmas
        ([80.0, float("inf")], [1.0, 0.5]),
        ([1000.4, 500.0], [1.0, 0.5]),  # rounding above
        ([700], [0.7]),
        ([], []),
    ],
)
def test_normalised_times(timesteps, expected):
    """Falling, rising and log-sigma timesteps all become times that fall from noise to clean,
    within 0..1.
    """
    times = normalised_times(timesteps, 1000)
    assert times == pytest.approx(expected)
    assert all(0.0 <= time <= 1.0 for time in times)
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(
    "make", [*SCHEDULERS, diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler]
)
@pytest.mark.parametrize("steps", [3, 6, 11])
def test_every_scheduler_is_followed_step_by_step(make, steps):
    """Whatever its timesteps look like, each of a scheduler's steps is one step of the plan."""
    schedule = MaskSchedule(tuple(range(0, 30, 3)))
    pipeline = apply_skip_cache(
        Pipeline(make()), adapter=BACKBONE, schedule=schedule, estimator="hold"
    )
    for _ in range(2):
        pipeline(steps=steps)
        count = len(pipeline.scheduler.timesteps)
        assert plan_of(pipeline) == "".join("F" if i % 3 == 0 else "r" for i in range(count))


@pytest.mark.parametrize("begin", [1, 3, 5])
@pytest.mark.parametrize(
    "make", [diffusers.FlowMatchEulerDiscreteScheduler, diffusers.UniPCMultistepScheduler]
)
def test_image_to_image_with_begin_index(make, begin):
    """A run that begins late and says so is a run of its own: first step full, times those that are
    left.
    """
    pipeline = apply_skip_cache(Pipeline(make()), **ALWAYS_HOLD)
    pipeline(steps=9, begin=begin)
    assert plan_of(pipeline) == "F" + "r" * (8 - begin)
    left = pipeline.scheduler.timesteps[begin:] / 1000
    times = controller_of(pipeline.transformer).last_run.times
    assert times == pytest.approx(left.tolist(), abs=1e-3)


@pytest.mark.parametrize("begin", [1, 3, 5])
def test_image_to_image_without_begin_index(begin):
    """A run that begins late without a word is found out at its second step, and has the right
    times.
    """
    pipeline = apply_skip_cache(Pipeline(diffusers.DDIMScheduler()), **ALWAYS_HOLD)
    outputs = pipeline(steps=9, begin=begin, tells_begin=False)
    assert len(outputs) == 9 - begin
    left = pipeline.scheduler.timesteps[begin:] / 1000
    times = controller_of(pipeline.transformer).last_run.times
    assert times == pytest.approx(left.tolist(), abs=1e-3)
    assert cache_stats(pipeline).reused >= 9 - begin - 2


def test_image_to_image_window_is_in_normalised_time():
    """The window of a run that begins late lies where it lies in a full run."""
    pipeline = Pipeline(diffusers.FlowMatchEulerDiscreteScheduler())
    schedule = IntervalSchedule(99, 0.65, 0.35)
    apply_skip_cache(pipeline, adapter=BACKBONE, schedule=schedule, estimator="hold")
    pipeline(steps=10)
    timesteps = [round(float(t)) for t in pipeline.scheduler.timesteps]
    full = plan_of(pipeline)
    reused = [t for t, letter in zip(timesteps, full, strict=True) if letter == "r"]
    assert reused == [556, 445, 334]
    pipeline(steps=10, begin=2)
    assert plan_of(pipeline) == full[2:]


def test_image_to_image_runs_share_nothing():
    """The first step of a run that begins late is never served from an earlier run that began
    earlier.
    """
    pipeline = apply_skip_cache(Pipeline(diffusers.DDIMScheduler()), **ALWAYS_HOLD)
    plain = copy.deepcopy(pipeline.transformer)
    remove_skip_cache(plain)
    for seed, begin in enumerate((2, 4, 6)):
        outputs = pipeline(steps=9, begin=begin, tells_begin=False, sample=noise(seed))
        with torch.no_grad():
            expected = plain(noise(seed))
        assert all(torch.equal(output, expected) for output in outputs), begin


# Runs that do not go to plan


def test_silent_scheduler_falls_back_to_timestep_values():
    """Where the scheduler is set up but somebody else does the sampling, the timestep values tell
    the steps.
    """
    pipeline = apply_skip_cache(Pipeline(diffusers.DDIMScheduler()), **ALWAYS_HOLD)
    for run in range(2):
        pipeline.scheduler.set_timesteps(12)
        with torch.no_grad():
            outputs = [pipeline.transformer(noise(run), t) for t in pipeline.scheduler.timesteps]
        assert cache_stats(pipeline).reused >= 10
        assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_silent_scheduler_and_a_model_without_time():
    """Called over and over with no tick and no timestep, nothing is reused, and the user
    is told.
    """
    backbone = Backbone("toy", BACKBONE.lists, timestep=None)
    pipeline = Pipeline(diffusers.DDIMScheduler())
    apply_skip_cache(pipeline, adapter=backbone, schedule=ONCE, estimator="hold")
    plain = copy.deepcopy(pipeline.transformer)
    remove_skip_cache(plain)
    pipeline.scheduler.set_timesteps(12)
    with torch.no_grad():
        with pytest.warns(NotCachingWarning, match="skip_cache_run"):
            outputs = [pipeline.transformer(noise(seed)) for seed in range(12)]
        assert all(torch.equal(output, plain(noise(seed))) for seed, output in enumerate(outputs))
    assert cache_stats(pipeline).reused == 0


@pytest.mark.parametrize("stop_after", [0, 1, 4])
@pytest.mark.parametrize("t", [999, 400, 3])
def test_a_bare_call_after_a_run_given_up(stop_after, t):
    """After a run was given up half-way, a bare call from elsewhere runs every layer."""
    pipeline = apply_skip_cache(Pipeline(diffusers.DDIMScheduler()), **ALWAYS_HOLD)
    plain = copy.deepcopy(pipeline.transformer)
    remove_skip_cache(plain)
    pipeline(steps=8, stop_after=stop_after)
    with torch.no_grad():
        found = pipeline.transformer(noise(7), torch.tensor([t]))
        assert torch.equal(found, plain(noise(7)))


@pytest.mark.parametrize("has_time", [True, False])
@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_scheduler_replaced_after_a_run_given_up(stop_after, has_time):
    """A run given up on a scheduler that has been replaced since does not stand in the way of the
    next run.
    """
    backbone = Backbone("toy", BACKBONE.lists, timestep=Timestep() if has_time else None)
    pipeline = Pipeline(diffusers.DDIMScheduler())
    apply_skip_cache(pipeline, adapter=backbone, schedule=ONCE, estimator="hold")
    plain = copy.deepcopy(pipeline.transformer)
    remove_skip_cache(plain)
    pipeline(steps=8, stop_after=stop_after)
    pipeline.scheduler = diffusers.DDIMScheduler()
    outputs = pipeline(steps=8, sample=noise(7))
    with torch.no_grad():
        assert all(torch.equal(output, plain(noise(7))) for output in outputs)
    assert plan_of(pipeline) == "Frrrrrrr"


@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_a_new_run_after_one_given_up(stop_after):
    """A run after one that was given up starts with a refresh of its own, at another length or the
    same.
    """
    pipeline = apply_skip_cache(Pipeline(diffusers.DDIMScheduler()), **ALWAYS_HOLD)
    plain = copy.deepcopy(pipeline.transformer)
    remove_skip_cache(plain)
    for seed, steps in enumerate((8, 8, 5)):
        pipeline(steps=steps, stop_after=stop_after, sample=noise(seed))
        outputs = pipeline(steps=steps, sample=noise(seed + 10))
        assert plan_of(pipeline) == "F" + "r" * (steps - 1)
        with torch.no_grad():
            assert torch.equal(outputs[0], plain(noise(seed + 10)))


def test_two_pipelines_on_one_transformer_never_share():
    """Runs of two pipelines, given up at any step, never serve each other's features or those of
    older runs.
    """
    transformer = Transformer()
    plain = copy.deepcopy(transformer)
    first = apply_skip_cache(Pipeline(diffusers.DDIMScheduler(), transformer), **ALWAYS_HOLD)
    second = Pipeline(diffusers.DDIMScheduler(), transformer)
    apply_skip_cache(second, **ALWAYS_HOLD)
    seed = 0
    for stop_after in (0, 3, 5):
        for pipeline, stop in ((first, stop_after), (second, None)):
            seed += 1
            outputs = pipeline(steps=8, stop_after=stop, sample=noise(seed))
            with torch.no_grad():
                expected = plain(noise(seed))
            assert all(torch.equal(output, expected) for output in outputs), (stop_after, stop)


def test_a_pipeline_inside_another_ones_loop():
    """A whole run between two steps of another run, on the same transformer, disturbs neither."""
    transformer = Transformer()
    plain = copy.deepcopy(transformer)
    outer = apply_skip_cache(Pipeline(diffusers.DDIMScheduler(), transformer), **ALWAYS_HOLD)
    inner = Pipeline(diffusers.DDIMScheduler(), transformer)
    apply_skip_cache(inner, **ALWAYS_HOLD)
    outer.scheduler.set_timesteps(10)
    with torch.no_grad():
        expected = plain(noise(1)), plain(noise(2))
        for index, t in enumerate(outer.scheduler.timesteps):
            assert torch.equal(transformer(noise(1), t), expected[0]), index
            if index == 4:
                outputs = inner(steps=7, sample=noise(2))
                assert all(torch.equal(output, expected[1]) for output in outputs)
            outer.scheduler.step(noise(), t, noise())


def test_streams_by_call_order_and_by_name():
    """Two calls a step are two streams, by their order, or by the name that cache_context gives."""

    class Named(Transformer):
        def cache_context(self, name):
            from contextlib import nullcontext

            return nullcontext(name)

    for is_named in (False, True):
        pipeline = Pipeline(diffusers.DDIMScheduler(), Named())
        apply_skip_cache(pipeline, **ALWAYS_HOLD)
        transformer = pipeline.transformer
        plain = copy.deepcopy(transformer)
        remove_skip_cache(plain)
        pipeline.scheduler.set_timesteps(5)
        with torch.no_grad():
            for index, t in enumerate(pipeline.scheduler.timesteps):
                order = ("cond", "uncond") if index % 2 == 0 or not is_named else ("uncond", "cond")
                for name in order:
                    x = noise(1 if name == "cond" else 2)
                    if is_named:
                        with transformer.cache_context(name):
                            found = transformer(x, t)
                    else:
                        found = transformer(x, t)
                    assert torch.equal(found, plain(x)), (is_named, index, name)
                pipeline.scheduler.step(noise(), t, noise())
        stats = cache_stats(pipeline)
        assert list(stats.streams) == (["cond", "uncond"] if is_named else ["0", "1"])
        assert stats.plan == "Frrrr"
        remove_skip_cache(pipeline)
        assert "cache_context" not in transformer.__dict__


# Misuse of skip_cache_run


@pytest.mark.parametrize("streams", [0, -1, 1.0, True, "2", None])
def test_run_refuses_bad_streams(streams):
    """A number of streams that cannot be is a ConfigError that names it and what is allowed."""
    transformer = apply_skip_cache(Transformer(), **ALWAYS_HOLD)
    with (
        pytest.raises(ConfigError, match="at least 1") as caught,
        skip_cache_run(transformer, streams),
    ):
        pass
    assert repr(streams) in str(caught.value)
    assert not clock_of(transformer).explicit


@pytest.mark.parametrize(
    "timesteps", [[999.0, float("nan")], [float("inf")], [], torch.tensor([float("nan"), 1.0])]
)
def test_run_refuses_bad_timesteps(timesteps):
    """Timesteps that are not finite, or none at all, are a ConfigError."""
    transformer = apply_skip_cache(Transformer(), **ALWAYS_HOLD)
    with (
        pytest.raises(ConfigError, match="at least one, and all finite"),
        skip_cache_run(transformer, timesteps=timesteps),
    ):
        pass
    assert not clock_of(transformer).explicit


def test_run_needs_an_applied_cache():
    """skip_cache_run on a model without a cache says to apply one; on something else, what it
    needs.
    """
    with pytest.raises(NotAppliedError, match="apply_skip_cache"), skip_cache_run(Transformer()):
        pass
    with pytest.raises(TargetError, match="transformer"), skip_cache_run(object()):
        pass


@pytest.mark.parametrize("timesteps", [[900, 600, 300], torch.tensor([900, 600, 300])])
def test_run_with_timesteps_of_any_kind(timesteps):
    """Timesteps may be a list or a tensor; the plan follows them, and further calls refresh."""
    transformer = apply_skip_cache(
        Transformer(), adapter=BACKBONE, schedule=IntervalSchedule(9, 0.8, 0.1), estimator="hold"
    )
    with torch.no_grad(), skip_cache_run(transformer, timesteps=timesteps):
        for seed in range(5):
            transformer(noise(seed))
    assert plan_of(transformer) == "FrrFF"


def test_nested_runs_keep_apart():
    """A run inside a run has caches of its own, and the outer one goes on afterwards
    where it was.
    """
    transformer = apply_skip_cache(Transformer(), **ALWAYS_HOLD)
    plain = copy.deepcopy(transformer)
    remove_skip_cache(plain)
    with torch.no_grad(), skip_cache_run(transformer):
        transformer(noise(1))
        with skip_cache_run(transformer):
            assert torch.equal(transformer(noise(2)), plain(noise(2)))
            assert torch.equal(transformer(noise(3)), plain(noise(2)))
        assert torch.equal(transformer(noise(4)), plain(noise(1)))
    assert plan_of(transformer) == "Fr"


def test_run_ends_with_its_block():
    """After the with block, also one left by an exception, nothing of the run is kept or reused."""
    transformer = apply_skip_cache(Transformer(), **ALWAYS_HOLD)

    def leave_early():
        with skip_cache_run(transformer):
            transformer(noise(1))
            raise KeyError("sampler")

    with torch.no_grad():
        with pytest.raises(KeyError):
            leave_early()
        assert not clock_of(transformer).explicit
        with skip_cache_run(transformer):
            transformer(noise(2))
        assert plan_of(transformer) == "F"
    held = [t for s in controller_of(transformer).last_run.streams.values() for t in s.refreshes]
    assert held == []


# Passes that are away for a while


class Named(Transformer):
    def cache_context(self, name):
        from contextlib import nullcontext

        return nullcontext(name)


SPARSE = MaskSchedule((0, 3), steps=6)  # FrrFrr


@torch.no_grad()
def passes(transformer, scheduler, away: set[int], names=("cond", "extra")) -> list[int]:
    """A run of six steps in which the second pass leaves some steps out; how many features it has
    in its cache after each.
    """
    held = []
    values = scheduler.timesteps if scheduler is not None else torch.arange(6, 0, -1) * 160.0
    for index, t in enumerate(values):
        for name in names[: 1 if index in away else 2]:
            with transformer.cache_context(name):
                transformer(noise(index), t)
        if scheduler is not None:
            scheduler.step(noise(), t, noise())
        stream = controller_of(transformer).last_run.streams.get("extra")
        held.append(len(stream.refreshes) if stream is not None else 0)
    return held


@pytest.mark.parametrize("has_scheduler", [True, False])
@pytest.mark.parametrize(
    ("away", "plan"),
    [
        (set(), "FrrFrr"),
        ({1}, "FrFrr"),  # away at a reuse: nothing is missed
        ({3}, "FrrFr"),  # at the refresh: made up for at step 4
        ({2, 3, 4}, "FrF"),
        ({3, 4, 5}, "Frr"),
        ({0}, "FrFrr"),
        ({0, 1, 2, 3}, "Fr"),
    ],
)
def test_pass_that_was_away_at_a_refresh(has_scheduler, away, plan):
    """A pass that comes back after a refresh that it was not there for refreshes then, and not from
    a feature older than the schedule allows; the pass that was always there goes by the plan.
    """
    transformer = Named()
    options = {"adapter": BACKBONE, "schedule": SPARSE, "estimator": "hold"}
    scheduler = diffusers.DDIMScheduler() if has_scheduler else None
    # Of the whole run: weak references keep a pipeline only as long as somebody does.
    pipeline = apply_skip_cache(
        Pipeline(scheduler, transformer) if scheduler else transformer, **options
    )
    if scheduler is not None:
        scheduler.set_timesteps(6)
    passes(transformer, scheduler, away)
    plans = {name: stream.plan for name, stream in cache_stats(pipeline).streams.items()}
    assert plans == {"cond": "FrrFrr", "extra": plan}


def test_pass_that_is_away_holds_nothing():
    """What a pass has cached is let go at the refresh that it misses, and after the last reuse of
    the run, whether it ever comes back or not.
    """
    pipeline = Pipeline(diffusers.DDIMScheduler(), Named())
    apply_skip_cache(pipeline, adapter=BACKBONE, schedule=SPARSE, estimator="hold")
    for away, held in (({3, 4, 5}, [1, 1, 1, 0, 0, 0]), ({1, 2}, [1, 1, 1, 1, 1, 0])):
        pipeline.scheduler.set_timesteps(6)
        assert passes(pipeline.transformer, pipeline.scheduler, away) == held
    once = MaskSchedule((0, 2, 3, 4, 5), steps=6)
    apply_skip_cache(pipeline, adapter=BACKBONE, schedule=once, estimator="hold")
    pipeline.scheduler.set_timesteps(6)
    assert passes(pipeline.transformer, pipeline.scheduler, {1, 2, 3, 4, 5})[:3] == [1, 0, 0]


def test_a_step_in_two_calls_of_the_scheduler():
    """A pipeline that calls ``step`` twice at one timestep (Cosmos: for each guidance pass) makes
    one step; with few steps and many, in a first run and in one after it.
    """
    pipeline = apply_skip_cache(
        Pipeline(diffusers.FlowMatchEulerDiscreteScheduler()), **ALWAYS_HOLD
    )
    scheduler = pipeline.scheduler
    for steps in (5, 1, 2):
        scheduler.set_timesteps(steps)
        with torch.no_grad():
            for count, t in enumerate(scheduler.timesteps, start=1):
                for x in (noise(1), noise(2)):
                    pipeline.transformer(x, t)
                for x in (noise(1), noise(2)):
                    scheduler.step(torch.zeros_like(x), t, x)
                    scheduler._step_index -= 1
                assert scheduler.step.ticks == count
                scheduler._step_index += 1
        assert cache_stats(pipeline).plan == "F" + "r" * (steps - 1)
        assert list(cache_stats(pipeline).streams) == ["0", "1"]


def test_copy_of_a_tap_tells_runs_of_its_own():
    """A scheduler copied or pickled in the middle of a run does not tell the original's runs."""
    pipeline = apply_skip_cache(Pipeline(diffusers.DDIMScheduler()), **ALWAYS_HOLD)
    pipeline(steps=6, stop_after=2)
    tap = pipeline.scheduler.step
    assert len(tap.runs) == 1
    for twin in (copy.deepcopy(pipeline.scheduler), pickle.loads(pickle.dumps(pipeline.scheduler))):
        assert len(twin.step.runs) == 0
        held = controller_of(pipeline.transformer).last_run.streams[0].refreshes
        for t in twin.timesteps[2:]:
            twin.step(noise(), t, noise())
        assert len(held) == 1
        assert tap.ticks == 2


# Calls that are no step


@torch.no_grad()
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize(
    ("rule", "given", "is_step"),
    [
        (WholeCall("mode", "fill"), "fill", False),
        (WholeCall("mode", "fill"), "go", True),
        (WholeCall("mode", "fill"), None, True),
        (WholeCall("mode", True), True, False),
        (WholeCall("mode", True), 1, True),
        (WholeCall("mode", True, item="fills"), {"fills": True}, False),
        (WholeCall("mode", True, item="fills"), {"fills": False}, True),
        (WholeCall("mode", True, item="fills"), {}, True),
        (WholeCall("mode", True, item="fills"), True, True),
        (WholeCall("mode", 2), torch.ones(3), True),
    ],
)
def test_whole_calls(rule, given, is_step, by_name):
    """A call that the adapter says is no step runs every layer and is not counted; any other value
    of the same argument makes it a step.
    """

    class Filling(Transformer):
        def forward(self, x, timestep=None, mode=None):
            return super().forward(x)

    transformer, x = Filling(), noise()
    backbone = Backbone("toy", BACKBONE.lists, Timestep("timestep"), whole_calls=(rule,))
    schedule = MaskSchedule((0, 2), steps=5)
    apply_skip_cache(transformer, adapter=backbone, schedule=schedule, estimator="hold")
    ran: list[int] = []
    transformer.blocks[2].register_forward_hook(lambda *_: ran.append(1))
    with skip_cache_run(transformer):
        transformer(x)
        args, kwargs = ((x,), {"mode": given}) if by_name else ((x, None, given), {})
        transformer(*args, **kwargs)
        assert len(ran) == (1 if is_step else 2)
        transformer(x)
        transformer(x)
    assert plan_of(transformer) == ("FrFr" if is_step else "FrF")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:\\s*flex_attention called without torch.compile")
def test_cache_of_keys_and_values_is_filled_whole():
    """AnyFlow FAR in a loop of one's own: between two chunks all blocks fill its cache of keys and
    values, with just what an uncached model fills in, and the plan of the steps does not notice.
    """
    tiny = TINY["AnyFlowFARTransformer3DModel"]
    filled = {}
    for is_cached in (False, True):
        model = tiny.make()
        if is_cached:
            apply_skip_cache(model, interval=3, window=(1.0, 0.0), estimator="hold")
        caches = tiny.inputs(0)["kv_cache"]
        for t in (999.0, 800.0, None, 600.0, 400.0, 200.0):
            inputs = tiny.inputs(0)
            if t is None:
                inputs |= {
                    "hidden_states": torch.ones(1, 3, 4, 4, 4),
                    "timestep": torch.zeros(1, 3),
                    "r_timestep": torch.zeros(1, 3),
                    "kv_cache": caches,
                    "kv_cache_flag": {"num_cached_chunks": 0, "is_cache_step": True},
                }
            else:
                inputs["timestep"] = torch.full((1, 2), t)
            model(**inputs)
        filled[is_cached] = caches
        if is_cached:
            assert plan_of(model) == "FrrFr"
    noise_there = tiny.inputs(0)["kv_cache"]
    for layer, cache in filled[True].items():
        for name, tensor in cache.items():
            assert torch.equal(tensor, filled[False][layer][name])
        assert not torch.equal(cache["full_cache"], noise_there[layer]["full_cache"])
