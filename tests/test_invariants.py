"""The seven invariants of the design, on seven pipelines, through real pipeline calls."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from torch import nn

from pipelines import (
    ALWAYS_OPEN,
    KINDS,
    LAYERS,
    MORE_KINDS,
    STEPS,
    Provenance,
    apply_to,
    backbone_of,
    block_lists,
    build,
    cached,
    call_of,
    counted_layers,
    flux_call,
    kind_of,
    reference,
    sample,
    surroundings,
    transformer_of,
)
from skipcache import (
    Backbone,
    BlockList,
    IntervalSchedule,
    MaskSchedule,
    ProbeSchedule,
    apply_skip_cache,
    cache_stats,
    hookimpl,
    is_skip_cached,
    remove_skip_cache,
    skip_cache_run,
)
from skipcache.errors import (
    AdapterError,
    ConfigError,
    NoAdapterError,
    TargetError,
    UnknownOptionError,
)

ESTIMATORS = ("hold", "residual", "taylor")
SPANS = [(0, 1), (1, 1), (2, 2), (3, 2), (1, 3), (0, 5)]


def spans_of(kind):
    """(front, back) pairs that the kind can take: a native skip may not start in the span and end
    behind it.
    """
    return [(f, b) for f, b in SPANS if not kind.startswith("hunyuan_dit") or b <= f]


KIND_SPANS = [(kind, front, back) for kind in KINDS for front, back in spans_of(kind)]


ALL_KINDS = (*KINDS, *MORE_KINDS)
on_every_pipeline = pytest.mark.parametrize("kind", ALL_KINDS)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


class Stop(Exception):
    """Raised by a test inside a run."""


# 1. Applied but never reusing: bit-identical output.


@pytest.mark.parametrize(
    "options",
    [
        {"interval": 1, "estimator": "hold"},
        {"interval": 1, "estimator": "residual"},
        {"interval": 1, "estimator": "taylor(2)"},
        {"interval": 1, "window": (0.9, 0.1)},
        {"schedule": ProbeSchedule(threshold=0)},
        {"schedule": ProbeSchedule(threshold=0), "estimator": "residual"},
        {"schedule": MaskSchedule(tuple(range(STEPS)))},
    ],
    ids=["hold", "residual", "taylor", "window", "probe", "probe-residual", "mask"],
)
def test_never_reusing_is_bit_identical(kind, options):
    """A cache that refreshes at every step changes no bit of the output."""
    pipe = cached(kind, **options)
    assert torch.equal(sample(pipe), reference(kind, estimator=None))
    assert cache_stats(pipe).plan == "F" * STEPS


@on_every_pipeline
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_reusing_is_visible(kind, estimator):
    """The tiny models are sensitive: leaving the deep span out changes the output, so equality
    means something.
    """
    plain = reference(kind, estimator=None)
    assert not torch.allclose(reference(kind, estimator=estimator), plain, rtol=1e-2)


# 2. After remove: bit-identical, the same object graph.


@on_every_pipeline
@pytest.mark.parametrize("times", [1, 2], ids=["applied-once", "applied-twice"])
def test_remove_restores_the_object_graph(kind, times):
    """Removing leaves the same objects, classes, attributes and names, and not a bit of
    difference.
    """
    pipe = build(kind)
    expected = sample(pipe)
    before = surroundings(pipe)
    for _ in range(times):
        apply_to(pipe)
        sample(pipe)
        assert surroundings(pipe) != before
    assert remove_skip_cache(pipe) is True
    assert remove_skip_cache(pipe) is False
    assert surroundings(pipe) == before
    assert all(type(block_list) is nn.ModuleList for block_list in block_lists(pipe.transformer))
    assert torch.equal(sample(pipe), expected)


def test_applied_model_keeps_its_names_and_blocks(kind):
    """While applied, state-dict keys, indexing, length and iteration from outside are those of the
    plain model.
    """
    pipe = build(kind)
    keys = list(pipe.transformer.state_dict())
    blocks = [list(block_list) for block_list in block_lists(pipe.transformer)]
    apply_to(pipe)
    sample(pipe)
    assert list(pipe.transformer.state_dict()) == keys
    for block_list, plain in zip(block_lists(pipe.transformer), blocks, strict=True):
        assert isinstance(block_list, nn.ModuleList)
        assert len(block_list) == len(plain)
        assert all(a is b for a, b in zip(block_list, plain, strict=True))
        assert block_list[0] is plain[0]
        assert block_list[-1] is plain[-1]


@on_every_pipeline
def test_remove_in_the_middle_of_a_run(kind):
    """Removing between two steps of a running sampler leaves a plain model and clean scheduler
    behind.
    """
    pipe = build(kind)
    sample(pipe)
    before = surroundings(pipe)
    expected = sample(pipe, seed=3)
    apply_to(pipe)
    sample(pipe, after_step=lambda made: made == 2 and remove_skip_cache(pipe))
    assert not is_skip_cached(pipe)
    assert surroundings(pipe) == before
    assert torch.equal(sample(pipe, seed=3), expected)


# 3. The same input at a refresh and at a forced reuse gives the same output.


def outputs_of_equal_calls(model, args, kwargs, calls=3):
    """One run in which every step has the same input: a refresh, then reuses."""
    outputs = []
    with torch.no_grad(), skip_cache_run(model):
        for _ in range(calls):
            outputs.append(model(*args, **kwargs)[0])
    assert cache_stats(model).plan == "F" + "r" * (calls - 1)
    return outputs


@pytest.mark.parametrize("estimator", ["hold", "residual"])
@pytest.mark.parametrize(("kind", "front", "back"), KIND_SPANS)
def test_equal_input_gives_equal_output(kind, front, back, estimator):
    """Nothing outside the deep span depends on what was skipped: a forced reuse repeats the refresh
    exactly.
    """
    pipe = build(kind)
    args, kwargs = call_of(pipe)
    kwargs["return_dict"] = False
    with torch.no_grad():
        plain = pipe.transformer(*args, **kwargs)[0]
    apply_to(pipe, front_layers=front, back_layers=back, estimator=estimator)
    for output in outputs_of_equal_calls(pipe.transformer, args, kwargs):
        assert torch.equal(output, plain)


class StandingScheduler(DDIMScheduler):
    """Every step of a run is at one time and on the same latents."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = torch.full_like(self.timesteps, 500)

    def step(self, model_output, timestep, sample, *args, return_dict=True, **kwargs):
        return SimpleNamespace(prev_sample=sample) if return_dict else (sample,)


