"""Apply before or after offloading, compiling, hooking and saving: the order never matters."""

from __future__ import annotations

import functools
import os

import accelerate
import pytest
import torch
import torch._dynamo
from diffusers import DDIMScheduler
from torch._dynamo.testing import CompileCounter

from pipelines import (
    ALWAYS_OPEN,
    KINDS,
    LAYERS,
    STEPS,
    apply_to,
    backbone_of,
    block_lists,
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
    ProbeSchedule,
    apply_skip_cache,
    cache_stats,
    remove_skip_cache,
    skip_cache_run,
)

CPU = torch.device("cpu")
ORDERS = ("apply-first", "apply-last", "apply-between-runs")


def in_order(order, pipe, do, **options):
    """Applies the cache before or after the other thing was done, or once that has already been
    used.
    """
    if order == "apply-first":
        apply_to(pipe, **options)
        do(pipe)
    else:
        do(pipe)
        if order == "apply-between-runs":
            sample(pipe, 2)
        apply_to(pipe, **options)
    return pipe


# Offloading.


def offload_pipeline(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_twice(pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.enable_model_cpu_offload(device="cpu")


def offload_transformer(pipe):
    accelerate.cpu_offload_with_hook(pipe.transformer, execution_device="cpu")


def offload_groups(pipe):
    pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )


def offload_leaves(pipe):
    pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
    )


OFFLOADS = (offload_pipeline, offload_twice, offload_transformer, offload_groups, offload_leaves)


