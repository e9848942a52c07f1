"""Faults seen in other caching libraries, each of which must not be ours.

One test or more for each row of the list that test_invariants.py and test_orders.py do not cover.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import warnings
import weakref
from typing import ClassVar

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from torch import nn

from pipelines import (
    ALWAYS_OPEN,
    KINDS,
    LAYERS,
    STEPS,
    Provenance,
    apply_to,
    backbone_of,
    build,
    cached,
    call_of,
    counted_layers,
    flux_call,
    reference,
    sample,
    transformer_of,
)
from skipcache import (
    Backbone,
    BlockList,
    Hold,
    IntervalSchedule,
    MaskSchedule,
    ProbeSchedule,
    SkipCacheConfig,
    SkipCacheError,
    SkipCacheWarning,
    Taylor,
    apply_skip_cache,
    cache_stats,
    is_skip_cached,
    remove_skip_cache,
    skip_cache,
    skip_cache_run,
)
from skipcache.errors import ConfigError, NotCachingWarning, UnknownOptionError
from skipcache.evaluation.metrics import psnr

TIMES = [1.0 - i / STEPS for i in range(STEPS)]


def flux(**options):
    """A bare, cached Flux transformer."""
    options = {"interval": 3, "window": ALWAYS_OPEN, "estimator": "hold", **options}
    return apply_skip_cache(transformer_of("flux"), adapter=backbone_of("flux"), **options)


def bare_loop(model, seed=0, times=TIMES, batch=1):
    """A research sampler: nothing announces a run, only the timestep falls."""
    latents = flux_call(seed, batch)["hidden_states"]
    with torch.no_grad():
        for time in times:
            call = {**flux_call(seed, batch, time), "hidden_states": latents}
            latents = latents - 0.3 * model(**call)[0]
    return latents


# Row: uses the transformer alone, second request.


@pytest.mark.parametrize("options", [{}, {"interval": 4}, {"window": (0.9, 0.1)}], ids=str)
def test_bare_transformer_second_request(options):
    """Requests to a bare transformer one after the other do not drift: each gives what it gives
    alone.
    """
    expected = [bare_loop(flux(**options), seed) for seed in range(4)]
    model = flux(**options)
    plans = set()
    for seed in range(4):
        assert torch.equal(bare_loop(model, seed), expected[seed]), seed
        plans.add(cache_stats(model).plan)
    assert len(plans) == 1
    assert "r" in plans.pop()


def test_bare_transformer_requests_of_other_lengths():
    """A bare request of other steps, or of another batch size, starts on an empty cache."""
    model = flux()
    for times, batch in [(TIMES, 1), (TIMES[:2], 1), (TIMES, 3), (TIMES[::2], 1), (TIMES, 1)]:
        expected = bare_loop(flux(), 1, times, batch)
        assert torch.equal(bare_loop(model, 1, times, batch), expected)


def test_bare_transformer_after_a_single_call():
    """A single call, to warm up or by hand, at the timestep at which the next request begins: no
    stale reuse.
    """
    model = flux()
    watch = Provenance(model)
    watch.owner = "warm-up"
    with torch.no_grad():
        model(**flux_call(seed=7, time=TIMES[0]))
    watch.owner = "request"
    bare_loop(model, seed=1)
    assert watch.reused > 0
    assert watch.foreign == []


# Row: applies again with other settings.


@pytest.mark.parametrize("kind", KINDS)
def test_applying_again_replaces_the_settings(kind):
    """The last settings hold, whole: what an earlier application had set and this one does not is
    the default.
    """
    pipe = cached(kind, interval=2, front_layers=2)
    sample(pipe)
    assert cache_stats(pipe).plan == "FrFrFr"
    apply_to(pipe, interval=3)
    assert cache_stats(pipe).plan == ""
    with counted_layers(pipe.transformer) as counts:
        assert torch.equal(sample(pipe), reference(kind))
    assert cache_stats(pipe).plan == "FrrFrr"
    assert [counts[0, i] for i in range(LAYERS)] == [STEPS, 2, 2, 2, 2, STEPS]
    assert remove_skip_cache(pipe)
    assert not remove_skip_cache(pipe)


def test_applying_again_in_the_middle_of_a_run():
    """New settings between two steps start on an empty cache, and the next run follows them from
    its start.
    """
    pipe = cached("pixart", interval=2)
    watch = Provenance(pipe.transformer)
    watch.owner = "old"

    def apply_again(made):
        if made == 3:
            apply_to(pipe, interval=3)
            watch.owner = "new"

    sample(pipe, after_step=apply_again)
    assert watch.foreign == []
    assert torch.equal(sample(pipe), reference("pixart"))


def test_context_manager_puts_back_what_was_applied():
    """``skip_cache`` replaces the settings for its block, also when that raises, and the earlier
    ones return.
    """
    pipe = cached("pixart")
    sample(pipe)
    options = {"interval": 1, "adapter": backbone_of("pixart")}

    def run_and_fail():
        with skip_cache(pipe, **options):
            assert torch.equal(sample(pipe), reference("pixart", estimator=None))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_and_fail()
    assert torch.equal(sample(pipe), reference("pixart"))
    assert cache_stats(pipe).plan == "FrrFrr"
    assert remove_skip_cache(pipe)
    with skip_cache(pipe, **options):
        assert is_skip_cached(pipe)
    assert not is_skip_cached(pipe)


# Row: gives a step mask shorter than the run.


@pytest.mark.parametrize(
    ("mask", "plan"),
    [
        (MaskSchedule((0, 2)), "FrFrFFFFFFFF"),
        (MaskSchedule((0, 3), steps=5), "FrrFrFFFFFFF"),
        (MaskSchedule((0,), steps=2), "FrFFFFFFFFFF"),
        (MaskSchedule((0,)), "FFFFFFFFFFFF"),
    ],
)
def test_mask_shorter_than_the_run(mask, plan):
    """Steps past the end of a mask refresh: they are not served from the cache for the rest of the
    run.
    """
    pipe = cached("pixart", schedule=mask)
    sample(pipe, 12)
    assert cache_stats(pipe).plan == plan


@pytest.mark.parametrize("announced", [False, True])
def test_mask_shorter_than_a_bare_run(announced):
    """The same on a bare transformer, whether or not the run is announced."""
    model = flux(interval=None, window=None, schedule=MaskSchedule((0, 2)))
    if announced:
        with skip_cache_run(model):
            bare_loop(model)
    else:
        bare_loop(model)
    assert cache_stats(model).plan == "FrFrFF"


# Row: first + last blocks overlap.


@pytest.mark.parametrize(("front", "back"), [(3, 3), (5, 1), (4, 3), (0, 6), (6, 6)])
def test_overlapping_front_and_back(front, back):
    """Front and back that meet or overlap are refused with both numbers and the depth."""
    pipe = build("pixart")
    with pytest.raises(
        ConfigError, match=rf"front_layers={front} and back_layers={back}.*6 layers"
    ):
        apply_to(pipe, front_layers=front, back_layers=back)
    assert not is_skip_cached(pipe)


# Row: misspells an option.


def test_misspelt_options():
    """A misspelt option is an error at every door, and nothing is applied."""
    pipe = build("pixart")
    with pytest.raises(UnknownOptionError, match="Did you mean 'estimator'"):
        apply_to(pipe, estimater="hold")
    with (
        pytest.raises(UnknownOptionError, match="Did you mean 'back_layers'"),
        skip_cache(pipe, back_layer=1, adapter=backbone_of("pixart")),
    ):
        pass
    with pytest.raises(TypeError, match="intervall"):
        SkipCacheConfig(intervall=2)
    with pytest.raises(ConfigError, match="Did you mean 'residual'"):
        SkipCacheConfig(estimator="residuals")
    assert not is_skip_cached(pipe)


# Row: passes a config object.


def test_config_object_is_not_mutated():
    """A config stays as it was, can be shared by pipelines that run inside one another, and options
    go before it.
    """
    config = SkipCacheConfig(schedule=IntervalSchedule(3), estimator=Taylor(1), front_layers=1)
    before = dataclasses.asdict(config)
    outer, inner = build("pixart"), build("pixart", seed=1)
    for pipe in (outer, inner):
        apply_to(pipe, config=config)
    results = []
    run_inner = {2: lambda: results.append(sample(inner, seed=5))}
    outer_result = sample(outer, after_step=lambda made: run_inner.get(made, int)())
    assert torch.equal(outer_result, reference("pixart", estimator="taylor"))
    assert torch.equal(results[0], reference("pixart", seed=5, weights=1, estimator="taylor"))
    apply_to(outer, config=config, front_layers=2)
    with counted_layers(outer.transformer) as counts:
        sample(outer)
    assert counts[0, 1] == STEPS
    assert dataclasses.asdict(config) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.front_layers = 3


# Row: blocks that work in place.


class ToyBlock(nn.Module):
    """Adds to its input, in place or not; the sum is the same."""

    def __init__(self, width, in_place):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.in_place = in_place

    def forward(self, x, scale):
        change = torch.tanh(self.linear(x)) * scale
        return x.add_(change) if self.in_place else x + change


class ToyTransformer(nn.Module):
    """The shape of a denoiser in research code: embed, a loop over blocks, head."""

    def __init__(self, in_place=False, is_indexed=False, layers=LAYERS, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList([ToyBlock(width, in_place) for _ in range(layers)])
        self.head = nn.Linear(width, 4)
        self.is_indexed = is_indexed

    def forward(self, x, timestep=None):
        x = self.embed(x)
        scale = 1.0 if timestep is None else 0.5 + timestep / 1000
        if self.is_indexed:
            for i in range(len(self.blocks)):
                x = self.blocks[i](x, scale)
        else:
            for block in self.blocks:
                x = block(x, scale)
        return self.head(x)


TOY = Backbone("toy", (BlockList("blocks", takes=("x",), returns="x"),))


def toy(**options):
    in_place = options.pop("in_place", False)
    if "schedule" not in options:
        options = {"interval": 3, "window": ALWAYS_OPEN, **options}
    return apply_skip_cache(ToyTransformer(in_place), adapter=TOY, **options)


def toy_loop(model, steps=STEPS):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3))
    outputs = []
    with torch.no_grad():
        for step in range(steps):
            out = model(x, 1000.0 - step * 1000 / steps)
            x = x - 0.2 * out
            outputs.append(out)
    return torch.stack(outputs)


@pytest.mark.parametrize("span", [(0, 1), (1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "hold"},
        {"estimator": "residual"},
        {"estimator": "taylor"},
        {"estimator": "taylor(2)"},
        {"estimator": "taylor(0)"},
        {"estimator": "residual", "schedule": ProbeSchedule(0.3)},
        {"estimator": "hold", "schedule": ProbeSchedule(0.3)},
    ],
    ids=str,
)
def test_blocks_that_work_in_place(options, span):
    """In-place blocks never write into the cache or the measured change: the output is that of out-
    of-place ones.
    """
    options = {**options, "front_layers": span[0], "back_layers": span[1]}
    plain, in_place = toy(**options), toy(in_place=True, **options)
    for _ in range(2):
        assert torch.equal(toy_loop(in_place, 9), toy_loop(plain, 9))
        plan = cache_stats(plain).plan
        assert cache_stats(in_place).plan == plan
        assert {"F", "r"} == set(plan)


# Row: trains with the cache on.


@pytest.mark.parametrize("kind", [*KINDS, "flux"])
def test_training_with_the_cache_on(kind):
    """With gradients on every layer runs, gradients are those of the uncached model, and a warning
    says so once.
    """
    if kind == "flux":
        plain, model = transformer_of("flux"), flux()
        calls = [((), flux_call(seed)) for seed in range(2)]
    else:
        pipe = cached(kind)
        sample(pipe)
        plain, model = transformer_of(kind), pipe.transformer
        calls = [call_of(build(kind), seed=seed) for seed in range(2)]
    for args, kwargs in calls:
        plain(*args, **kwargs)[0].square().mean().backward()

    def train():
        for args, kwargs in calls:
            model(*args, **kwargs)[0].square().mean().backward()

    with pytest.warns(NotCachingWarning, match="gradients are on") as caught:
        train()
    assert len(caught) == 1
    expected = {name: p.grad for name, p in plain.named_parameters()}
    assert sum(grad is not None for grad in expected.values()) > 10
    for name, parameter in model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
        else:
            assert torch.equal(parameter.grad, expected[name]), name
    if kind != "flux":
        assert torch.equal(sample(pipe), reference(kind))


def test_training_with_gradient_checkpointing():
    """Recomputed blocks are the real ones too: checkpointing under an applied cache gives the plain
    gradients.
    """
    plain, model = transformer_of("pixart").train(), cached("pixart").transformer.train()
    args, kwargs = call_of(build("pixart"))
    model.enable_gradient_checkpointing()
    plain(*args, **kwargs)[0].square().mean().backward()
    with pytest.warns(NotCachingWarning):
        model(*args, **kwargs)[0].square().mean().backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)


# Rows: TaylorSeer hooks nothing and says nothing; "why is nothing cached".


def test_no_step_to_tell_is_not_silent():
    """A bare call that says no time warns that nothing is cached and what to do, once, and runs
    every layer.
    """
    model = toy()
    x = torch.randn(1, 3, 4)
    with torch.no_grad():
        expected = ToyTransformer()(x)
        with pytest.warns(NotCachingWarning, match="skip_cache_run") as caught:
            outputs = [model(x) for _ in range(3)]
    assert len(caught) == 1
    assert all(torch.equal(output, expected) for output in outputs)
    with torch.no_grad(), warnings.catch_warnings(), skip_cache_run(model):
        warnings.simplefilter("error")
        outputs = [model(x) for _ in range(3)]
    assert cache_stats(model).plan == "Frr"
    assert torch.equal(outputs[2], expected)


def test_window_without_a_time_is_not_silent():
    """A schedule with a window in a run that says no times warns that it refreshes at every
    step.
    """
    model = toy(window=(0.9, 0.1))

    def run():
        with torch.no_grad(), skip_cache_run(model):
            for _ in range(3):
                model(torch.randn(1, 3, 4))

    with pytest.warns(NotCachingWarning, match="window"):
        run()
    assert cache_stats(model).plan == "FFF"


def test_blocks_that_are_not_iterated_are_not_silent():
    """A model that indexes its blocks runs them all: that is said, and the stats do not claim
    reuse.
    """
    model = ToyTransformer(is_indexed=True)

    def apply_and_run():
        apply_skip_cache(model, interval=3, window=ALWAYS_OPEN, estimator="hold", adapter=TOY)
        return toy_loop(model)

    with pytest.warns(SkipCacheWarning):
        output = apply_and_run()
    assert torch.equal(output, toy_loop(ToyTransformer()))
    assert cache_stats(model).reused == 0
    assert cache_stats(model).compute_fraction == 1.0


def test_list_that_the_forward_does_not_use_is_not_silent():
    """An adapter that names a list that the forward never walks is told so; the stats do not claim
    reuse.
    """
    model = ToyTransformer()
    model.spare = nn.ModuleList([ToyBlock(8, False) for _ in range(LAYERS)])
    spare = Backbone("spare", (BlockList("spare", takes=("x",), returns="x"),))

    def apply_and_run():
        apply_skip_cache(model, interval=3, window=ALWAYS_OPEN, estimator="hold", adapter=spare)
        toy_loop(model)

    with pytest.warns(SkipCacheWarning):
        apply_and_run()
    assert cache_stats(model).reused == 0


def test_every_real_pipeline_really_reuses():
    """Applied with nothing but an adapter, each pipeline reuses in most steps and says nothing."""
    for kind in KINDS:
        pipe = apply_skip_cache(build(kind), adapter=backbone_of(kind))
        with counted_layers(pipe.transformer) as counts:
            sample(pipe, 10)
        stats = cache_stats(pipe)
        assert stats.reused >= 4
        assert counts[0, 2] == stats.refreshed == 10 - stats.reused


# Row: a schedule tied to num_inference_steps.


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_few_step_models(kind, steps):
    """Models of one, two or four steps follow the schedule from their first step to their last, run
    after run.
    """
    pipe = cached(kind, interval=2)
    for _ in range(2):
        sample(pipe, steps)
        assert cache_stats(pipe).plan == "FrFr"[:steps]


@pytest.mark.parametrize("steps", [3, 10])
def test_two_calls_a_step_follow_normalised_time(steps):
    """Under Heun a schedule in normalised time refreshes at the same times, however many calls a
    step makes.
    """
    pipe = build("pixart", scheduler=HeunDiscreteScheduler())
    apply_to(pipe, schedule=IntervalSchedule(2, 0.7, 0.2))
    sample(pipe, steps)
    plan = cache_stats(pipe).plan
    times = [float(t) / 1000 for t in pipe.scheduler.timesteps]
    assert len(plan) == len(times) == 2 * steps - 1
    for i, (letter, time) in enumerate(zip(plan, times, strict=True)):
        is_inside = time < 0.7 and not any(earlier <= 0.2 for earlier in times[:i])
        assert letter == ("r" if is_inside and i % 2 else "F"), i


# Row: TaylorSeer on large models: size of the cache, sign of the offset.


class PolynomialToy(nn.Module):
    """A model whose deep feature is a polynomial of the step, whatever the input, so extrapolation
    can be exact.
    """

    class Front(nn.Module):
        def forward(self, x, value):
            return torch.zeros_like(x)

    class Deep(nn.Module):
        def forward(self, x, value):
            return x + value

    class Back(nn.Module):
        def forward(self, x, value):
            return x

    def __init__(self, polynomial):
        super().__init__()
        self.blocks = nn.ModuleList([self.Front(), self.Deep(), self.Deep(), self.Back()])
        self.polynomial = polynomial

    def forward(self, x, step):
        value = self.polynomial(step)
        for block in self.blocks:
            x = block(x, value)
        return x


@pytest.mark.parametrize(
    ("estimator", "polynomial", "exact_from"),
    [
        ("hold", lambda step: 3.0, 0),
        ("taylor", lambda step: 4.0 - 1.5 * step, 3),
        ("taylor(2)", lambda step: 1.0 + 2.0 * step - 0.25 * step**2, 7),
        ("taylor(2)", lambda step: 4.0 - 1.5 * step, 3),
    ],
)
def test_taylor_looks_forward(estimator, polynomial, exact_from):
    """A feature that is a polynomial of the step is extrapolated exactly, at irregular spacing, in
    the right direction.
    """
    model = apply_skip_cache(
        PolynomialToy(polynomial),
        schedule=MaskSchedule((0, 3, 7), steps=12),
        estimator=estimator,
        adapter=TOY,
    )
    with torch.no_grad(), skip_cache_run(model):
        outputs = [model(torch.zeros(1, 2, 2), step)[0, 0, 0].item() for step in range(12)]
    assert cache_stats(model).plan == "FrrFrrrFrrrr"
    expected = [2 * polynomial(step) for step in range(12)]
    assert outputs[exact_from:] == pytest.approx(expected[exact_from:], abs=1e-5)


@pytest.mark.parametrize(
    ("estimator", "features"),
    [("hold", 1), ("residual", 2), ("taylor", 2), ("taylor(2)", 3), ("taylor(0)", 1)],
)
@pytest.mark.parametrize("kind", ["pixart", "latte"])
def test_size_of_the_cache(kind, estimator, features):
    """The cache holds as many features as the estimator says, not some a layer, and none once the
    run is over.
    """
    pipe = cached(kind, interval=2, estimator=estimator)
    feature = []
    block = pipe.transformer.transformer_blocks[-1]
    handle = block.register_forward_pre_hook(lambda module, args: feature.append(args[0]))
    sample(pipe, 12)
    handle.remove()
    size = feature[0].numel() * feature[0].element_size()
    assert cache_stats(pipe).cache_bytes == features * size


class WatchedHold(Hold):
    """``hold`` that notes, without keeping them, the features that it was given."""

    seen: ClassVar[list] = []

    def prepare(self, refreshes, step, time):
        self.seen.extend(weakref.ref(t) for r in refreshes for t in r.deep)
        return super().prepare(refreshes, step, time)


@pytest.mark.parametrize("end", ["finished", "stopped", "removed"])
@pytest.mark.parametrize("kind", ["dit", "latte"])
def test_nothing_cached_outlives_its_run(kind, end):
    """Once a run is over, or the next one has begun after one was stopped, or on remove, its
    features are freed.
    """
    WatchedHold.seen.clear()
    pipe = cached(kind, estimator=WatchedHold())
    if end == "finished":
        sample(pipe)
    else:
        with pytest.raises(ZeroDivisionError):
            sample(pipe, after_step=lambda made: made == 2 and 1 / 0)
        gc.collect()
        old = list(WatchedHold.seen)
        if end == "removed":
            remove_skip_cache(pipe)
        else:
            sample(pipe, 1)
            WatchedHold.seen[:] = old
    gc.collect()
    assert WatchedHold.seen
    assert all(reference() is None for reference in WatchedHold.seen)


# Row: enabling fails half-way.


class RaisingSchedule:
    """A schedule that fails when it is first asked."""

    needs_probe = False
    needs_times = False

    def is_refresh(self, progress):
        raise RuntimeError("no schedule today")

    plan = is_refresh


@pytest.mark.parametrize("is_applied", [False, True])
def test_enabling_that_fails_half_way(is_applied):
    """A schedule that raises while it is applied leaves no hook behind, and what was applied before
    goes on.
    """
    pipe = build("pixart")
    if is_applied:
        apply_to(pipe)
    model = pipe.transformer
    before = (
        sorted(vars(model)),
        type(model.transformer_blocks),
        len(model._forward_hooks),
        len(model._forward_pre_hooks),
        sorted(vars(pipe.scheduler)),
    )
    with pytest.raises((SkipCacheError, RuntimeError), match="no schedule today"):
        apply_to(pipe, schedule=RaisingSchedule())
    after = (
        sorted(vars(model)),
        type(model.transformer_blocks),
        len(model._forward_hooks),
        len(model._forward_pre_hooks),
        sorted(vars(pipe.scheduler)),
    )
    assert after == before
    assert torch.equal(sample(pipe), reference("pixart", estimator="hold" if is_applied else None))
    assert remove_skip_cache(pipe) is is_applied


class SlottedScheduler:
    """A scheduler that takes no attribute: nothing can listen to it."""

    __slots__ = ("timesteps",)

    def __init__(self):
        self.timesteps = torch.tensor([900, 600, 300])

    def step(self, output, timestep, sample):
        return sample - 0.1 * output


class MinimalPipeline:
    """A pipeline that is not diffusers'."""

    def __init__(self, transformer, scheduler):
        self.transformer, self.scheduler = transformer, scheduler

    @torch.no_grad()
    def __call__(self):
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3))
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(x, t), t, x)
        return x


def test_scheduler_that_cannot_be_listened_to():
    """A scheduler without room for an attribute is refused cleanly, or the timesteps are read
    instead.
    """
    pipe = MinimalPipeline(ToyTransformer(), SlottedScheduler())
    expected = pipe()
    options = {"interval": 3, "window": ALWAYS_OPEN, "estimator": "hold", "adapter": TOY}
    try:
        apply_skip_cache(pipe, **options)
    except SkipCacheError:
        assert not is_skip_cached(pipe)
        assert type(pipe.transformer.blocks) is nn.ModuleList
    else:
        pipe()
        assert cache_stats(pipe).plan == "Frr"
        assert remove_skip_cache(pipe)
    assert torch.equal(pipe(), expected)


# Row: PSNR tool.


@pytest.mark.parametrize("error", [0.2, 0.075, 0.001])
def test_psnr_is_measured_in_floats(error):
    """An error e everywhere is -20 log10(e) dB, also where it is below one step of an 8-bit image,
    and 8-bit images are refused.
    """
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    assert psnr(image + error, image) == pytest.approx(-20 * math.log10(error), abs=0.01)
    with pytest.raises(ValueError, match="floats"):
        psnr((image * 255).to(torch.uint8), (image * 255).to(torch.uint8))