ENDS = [(kind, *ends) for kind in ALL_KINDS for ends in (spans_of(kind)[0], spans_of(kind)[-1])]


@pytest.mark.parametrize(("kind", "front", "back"), ENDS)
def test_equal_steps_of_a_pipeline_give_equal_predictions(kind, front, back):
    """The same in whole pipeline calls, with what they put around the transformer: ControlNet
    residuals, perturbed attention, guidance.
    """
    pipe = build(kind, scheduler=StandingScheduler())
    predictions = []

    def record(module, args, output):
        predictions.append(output[0].clone())

    pipe.transformer.register_forward_hook(record)
    sample(pipe, 2)
    apply_to(pipe, interval=4, front_layers=front, back_layers=back)
    sample(pipe, 4)
    assert cache_stats(pipe).plan == "Frrr"
    plain, *others = predictions
    assert len(others) == 5
    assert all(torch.equal(prediction, plain) for prediction in others)


LATTE_VARIANTS = {
    "one-frame": ({"video_length": 1}, {}),
    "frames-equal-tokens": ({"video_length": 4, "sample_size": 4}, {"size": 4}),
    "no-temporal": ({}, {"enable_temporal_attentions": False}),
}


@pytest.mark.parametrize("estimator", ["hold", "residual"])
@pytest.mark.parametrize(("front", "back"), [(0, 1), (2, 3)])
@pytest.mark.parametrize("variant", LATTE_VARIANTS)
def test_latte_variants_give_equal_output(variant, front, back, estimator):
    """Latte with one frame, with as many frames as tokens, and without temporal blocks keeps
    invariants 1 and 3.
    """
    shape, options = LATTE_VARIANTS[variant]
    pipe = build("latte", **shape)
    plain_run = sample(pipe, **options)
    args, kwargs = call_of(pipe, **options)
    kwargs["return_dict"] = False
    with torch.no_grad():
        plain = pipe.transformer(*args, **kwargs)[0]
    layers = {"front_layers": front, "back_layers": back, "estimator": estimator}
    apply_to(pipe, **layers)
    for output in outputs_of_equal_calls(pipe.transformer, args, kwargs):
        assert torch.equal(output, plain)
    apply_to(pipe, interval=1, **layers)
    assert torch.equal(sample(pipe, **options), plain_run)