@pytest.mark.parametrize("offload", OFFLOADS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("order", ORDERS)
def test_offloading(order, offload):
    """Whatever is offloaded and when, every run gives what it gives without, with the same layers
    run.
    """
    pipe = in_order(order, build("pixart"), offload)
    assert "forward" in vars(pipe.transformer) or hasattr(pipe.transformer, "_diffusers_hook")
    for _ in range(3):
        with counted_layers(pipe.transformer) as counts:
            assert torch.equal(sample(pipe), reference("pixart"))
        assert cache_stats(pipe).plan == "FrrFrr"
        assert [counts[0, i] for i in range(LAYERS)] == [STEPS, 2, 2, 2, 2, STEPS]
    assert remove_skip_cache(pipe)
    assert torch.equal(sample(pipe), reference("pixart", estimator=None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
def test_model_offloading_of_every_pipeline(kind, order):
    """``enable_model_cpu_offload`` takes its hooks off and on at the end of each call; the cache
    stays.
    """
    pipe = in_order(order, build(kind), offload_pipeline)
    for seed in (0, 1, 0):
        assert torch.equal(sample(pipe, seed=seed), reference(kind, seed=seed))
        assert cache_stats(pipe).plan == "FrrFrr"


@pytest.mark.parametrize(
    ("kind", "offload"),
    [("dit", offload_pipeline), ("pixart", offload_pipeline), ("pixart", offload_groups)],
)
def test_offloading_stays_after_remove(kind, offload):
    """Taking the cache off leaves the offloading hooks on, and the model plain otherwise."""
    pipe = build(kind)
    offload(pipe)
    keys = sorted(vars(pipe.transformer))
    apply_to(pipe)
    sample(pipe)
    remove_skip_cache(pipe)
    assert sorted(vars(pipe.transformer)) == keys
    assert torch.equal(sample(pipe), reference(kind, estimator=None))


@pytest.mark.parametrize("order", ["apply-first", "apply-last"])
def test_skipped_blocks_are_not_loaded(order, tmp_path):
    """A block that a reuse step leaves out is not loaded: its weights, offloaded to a file, can
    even be gone.
    """

    def offload(pipe):
        pipe.transformer.enable_group_offload(
            onload_device=CPU,
            offload_device=CPU,
            offload_type="block_level",
            num_blocks_per_group=1,
            offload_to_disk_path=str(tmp_path),
        )

    pipe = build("pixart")
    args, kwargs = call_of(pipe)
    in_order(order, pipe, offload, interval=4)
    model = pipe.transformer
    with torch.no_grad(), skip_cache_run(pipe):
        refreshed = model(*args, **kwargs)[0]
        for block in list(model.transformer_blocks)[1:-1]:
            group = block._diffusers_hook.get_hook("group_offloading").group
            os.remove(group.safetensors_file_path)
        for _ in range(3):
            assert torch.equal(model(*args, **kwargs)[0], refreshed)
        with pytest.raises(FileNotFoundError):
            model(*args, **kwargs)
    assert cache_stats(pipe).plan == "Frrr"


# Compiling.


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def depth_of(kind):
    """As few layers as the model and a deep span allow: what is traced costs time."""
    return 4 if kind == "hunyuan_dit" else 3


def shallow(kind, **options):
    """A pipeline of few layers; cached where options are given."""
    pipe = build(kind, layers=depth_of(kind))
    return apply_to(pipe, adapter=backbone_of(kind, depth_of(kind)), **options) if options else pipe


def compile_whole(pipe, counter):
    pipe.transformer = torch.compile(pipe.transformer, backend=counter)


def compile_in_place(pipe, counter):
    pipe.transformer.compile(backend=counter)


def compile_blocks(pipe, counter):
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend=counter, fullgraph=True)


@functools.cache
def uncached_block_graphs(kind):
    """How many graphs regional compilation makes of the plain model."""
    torch._dynamo.reset()
    counter = CompileCounter()
    if kind == "flux":
        model = transformer_of("flux")
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        flux_steps(model)
    else:
        pipe = shallow(kind)
        compile_blocks(pipe, counter)
        sample(pipe)
    torch._dynamo.reset()
    return counter.frame_count


def flux_steps(model):
    """Six bare steps, every one with an input of its own; the six outputs."""
    outputs = []
    with torch.no_grad():
        for step in range(STEPS):
            call = flux_call(time=1.0 - step / STEPS)
            call["hidden_states"] = call["hidden_states"] * (1.0 + 0.1 * step)
            outputs.append(model(**call)[0])
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("do", "order", "options", "graphs"),
    [
        (compile_whole, "apply-first", {"estimator": "residual"}, 3),
        (compile_whole, "apply-last", {"estimator": "taylor"}, 3),
        (compile_whole, "apply-between-runs", {"estimator": "hold"}, 4),
        (compile_in_place, "apply-first", {"estimator": "taylor"}, 3),
        (compile_in_place, "apply-last", {"estimator": "residual"}, 3),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_compiling_as_a_whole(do, order, options, graphs):
    """Compiled as a whole, before or after: few graphs, none in later runs, the output of the eager
    run.
    """
    expected = sample(shallow("dit", **options))
    counter = CompileCounter()
    in_order(
        order,
        pipe := shallow("dit"),
        lambda pipe: do(pipe, counter),
        adapter=backbone_of("dit", depth_of("dit")),
        **options,
    )
    torch.testing.assert_close(sample(pipe), expected)
    assert cache_stats(pipe).plan == "FrrFrr"
    # Compiled and run before the cache was applied, the model has its uncached graph besides.
    assert 1 <= counter.frame_count <= graphs
    before = counter.frame_count
    for steps in (STEPS, 4, STEPS):
        output = sample(pipe, steps)
    torch.testing.assert_close(output, expected)
    assert counter.frame_count == before


@pytest.mark.parametrize("kind", ["latte", "hunyuan_dit", "pixart"])
def test_compiling_every_transformer_as_a_whole(kind):
    """At most three graphs for a whole model, with both kinds of step, and none in a second run."""
    counter = CompileCounter()
    pipe = shallow(kind, estimator="taylor")
    compile_in_place(pipe, counter)
    torch.testing.assert_close(sample(pipe), sample(shallow(kind, estimator="taylor")))
    assert cache_stats(pipe).plan == "FrrFrr"
    assert 1 <= counter.frame_count <= 3
    before = counter.frame_count
    sample(pipe)
    assert counter.frame_count == before


@pytest.mark.parametrize(
    ("kind", "order", "options"),
    [
        ("dit", "apply-first", {"estimator": "residual"}),
        ("dit", "apply-last", {"estimator": "taylor"}),
        ("dit", "apply-between-runs", {"estimator": "hold"}),
        ("pixart", "apply-first", {"schedule": ProbeSchedule(1e9, 2)}),
        ("pixart", "apply-last", {"estimator": "residual"}),
    ],
)
def test_compiling_block_by_block(kind, order, options):
    """Block by block with ``fullgraph``: no graph more than uncached, none in later runs, the eager
    output.
    """
    uncached = uncached_block_graphs(kind)
    # The embedder's tensor is transposed, which alone makes one more graph of the same class.
    assert 1 <= uncached <= 2
    counter = CompileCounter()
    in_order(
        order,
        pipe := shallow(kind),
        lambda pipe: compile_blocks(pipe, counter),
        adapter=backbone_of(kind, depth_of(kind)),
        **options,
    )
    expected = sample(shallow(kind, **options))
    torch.testing.assert_close(sample(pipe), expected)
    assert cache_stats(pipe).plan == "FrrFrr"
    for steps in (STEPS, 4, STEPS):
        output = sample(pipe, steps)
    torch.testing.assert_close(output, expected)
    assert counter.frame_count == uncached


@pytest.mark.parametrize(
    ("order", "estimator", "front", "back"),
    [
        ("apply-first", "hold", 1, 1),
        ("apply-last", "residual", 1, 3),
        ("apply-first", "taylor", 1, 4),
    ],
)
def test_compile_repeated_blocks(order, estimator, front, back):
    """Regional compilation with ``fullgraph``: no graph more than uncached, whichever layers are
    skipped.
    """

    def apply(model):
        apply_skip_cache(
            model,
            interval=3,
            window=ALWAYS_OPEN,
            front_layers=front,
            back_layers=back,
            estimator=estimator,
            adapter=backbone_of("flux"),
        )

    # Two classes of block; the second meets contiguous tensors first, slices of a larger one then.
    assert 2 <= uncached_block_graphs("flux") <= 3
    eager, model = transformer_of("flux"), transformer_of("flux")
    counter = CompileCounter()
    if order == "apply-first":
        apply(model)
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    if order == "apply-last":
        apply(model)
    apply(eager)
    for _ in range(2):
        torch.testing.assert_close(flux_steps(model), flux_steps(eager))
        assert cache_stats(model).plan == "FrrFrr"
        assert counter.frame_count == uncached_block_graphs("flux")


def test_remove_from_a_compiled_model():
    """Removing from a compiled transformer gives the plain output again."""
    counter = CompileCounter()
    pipe = shallow("dit", estimator="hold")
    compile_whole(pipe, counter)
    sample(pipe)
    assert counter.frame_count > 0
    assert remove_skip_cache(pipe)
    torch.testing.assert_close(sample(pipe), sample(shallow("dit")))
    assert not any("_stand_ins" in vars(block_list) for block_list in block_lists(pipe.transformer))


# Hooks of the user.


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_the_user_fire(kind):
    """Hooks on the transformer and on its blocks, registered before and after, all fire, and stay
    after remove.
    """
    pipe = build(kind)
    model = pipe.transformer
    fired = {}

    def register(name):
        def note(where):
            def hook(*args):
                fired[name, where] = fired.get((name, where), 0) + 1

            return hook

        model.register_forward_pre_hook(note("pre"))
        model.register_forward_hook(note("post"))
        block_lists(model)[0][0].register_forward_hook(note("front block"))
        block_lists(model)[0][2].register_forward_pre_hook(note("deep block"))

    register("before")
    apply_to(pipe)
    register("after")
    sample(pipe)
    expected = {"pre": STEPS, "post": STEPS, "front block": STEPS, "deep block": 2}
    assert fired == {(n, w): count for n in ("before", "after") for w, count in expected.items()}
    remove_skip_cache(pipe)
    fired.clear()
    sample(pipe)
    assert set(fired.values()) == {STEPS}
    assert len(fired) == 8


@pytest.mark.parametrize("position", ["before", "after"])
def test_hook_that_changes_the_input_is_heard(position):
    """A user's pre-hook that changes what the transformer is given acts with the cache as it does
    without.
    """

    def halve(module, args, kwargs):
        return (args[0] * 0.5, *args[1:]), kwargs

    plain = build("dit")
    plain.transformer.register_forward_pre_hook(halve, with_kwargs=True)
    expected = sample(plain)
    pipe = build("dit")
    if position == "before":
        pipe.transformer.register_forward_pre_hook(halve, with_kwargs=True)
    apply_to(pipe, interval=1)
    if position == "after":
        pipe.transformer.register_forward_pre_hook(halve, with_kwargs=True)
    assert torch.equal(sample(pipe), expected)


# Saving.


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_saved_transformer_is_the_plain_one(kind, tmp_path):
    """``save_pretrained`` writes the same bytes before, while and after the cache is applied, and
    they load.
    """
    pipe = build(kind)
    model = pipe.transformer
    model.save_pretrained(tmp_path / "before")
    apply_to(pipe)
    model.save_pretrained(tmp_path / "applied")
    sample(pipe)
    model.save_pretrained(tmp_path / "used")
    remove_skip_cache(pipe)
    model.save_pretrained(tmp_path / "after")
    plain = files_of(tmp_path / "before")
    assert len(plain) == 2
    for state in ("applied", "used", "after"):
        assert files_of(tmp_path / state) == plain, state
    again = type(model).from_pretrained(tmp_path / "used").eval()
    pipe = build(kind, transformer=again)
    assert torch.equal(sample(pipe), reference(kind, estimator=None))
    assert torch.equal(sample(apply_to(pipe)), reference(kind))


def test_saved_pipeline_is_the_plain_one(tmp_path):
    """A whole pipeline saves, while cached and used, the same files as without, its scheduler's
    too.
    """
    for state in ("plain", "used"):
        pipe = build("dit", scheduler=DDIMScheduler(clip_sample=False))
        if state == "used":
            apply_to(pipe)
            sample(pipe)
        pipe.save_pretrained(tmp_path / state)
    assert files_of(tmp_path / "used") == files_of(tmp_path / "plain")
    again = type(pipe).from_pretrained(tmp_path / "used")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again), reference("dit", estimator=None))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_loaded_while_applied_are_used(kind):
    """Loading a state dict into a cached transformer takes effect in front, span and back alike."""
    pipe = cached(kind)
    sample(pipe)
    missing, unexpected = pipe.transformer.load_state_dict(
        transformer_of(kind, seed=1).state_dict()
    )
    assert not missing
    assert not unexpected
    assert torch.equal(sample(pipe), reference(kind, weights=1))