@pytest.mark.parametrize(("front", "back"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_hunyuan_dit_with_a_controlnet(front, back):
    """The residuals of a ControlNet are taken off the caller's list to the last, at a refresh and
    at a reuse alike.
    """
    pipe = build("hunyuan_dit")
    args, kwargs = call_of(pipe)
    kwargs["return_dict"] = False
    tokens = 16
    residuals = [torch.randn(2, tokens, 16) for _ in range(LAYERS // 2 - 1)]
    model = pipe.transformer
    with torch.no_grad():
        without = model(*args, **kwargs)[0]
        plain = model(*args, **kwargs, controlnet_block_samples=list(residuals))[0]
    assert not torch.allclose(plain, without)
    apply_to(pipe, front_layers=front, back_layers=back)
    with torch.no_grad(), skip_cache_run(model):
        for _ in range(3):
            popped = list(residuals)
            output = model(*args, **kwargs, controlnet_block_samples=popped)[0]
            assert popped == []
            assert torch.equal(output, plain)
    assert cache_stats(pipe).plan == "Frr"


@pytest.mark.parametrize("estimator", ["hold", "residual"])
@pytest.mark.parametrize(("front", "back"), [(0, 1), (1, 1), (3, 1), (1, 3), (1, 4), (4, 1)])
@pytest.mark.parametrize("controlnet", [False, True], ids=["plain", "controlnet"])
def test_flux_with_and_without_a_controlnet(front, back, estimator, controlnet):
    """Two tensors flow, two lists follow each other, residuals are added between blocks: a reuse
    repeats exactly.
    """
    model = transformer_of("flux")
    if controlnet:
        # What the model adds between blocks is inside the deep feature, as it enters the back.
        extra = {
            "controlnet_block_samples": [torch.randn(1, 6, 16) for _ in range(3)],
            "controlnet_single_block_samples": [torch.randn(1, 6, 16) for _ in range(3)],
        }
    else:
        extra = {}
    call = {**flux_call(), **extra}
    with torch.no_grad():
        plain = model(**call)[0]
    apply_skip_cache(
        model,
        interval=4,
        window=ALWAYS_OPEN,
        front_layers=front,
        back_layers=back,
        estimator=estimator,
        adapter=backbone_of("flux"),
    )
    for output in outputs_of_equal_calls(model, (), call):
        assert torch.equal(output, plain)


# 4. Layers run = exactly what the schedule says.

# DDIM with six steps: normalised times 0.83, 0.664, 0.498, 0.332, 0.166, 0.
PLANS = [
    (IntervalSchedule(2), "FrFrFr"),
    (IntervalSchedule(3), "FrrFrr"),
    (IntervalSchedule(9), "Frrrrr"),
    (IntervalSchedule(3, 0.7, 0.2), "FrrFrF"),
    (IntervalSchedule(2, 0.6, 0.2), "FFFrFF"),
    (IntervalSchedule(6, 0.5, 0.0), "FFrrrr"),
    (MaskSchedule((0, 2, 3)), "FrFFrF"),
    (MaskSchedule((0, 4), steps=STEPS), "FrrrFr"),
    (MaskSchedule.at_times((0.7, 0.3)), "FFrrFr"),
    (ProbeSchedule(threshold=1e9, max_consecutive=2), "FrrFrr"),
]


SPANS_AND_PLANS = [(2, 2, *entry) for entry in PLANS]
SPANS_AND_PLANS += [(front, back, *PLANS[3]) for front, back in [(1, 1), (3, 1)]]


@pytest.mark.parametrize(("front", "back", "schedule", "plan"), SPANS_AND_PLANS)
def test_layers_run_as_scheduled(kind, front, back, schedule, plan):
    """Counted at the blocks themselves, each step runs the layers that the schedule says, and the
    stats agree.
    """
    pipe = cached(kind, schedule=schedule, front_layers=front, back_layers=back)
    with counted_layers(pipe.transformer) as counts:
        sample(pipe)
    stats = cache_stats(pipe)
    assert stats.plan == plan
    kept = set(range(front)) | set(range(LAYERS - back, LAYERS))
    lists = len(block_lists(pipe.transformer))
    for i in range(lists):
        for layer in range(LAYERS):
            assert counts[i, layer] == (STEPS if layer in kept else plan.count("F")), (i, layer)
    assert counts.total() == lists * stats.layers_run
    assert stats.layers_total == STEPS * LAYERS
    assert (stats.refreshed, stats.reused) == (plan.count("F"), plan.count("r"))


def test_two_lists_in_a_row_are_one_stack():
    """Depth, front and back count over all lists in execution order (Flux: joint blocks, then
    single ones).
    """
    model = transformer_of("flux")
    apply_skip_cache(
        model,
        interval=3,
        window=ALWAYS_OPEN,
        front_layers=1,
        back_layers=2,
        estimator="hold",
        adapter=backbone_of("flux"),
    )
    with counted_layers(model) as counts, torch.no_grad(), skip_cache_run(model):
        for _ in range(3):
            model(**flux_call())
    assert [counts[0, i] for i in range(3)] == [3, 1, 1]
    assert [counts[1, i] for i in range(3)] == [1, 3, 3]


# 5. Never a stale reuse: two pipelines.


@on_every_pipeline
@pytest.mark.parametrize(
    ("inner_steps", "at"), [(STEPS, (1,)), (STEPS, (1, 2, 3, 4)), (4, (2,))], ids=str
)
def test_pipeline_inside_anothers_loop(kind, inner_steps, at):
    """Two pipelines of one class, one inside the other's loop, give what they give one at a
    time.
    """
    outer, inner = cached(kind, seed=0), cached(kind, seed=1)
    expected_inner = reference(kind, inner_steps, seed=5, weights=1)
    results = []

    def run_inner(made):
        if made in at:
            results.append(sample(inner, inner_steps, seed=5))

    assert torch.equal(sample(outer, after_step=run_inner), reference(kind))
    assert len(results) == len(at)
    assert all(torch.equal(result, expected_inner) for result in results)


def test_removing_an_inner_pipeline_leaves_the_outer_one_running(kind):
    """Taking the cache off one pipeline in the middle of another one's run does not touch the
    other.
    """
    outer, inner = cached(kind, seed=0), cached(kind, seed=1)
    expected = reference(kind)
    remove = {2: lambda: remove_skip_cache(inner), 3: lambda: sample(inner)}
    assert torch.equal(sample(outer, after_step=lambda made: remove.get(made, int)()), expected)
    assert is_skip_cached(outer)
    assert not is_skip_cached(inner)


def sharing_pair(kind):
    """Two pipelines around one transformer, each with a scheduler of its own, both applied."""
    outer = build(kind)
    inner = build(kind, transformer=outer.transformer)
    apply_to(outer)
    apply_to(inner)
    return outer, inner


@on_every_pipeline
@pytest.mark.parametrize(
    ("inner_steps", "at"), [(4, (1, 2, 3, 4)), (5, (1,)), (5, (2,)), (9, (3,))], ids=str
)
def test_nested_pipelines_sharing_a_transformer(kind, inner_steps, at):
    """One transformer in two pipelines, one inside the other's loop: both give what they give
    alone.
    """
    outer, inner = sharing_pair(kind)
    expected_inner = reference(kind, inner_steps, seed=5)
    results = []

    def run_inner(made):
        if made in at:
            results.append(sample(inner, inner_steps, seed=5))

    assert torch.equal(sample(outer, after_step=run_inner), reference(kind))
    assert all(torch.equal(result, expected_inner) for result in results)
    assert len(results) == len(at)


@pytest.mark.parametrize("at", [(1,), (1, 2, 3, 4)], ids=str)
def test_nested_pipelines_with_equal_timesteps_never_share_a_cache(kind, at):
    """Where even the timesteps agree, no forward goes on with a deep feature that another run
    computed.
    """
    outer, inner = sharing_pair(kind)
    watch = Provenance(outer.transformer)
    watch.owner = "outer"

    def run_inner(made):
        if made in at:
            watch.owner = f"inner {made}"
            sample(inner, seed=5 + made)
            watch.owner = "outer"

    sample(outer, after_step=run_inner)
    assert watch.reused > 0
    assert watch.foreign == []


@pytest.mark.parametrize("at", [(1,), (1, 2, 3, 4)], ids=str)
def test_nested_pipelines_with_equal_timesteps_keep_their_plans(kind, at):
    """Where even the timesteps agree, both runs still give what they give alone."""
    outer, inner = sharing_pair(kind)
    expected_inner = reference(kind, seed=5)
    results = []

    def run_inner(made):
        if made in at:
            results.append(sample(inner, seed=5))

    assert torch.equal(sample(outer, after_step=run_inner), reference(kind))
    assert all(torch.equal(result, expected_inner) for result in results)


@pytest.mark.parametrize("at", [(1,), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("inner_steps", [STEPS, 4])
def test_nested_unapplied_pipeline_never_shares_a_cache(kind, at, inner_steps):
    """A pipeline that was never applied itself, inside the loop of one that shares its transformer:
    no stale reuse.
    """
    outer = cached(kind)
    inner = build(kind, transformer=outer.transformer)
    watch = Provenance(outer.transformer)
    watch.owner = "outer"

    def run_inner(made):
        if made in at:
            watch.owner = f"inner {made}"
            sample(inner, inner_steps, seed=5 + made)
            watch.owner = "outer"

    sample(outer, after_step=run_inner)
    assert watch.reused > 0
    assert watch.foreign == []


@pytest.mark.parametrize("steps", [STEPS, 4])
def test_shared_transformer_one_after_the_other(kind, steps):
    """A second pipeline around the transformer, itself never applied, is cached as if it
    had been.
    """
    first = cached(kind)
    second = build(kind, transformer=first.transformer)
    expected_first, expected_second = reference(kind), reference(kind, steps, seed=5)
    for _ in range(2):
        assert torch.equal(sample(first), expected_first)
        assert torch.equal(sample(second, steps, seed=5), expected_second)
        assert torch.equal(sample(second, steps, seed=5), expected_second)


def test_pipeline_made_of_anothers_components(kind):
    """``Pipeline(**other.components)`` shares transformer and scheduler; runs in turn give what
    they give alone.
    """
    first = cached(kind)
    components = dict(first.components)
    if kind.startswith("hunyuan_dit"):
        components["requires_safety_checker"] = False
    second = type(first)(**components)
    second.set_progress_bar_config(disable=True)
    expected = [reference(kind, seed=seed) for seed in range(2)]
    for _ in range(2):
        assert torch.equal(sample(first, seed=0), expected[0])
        assert torch.equal(sample(second, seed=1), expected[1])


def test_abandoned_run_and_an_unapplied_pipeline(kind):
    """After a run was stopped between steps, another pipeline around the transformer reuses nothing
    of it.
    """
    first = cached(kind)
    second = build(kind, transformer=first.transformer)
    expected = reference(kind, seed=5)
    watch = Provenance(first.transformer)
    watch.owner = "first"
    with pytest.raises(Stop):
        sample(first, after_step=stop_at(2))
    watch.owner = "second"
    result = sample(second, seed=5)
    assert watch.foreign == []
    assert torch.equal(result, expected)


# 5. Two streams.


def cached_flux(**options):
    model = transformer_of("flux")
    options = {"interval": 3, "window": ALWAYS_OPEN, "estimator": "hold", **options}
    return apply_skip_cache(model, adapter=backbone_of("flux"), **options)


def flux_times(steps=STEPS):
    return [1.0 - i / steps for i in range(steps)]


def single_streams(steps_of, **options):
    """The guided loop with a model, a cache and a run for each pass: what the streams of one model
    must equal.
    """
    models = {name: cached_flux(**options) for passes in steps_of for name in passes}

    def loop():
        return guided_loop(steps_of, lambda name, inputs: models[name](**inputs)[0])

    return in_runs(list(models.values()), loop)


def guided_loop(steps_of, call):
    """A bare sampler with separate guidance passes. ``steps_of`` lists, per step, the passes in
    calling order.
    """
    latents = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(9))
    seeds = {"cond": 1, "uncond": 2, "third": 3}
    for time, passes in zip(flux_times(len(steps_of)), steps_of, strict=True):
        outputs = {
            name: call(name, {**flux_call(seeds[name], time=time), "hidden_states": latents})
            for name in passes
        }
        cond = outputs.pop("cond")
        latents = latents - 0.3 * (cond - 0.5 * sum(outputs.values(), torch.zeros(())))
    return latents


def in_runs(models, function):
    """Calls the function with an explicit run open on every model."""
    if not models:
        with torch.no_grad():
            return function()
    with skip_cache_run(models[0]):
        return in_runs(models[1:], function)


TWO_PASSES = [("cond", "uncond")] * STEPS


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("passes", [("cond", "uncond"), ("cond", "uncond", "third")], ids=len)
def test_unnamed_passes_in_an_explicit_run_are_independent_streams(passes, estimator):
    """Separate guidance passes each keep a cache of their own, as if each had a model of
    its own.
    """
    steps_of = [passes] * STEPS
    expected = single_streams(steps_of, estimator=estimator)
    model = cached_flux(estimator=estimator)
    with torch.no_grad(), skip_cache_run(model, streams=len(passes)):
        result = guided_loop(steps_of, lambda name, inputs: model(**inputs)[0])
    assert torch.equal(result, expected)
    stats = cache_stats(model)
    assert stats.plan == "FrrFrr"
    assert len(stats.streams) == len(passes)


def test_unnamed_passes_told_by_the_timestep_are_independent_streams():
    """A bare sampler without any announcement: calls at one timestep are the passes of one step, in
    order. The second step refreshes too: how many passes there are is known after the first.
    """
    mask = MaskSchedule((0, 1, 3), steps=STEPS)
    expected = single_streams(TWO_PASSES, interval=None, window=None, schedule=mask)
    model = cached_flux()
    with torch.no_grad():
        for _ in range(2):
            result = guided_loop(TWO_PASSES, lambda name, inputs: model(**inputs)[0])
            assert torch.equal(result, expected)
            assert cache_stats(model).plan == "FFrFrr"


@pytest.mark.parametrize("announce", ["explicit", "timestep"])
def test_named_passes_are_independent_streams(announce):
    """``cache_context`` names a pass: its cache is its own, whatever the order, and though a pass
    sits steps out.
    """
    steps_of = [
        ("cond", "uncond"),
        ("uncond", "cond"),
        ("cond", "uncond"),
        ("uncond", "cond"),
        ("cond",),
        ("cond",),
    ]
    if announce == "explicit":  # which counts on the same number of calls at every step
        steps_of = steps_of[:4]
    expected = single_streams(steps_of)
    model = cached_flux()

    def call(name, inputs):
        with model.cache_context(name):
            return model(**inputs)[0]

    with torch.no_grad():
        if announce == "timestep":
            result = guided_loop(steps_of, call)
        else:
            with skip_cache_run(model, streams=2):
                result = guided_loop(steps_of, call)
    assert torch.equal(result, expected)
    assert set(cache_stats(model).streams) == {"cond", "uncond"}


def test_cache_context_still_reaches_the_model():
    """The model's own ``cache_context`` goes on working while the cache is applied, and is itself
    again afterwards.
    """
    model = transformer_of("flux")
    plain = type(model).cache_context
    apply_skip_cache(model, adapter=backbone_of("flux"))
    with model.cache_context("cond"), torch.no_grad():
        model(**flux_call())
    assert set(cache_stats(model).streams) == {"cond"}
    remove_skip_cache(model)
    assert "cache_context" not in vars(model)
    assert model.cache_context.__func__ is plain


def test_unnamed_passes_under_a_tapped_scheduler(kind):
    """Two calls between two scheduler steps are two streams, and equal two runs with one
    call each.
    """
    results = {}
    for passes in ("both", "each"):
        first = cached(kind)
        second = cached(kind) if passes == "each" else first
        calls = [call_of(build(kind), seed=seed) for seed in (1, 2)]
        name = "hidden_states" if "hidden_states" in calls[0][1] else None
        latents = calls[0][1][name] if name else calls[0][0][0]
        with torch.no_grad():
            for pipe in {id(first): first, id(second): second}.values():
                pipe.scheduler.set_timesteps(STEPS)
            for t in first.scheduler.timesteps:
                outputs = []
                for pipe, (args, kwargs) in zip((first, second), calls, strict=True):
                    kwargs = {**kwargs, "return_dict": False}
                    if "timestep" in kwargs:
                        given = kwargs["timestep"]
                        kwargs["timestep"] = t.to(given.dtype).expand(given.shape)
                    else:
                        args = (args[0], t.to(args[1].dtype).expand(args[1].shape), *args[2:])
                    if name:
                        kwargs[name] = latents
                    else:
                        args = (latents, *args[1:])
                    output = pipe.transformer(*args, **kwargs)[0]
                    outputs.append(output.chunk(2, dim=1)[0])
                noise = outputs[0] - 0.5 * outputs[1]
                if second is not first:
                    second.scheduler.step(
                        noise, second.scheduler.timesteps[second.scheduler.steps_made], latents
                    )
                latents = first.scheduler.step(noise, t, latents).prev_sample
        results[passes] = latents
        assert cache_stats(first).plan == "FrrFrr"
    assert torch.equal(results["both"], results["each"])


# 5. An exception mid-run.


def stop_at(step, error=Stop):
    """A callback that raises once so many steps were made."""

    def after_step(made):
        if made == step:
            raise error

    return after_step


def raise_in_block(block, call, error):
    """Makes the block raise at its call of that number, from 0."""
    calls = iter(range(1000))

    def hook(module, args):
        if next(calls) == call:
            raise error

    return block.register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("error", "layer", "call"),
    [
        (Stop, 0, 0),
        (Stop, 0, 1),
        (Stop, 2, 0),
        (Stop, 2, 1),
        (Stop, -1, 0),
        (Stop, -1, 1),
        (KeyboardInterrupt, 2, 1),
        (KeyboardInterrupt, -1, 1),
    ],
)
def test_exception_inside_a_block(kind, error, layer, call):
    """After an exception in a front, deep or back block, at a refresh or a reuse, the next run is a
    clean one.
    """
    pipe = cached(kind, estimator="taylor")
    block_list = block_lists(pipe.transformer)[0]
    plain = list(block_list._modules.values())
    handle = raise_in_block(plain[layer], call, error)
    with pytest.raises(error):
        sample(pipe)
    handle.remove()
    if (
        error is Stop
    ):  # torch tells no forward hook of a KeyboardInterrupt: the next forward finds out
        assert all(a is b for a, b in zip(block_list, plain, strict=True))
    assert torch.equal(sample(pipe, seed=4), reference(kind, seed=4, estimator="taylor"))
    assert cache_stats(pipe).plan == "FrrFrr"
    assert all(a is b for a, b in zip(block_list, plain, strict=True))


@on_every_pipeline
@pytest.mark.parametrize(
    ("error", "step", "steps_after"),
    [
        (Stop, 1, STEPS),
        (Stop, 2, STEPS),
        (Stop, 3, STEPS),
        (Stop, 2, 4),
        (KeyboardInterrupt, 2, STEPS),
    ],
)
def test_exception_in_the_sampler_loop(kind, error, step, steps_after):
    """After a run was stopped between two steps, the next run is a clean one."""
    expected = reference(kind, steps_after, seed=4)
    pipe = cached(kind)
    with pytest.raises(error):
        sample(pipe, after_step=stop_at(step, error))
    assert torch.equal(sample(pipe, steps_after, seed=4), expected)


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("point", ["pre", "post"])
def test_exception_in_a_hook_of_the_user(kind, position, point):
    """After a user's own hook on the transformer raised, registered before or after, the next run
    is a clean one.
    """
    expected = reference(kind, seed=4)
    pipe = build(kind)
    calls = iter(range(100))

    def hook(*args):
        if next(calls) == 1:
            raise Stop

    model = pipe.transformer
    register = model.register_forward_pre_hook if point == "pre" else model.register_forward_hook
    if position == "before":
        handle = register(hook)
        apply_to(pipe)
    else:
        apply_to(pipe)
        handle = register(hook)
    with pytest.raises(Stop):
        sample(pipe)
    assert torch.equal(sample(pipe, seed=4), expected)
    assert cache_stats(pipe).plan == "FrrFrr"
    handle.remove()
    assert remove_skip_cache(pipe)
    assert torch.equal(sample(pipe), reference(kind, estimator=None))


# 5. New step counts, batch sizes, resolutions.


@on_every_pipeline
@pytest.mark.parametrize(
    "changes",
    [{"steps": 4}, {"batch": 2}, {"size": 16}, {"guidance_scale": 1.0}],
    ids=str,
)
def test_change_between_runs(kind, changes):
    """A run of other steps, batch size, resolution or guidance starts clean, and so does the one
    after it.
    """
    if kind in ("dit", "latte_class") and "size" in changes:
        pytest.skip("the pipeline always samples at the transformer's own size")
    if kind == "hunyuan_dit_pag" and "guidance_scale" in changes:
        pytest.skip("diffusers' pipeline cannot perturb attention without guidance beside it")
    expected = reference(kind, estimator="taylor")
    expected_changed = sample(cached(kind, estimator="taylor"), **changes)
    pipe = cached(kind, estimator="taylor")
    for _ in range(2):
        assert torch.equal(sample(pipe), expected)
        assert torch.equal(sample(pipe, **changes), expected_changed)


def test_seeds_follow_each_other(kind):
    """Six runs in a row with six seeds each give what a fresh pipeline gives: no drift, no carry-
    over.
    """
    pipe = cached(kind)
    for seed in range(6):
        assert torch.equal(sample(pipe, seed=seed), reference(kind, seed=seed)), seed


@pytest.mark.parametrize("estimator", ["residual", "taylor"])
@pytest.mark.parametrize("change", ["batch", "resolution"])
def test_change_of_shape_in_the_middle_of_a_run(kind, change, estimator):
    """A forward whose shape does not agree with what is cached refreshes, and equals the uncached
    model's.
    """
    plain = build(kind)
    small = call_of(plain)
    if change == "batch":
        large = call_of(plain, batch=2)
    elif kind == "dit":
        args, kwargs = small
        large = ((args[0].repeat(1, 1, 2, 2), *args[1:]), kwargs)
    else:
        large = call_of(plain, size=16)
    pipe = cached(kind, estimator=estimator)
    with torch.no_grad(), skip_cache_run(pipe):
        for args, kwargs in [small, small, small, small, large]:
            result = pipe.transformer(*args, **kwargs)
    with torch.no_grad():
        expected = plain.transformer(*large[0], **large[1])
    assert cache_stats(pipe).plan == "FrrFF"
    assert torch.equal(result[0], expected[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_steps_after_a_change_of_shape_reuse_the_new_shape(kind, estimator):
    """After a change of batch size the new features are cached: no history of the old shape, and no
    more refreshes.
    """
    plain = build(kind)
    small, large = call_of(plain), call_of(plain, batch=2)
    pipe = cached(kind, estimator=estimator, interval=4)
    with torch.no_grad():
        expected = plain.transformer(*large[0], **large[1])[0]
        with skip_cache_run(pipe):
            outputs = [
                pipe.transformer(*args, **kwargs)[0]
                for args, kwargs in [small, small, large, large]
            ]
    assert cache_stats(pipe).plan == "FrFr"
    assert torch.equal(outputs[2], expected)
    assert torch.equal(outputs[3], expected)


def test_change_of_dtype_in_the_middle_of_a_run():
    """A cached feature of another dtype is not used."""
    model = cached_flux()
    half = copy.deepcopy(model)
    remove_skip_cache(half)
    with torch.no_grad(), skip_cache_run(model):
        model(**flux_call())
        model.to(torch.bfloat16)
        half.to(torch.bfloat16)
        call = {
            name: value.to(torch.bfloat16)
            if isinstance(value, torch.Tensor) and "ids" not in name
            else value
            for name, value in flux_call().items()
        }
        result, expected = model(**call)[0], half(**call)[0]
    assert torch.equal(result, expected)
    assert cache_stats(model).plan == "FF"


# 5. Schedulers.

SCHEDULERS = (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)


@on_every_pipeline
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_schedulers(kind, scheduler):
    """Under every scheduler: never reusing changes no bit; the plan has one entry a transformer
    call and is as scheduled, its layers run and no others; runs of other steps and stopped ones
    leave nothing behind; taken off, all is as it was.
    """
    pipe = build(kind, scheduler=scheduler())
    plain, before = sample(pipe), surroundings(pipe)
    apply_to(pipe, interval=1)
    assert torch.equal(sample(pipe), plain)
    apply_to(pipe)
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with counted_layers(pipe.transformer) as counts:
        first = sample(pipe)
    handle.remove()
    # Heun calls twice a step but the last. Its last two calls are both at time 0, the end of the
    # window: what follows the first of them refreshes.
    plan = "FrrFrrFrrFF" if scheduler is HeunDiscreteScheduler else "FrrFrr"
    assert len(calls) == len(plan)
    assert cache_stats(pipe).plan == plan
    for (_, layer), count in counts.items():
        assert count == (len(plan) if layer in (0, LAYERS - 1) else plan.count("F"))
    assert not torch.equal(first, plain)

    sample(pipe, 4, seed=1)
    handle = raise_in_block(next(iter(block_lists(pipe.transformer)[0]._modules.values())), 2, Stop)
    with pytest.raises(Stop):
        sample(pipe, seed=2)
    handle.remove()
    assert torch.equal(sample(pipe), first)

    remove_skip_cache(pipe)
    assert surroundings(pipe) == before
    assert torch.equal(sample(pipe), plain)


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, HeunDiscreteScheduler], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("is_stopped", [False, True], ids=["after-a-run", "after-a-stopped-run"])
def test_replaced_scheduler(kind, scheduler, is_stopped):
    """``pipe.scheduler`` may be replaced while applied: the new one is followed, the old one is
    left as it was.
    """
    expected = sample(apply_to(build(kind, scheduler=scheduler())), seed=2)
    pipe = cached(kind)
    old = pipe.scheduler
    if is_stopped:
        with pytest.raises(Stop):
            sample(pipe, after_step=stop_at(2))
    else:
        sample(pipe)
    pipe.scheduler = scheduler()
    assert torch.equal(sample(pipe, seed=2), expected)
    assert "step" not in vars(old)
    remove_skip_cache(pipe)
    assert "step" not in vars(pipe.scheduler)


# 6. deepcopy and pickle.


def perturb_span(model):
    """Changes weights that only a refresh runs, and so makes its output another."""
    with torch.no_grad():
        for parameter in list(block_lists(model)[0]._modules.values())[2].parameters():
            parameter.mul_(-3.0)


def copied(pipe, how):
    """An independent pipeline by copying the pipeline, or by a pipeline around the copied
    transformer.
    """
    if how == "deepcopy-pipe":
        return copy.deepcopy(pipe)
    if how == "pickle-pipe":
        return pickle.loads(pickle.dumps(pipe))
    copier = copy.deepcopy if how == "deepcopy" else lambda model: pickle.loads(pickle.dumps(model))
    return build(kind_of(pipe), transformer=copier(pipe.transformer))


@on_every_pipeline
@pytest.mark.parametrize(
    ("how", "has_run"),
    [
        ("deepcopy", True),
        ("pickle", True),
        ("deepcopy-pipe", True),
        ("pickle-pipe", True),
    ],
)
def test_copy_runs_its_own_weights(kind, how, has_run):
    """A copy is cached, equal at first, and follows its own weights; neither feels what happens to
    the other.
    """
    expected = reference(kind)
    pipe = cached(kind)
    if has_run:
        sample(pipe)
    twin = copied(pipe, how)
    assert is_skip_cached(twin)
    assert torch.equal(sample(twin), expected)
    assert cache_stats(twin).plan == "FrrFrr"
    perturb_span(twin.transformer)
    with counted_layers(pipe.transformer) as counts:
        changed = sample(twin)
    assert counts.total() == 0
    assert not torch.allclose(changed, expected)
    assert torch.equal(sample(pipe), expected)
    other = build(kind)
    perturb_span(other.transformer)
    plain_changed = sample(other)
    assert torch.equal(changed, sample(apply_to(other)))

    assert remove_skip_cache(twin)
    assert is_skip_cached(pipe)
    assert torch.equal(sample(twin), plain_changed)
    assert torch.equal(sample(pipe), expected)
    assert "step" not in vars(twin.scheduler)
    assert all(type(block_list) is nn.ModuleList for block_list in block_lists(twin.transformer))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "deepcopy-pipe", "pickle-pipe"])
def test_removing_from_the_original_leaves_the_copy_cached(kind, how):
    """Removing from the original restores it, and its copy goes on being cached."""
    pipe = cached(kind)
    expected, plain = sample(pipe), reference(kind, estimator=None)
    twin = copied(pipe, how)
    assert remove_skip_cache(pipe)
    assert torch.equal(sample(pipe), plain)
    assert torch.equal(sample(twin), expected)
    assert is_skip_cached(twin)


def test_copy_made_in_the_middle_of_a_run(kind):
    """A copy taken between two steps starts with an empty cache, and the run it was taken from goes
    on.
    """
    pipe = cached(kind)
    twins = []

    def take(made):
        if made == 2:
            twins.append(copy.deepcopy(pipe.transformer))

    assert torch.equal(sample(pipe, after_step=take), reference(kind))
    assert torch.equal(sample(build(kind, transformer=twins[0])), reference(kind))


# 7. Bad configuration fails when applied.


class Planner:
    """A schedule that plans whatever it was given."""

    needs_probe = False
    needs_times = False

    def __init__(self, make):
        self.make = make

    def is_refresh(self, progress):
        return True

    def plan(self, times):
        return self.make(times)


class NonsensePlugin:
    """Answers with something that is no backbone."""

    @hookimpl
    def skipcache_backbone(self, transformer):
        return {"blocks": "transformer_blocks"}


class RaisingPlugin:
    """Fails on every model."""

    @hookimpl
    def skipcache_backbone(self, transformer):
        raise KeyError("hidden")


def nan_plan(times):
    return tuple(float("nan") for _ in times)


NAN = float("nan")
BAD = {
    "span-without-layers": (
        {"front_layers": 3, "back_layers": 3},
        ConfigError,
        "leave nothing to skip",
    ),
    "span-negative": (
        {"front_layers": 9, "back_layers": 9},
        ConfigError,
        "Their sum must be below 6",
    ),
    "front-negative": ({"front_layers": -1}, ConfigError, "front_layers is -1"),
    "front-float": ({"front_layers": 1.0}, ConfigError, "front_layers is 1.0"),
    "back-negative": ({"back_layers": -1}, ConfigError, "back_layers is -1"),
    "interval-zero": ({"interval": 0}, ConfigError, "interval is 0"),
    "interval-negative": ({"interval": -2}, ConfigError, "interval is -2"),
    "interval-float": ({"interval": 2.5}, ConfigError, "interval is 2.5"),
    "interval-bool": ({"interval": True}, ConfigError, "interval is True"),
    "window-reversed": ({"window": (0.1, 0.9)}, ConfigError, "reversed"),
    "window-empty": ({"window": (0.5, 0.5)}, ConfigError, "empty"),
    "window-timesteps": ({"window": (700, 50)}, ConfigError, "700 is 0.7"),
    "window-negative": ({"window": (0.9, -0.1)}, ConfigError, "-0.1"),
    "window-nan-start": ({"window": (NAN, 0.1)}, ConfigError, "start is nan"),
    "window-nan-stop": ({"window": (0.9, NAN)}, ConfigError, "stop is nan"),
    "window-three": ({"window": (0.9, 0.5, 0.1)}, ConfigError, "pair"),
    "estimator-misspelt": ({"estimator": "tailor"}, ConfigError, "Did you mean 'taylor'"),
    "estimator-holds": ({"estimator": "holds"}, ConfigError, "Did you mean 'hold'"),
    "estimator-order": ({"estimator": "taylor(-1)"}, ConfigError, "unknown estimator"),
    "estimator-object": ({"estimator": object()}, ConfigError, "estimator is"),
    "option-misspelt": ({"intervall": 3}, UnknownOptionError, "Did you mean 'interval'"),
    "option-front": ({"front_layer": 1}, UnknownOptionError, "Did you mean 'front_layers'"),
    "option-unknown": ({"zzz": 1}, UnknownOptionError, "Allowed: "),
    "schedule-and-interval": (
        {"schedule": IntervalSchedule(2), "interval": 2},
        ConfigError,
        "both say when",
    ),
    "schedule-object": ({"schedule": object()}, ConfigError, "schedule is"),
    "schedule-class": ({"schedule": IntervalSchedule}, ConfigError, "schedule is"),
    "plan-nan": ({"schedule": Planner(nan_plan)}, ConfigError, "one bool a step"),
    "plan-short": ({"schedule": Planner(lambda times: (True,))}, ConfigError, "50 steps"),
    "plan-long": ({"schedule": Planner(lambda times: (True,) * 51)}, ConfigError, "50 steps"),
    "plan-none": ({"schedule": Planner(lambda times: None)}, ConfigError, "None"),
    "config-dict": ({"config": {"interval": 2}}, ConfigError, "SkipCacheConfig"),
    "adapter-misspelt": ({"adapter": "dit_x"}, NoAdapterError, "Did you mean 'dit_xl'"),
    "adapter-nonsense": (
        {"adapter": NonsensePlugin()},
        AdapterError,
        "must return a skipcache.Backbone",
    ),
    "adapter-raises": ({"adapter": RaisingPlugin()}, AdapterError, "KeyError"),
    "adapter-object": ({"adapter": object()}, AdapterError, "Pass the name of an adapter"),
    "adapter-path": (
        {"adapter": Backbone("other", (BlockList("no_such_blocks"),))},
        AdapterError,
        "no_such_blocks",
    ),
    "adapter-no-list": (
        {"adapter": Backbone("other", (BlockList("pos_embed"),))},
        AdapterError,
        "not an nn.ModuleList",
    ),
    "adapter-takes": (
        {"adapter": Backbone("other", (BlockList("transformer_blocks", ("x",), "x"),))},
        AdapterError,
        r"not \['x'\]",
    ),
    "adapter-skip": (
        {"adapter": Backbone("other", (BlockList("transformer_blocks"),), native_skips=((0, 6),))},
        AdapterError,
        "ends past the last",
    ),
    "skip-out-of-the-span": (
        {
            "adapter": Backbone(
                "other", (BlockList("transformer_blocks"),), native_skips=((0, 5), (1, 4))
            ),
            "front_layers": 1,
            "back_layers": 2,
        },
        ConfigError,
        "back_layers no larger than front_layers",
    ),
}


BAD_WHILE_CACHED = (
    "interval-zero",
    "option-misspelt",
    "plan-nan",
    "adapter-nonsense",
    "adapter-takes",
)
BAD_CASES = [pytest.param(*case, "plain", id=name) for name, case in BAD.items()]
BAD_CASES += [pytest.param(*BAD[name], "cached", id=f"{name}-cached") for name in BAD_WHILE_CACHED]


@on_every_pipeline
def test_bad_configuration_of_every_pipeline(kind):
    """On each pipeline a span without layers is refused when applied, by the adapter that comes
    with the model too, and nothing of it is left behind.
    """
    pipe = build(kind)
    before = surroundings(pipe)
    adapters = [backbone_of(kind), *([] if kind == "pixart" else [None])]
    for adapter in adapters:
        with pytest.raises(ConfigError, match="Their sum must be below 6"):
            apply_skip_cache(pipe, front_layers=4, back_layers=2, adapter=adapter)
        with pytest.raises(ConfigError, match="Did you mean 'skip-dit/dit-xl'"):
            apply_skip_cache(pipe, preset="skip-dit/dit", adapter=adapter)
    assert surroundings(pipe) == before


@pytest.mark.parametrize(("options", "error", "says", "state"), BAD_CASES)
def test_bad_configuration_changes_nothing(options, error, says, state):
    """What cannot be is refused when applied, says why, and leaves the pipeline as it was, cached
    or not.
    """
    pipe = build("pixart")
    if state == "cached":
        apply_to(pipe)
    expected = sample(pipe, 2)
    before = surroundings(pipe)
    options = {"adapter": backbone_of("pixart"), **options}
    with pytest.raises(error, match=says):
        apply_skip_cache(pipe, **options)
    assert surroundings(pipe) == before
    assert is_skip_cached(pipe) is (state == "cached")
    assert torch.equal(sample(pipe, 2), expected)


def test_unknown_model_names_class_and_adapters():
    """A model that no adapter knows is refused with its class, the installed adapters and what to
    pass.
    """

    class Unheard(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList([nn.Linear(2, 2) for _ in range(4)])

    with pytest.raises(NoAdapterError, match=r"'.*Unheard' .*Installed: .*dit_xl.*adapter="):
        apply_skip_cache(Unheard())


def test_pipeline_without_a_transformer_is_refused():
    """A pipeline around a U-Net, or anything else without a transformer, is refused by name."""
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
    )
    with pytest.raises(
        TargetError, match=r"'DDPMPipeline' .* no component named 'transformer'.*unet"
    ):
        apply_skip_cache(DDPMPipeline(unet=unet, scheduler=DDPMScheduler()))
    with pytest.raises(TargetError, match="transformer"):
        apply_skip_cache(SimpleNamespace(transformer=None))


class TwoStagePipeline(DiffusionPipeline):
    """A pipeline with two transformers, noisy steps first (as Wan 2.2 has them)."""

    def __init__(self, transformer, transformer_2, scheduler):
        super().__init__()
        self.register_modules(
            transformer=transformer, transformer_2=transformer_2, scheduler=scheduler
        )

    @torch.no_grad()
    def __call__(self, steps=STEPS, boundary=0.5, seed=0):
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            model = self.transformer if t >= boundary * 1000 else self.transformer_2
            noise = model(
                latents, timestep=t[None], class_labels=torch.tensor([1]), return_dict=False
            )[0]
            latents = self.scheduler.step(noise[:, :4], t, latents, return_dict=False)[0]
        return latents


def two_stage(layers=(LAYERS, LAYERS)):
    first, second = (transformer_of("dit", n, seed=i) for i, n in enumerate(layers))
    return TwoStagePipeline(first, second, DDIMScheduler(clip_sample=False))


@pytest.mark.parametrize("layers", [(LAYERS, 2), (2, LAYERS)])
def test_two_transformers_are_all_or_nothing(layers):
    """If either transformer cannot be cached, neither is touched."""
    pipe = two_stage(layers)
    expected = pipe()
    models = (pipe.transformer, pipe.transformer_2)
    before = [(sorted(vars(m)), type(m.transformer_blocks), len(m._forward_hooks)) for m in models]
    scheduler_before = sorted(vars(pipe.scheduler))
    with pytest.raises(ConfigError, match="2 layers"):
        apply_skip_cache(pipe, adapter=backbone_of("dit"))
    after = [(sorted(vars(m)), type(m.transformer_blocks), len(m._forward_hooks)) for m in models]
    assert after == before
    assert sorted(vars(pipe.scheduler)) == scheduler_before
    assert torch.equal(pipe(), expected)


def test_two_transformers_share_the_steps_of_one_run():
    """With two transformers each caches the steps it is called for, counted by the scheduler, and
    never stale.
    """
    pipe = two_stage()
    plain = pipe()
    apply_skip_cache(
        pipe, interval=2, window=ALWAYS_OPEN, estimator="hold", adapter=backbone_of("dit")
    )
    # Times 0.83, 0.664 | 0.498, 0.332, 0.166, 0: the second one's first call finds nothing cached.
    first, second = pipe(), pipe()
    plans = {name: stream.plan for name, stream in cache_stats(pipe).streams.items()}
    assert plans == {"transformer/0": "Fr", "transformer_2/0": "FrFr"}
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)
    assert remove_skip_cache(pipe)
    assert torch.equal(pipe(), plain)
