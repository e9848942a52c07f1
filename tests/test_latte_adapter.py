"""latte: diffusers' Latte, the class-to-video Latte and the research code's LatteT2V and Latte."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import nn
from torch.overrides import TorchFunctionMode

from pipelines import (
    ALWAYS_OPEN,
    build,
    counted_layers,
    inputs_of,
    surroundings,
    tiny_vae,
    transformer_of,
)
from pipelines import sample as sample_text_to_video
from research_code import Latte
from skipcache import (
    IntervalSchedule,
    MaskSchedule,
    Zipped,
    add_skip_branches,
    apply_skip_cache,
    cache_stats,
    remove_skip_cache,
    skip_cache,
    skip_cache_run,
)
from skipcache.branches.module import SkipBranches
from skipcache.errors import AdapterError, ConfigError
from skipcache.latte_class import LatteClassPipeline, LatteClassTransformer3DModel
from skipcache.plugins import AdapterRegistry
from skipcache_adapters import latte  # noqa: TID251 (a plugin module as adapter=)

LAYERS, STEPS, FRAMES, WIDTH = 5, 6, 2, 16
SCHEDULERS = (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
OPEN = {"adapter": latte, "window": ALWAYS_OPEN, "estimator": "hold"}


def class_model(frames: int = FRAMES, size: int = 8, layers: int = LAYERS) -> nn.Module:
    torch.manual_seed(0)
    return LatteClassTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=size,
        video_length=frames,
        num_classes=5,
    ).eval()


class LatteT2V(nn.Module):
    """The shape of the research code's class: relayouts in the loop, times embedded once."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(_Block() for _ in range(LAYERS))
        self.temporal_transformer_blocks = nn.ModuleList(_Block() for _ in range(LAYERS))
        self.proj_out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("temp_pos_embed", torch.randn(1, FRAMES, WIDTH))

    def forward(self, hidden_states, timestep=None, enable_temporal_attentions=True):
        batch, frames, tokens, width = hidden_states.shape
        hidden_states = hidden_states.flatten(0, 1)
        scale = (timestep / 1000).reshape(-1)[:1]
        for i, (spatial_block, temp_block) in enumerate(
            zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        ):
            hidden_states = spatial_block(hidden_states, None, scale)
            if enable_temporal_attentions:
                hidden_states = hidden_states.reshape(batch, frames, tokens, width)
                hidden_states = hidden_states.transpose(1, 2).reshape(-1, frames, width)
                if i == 0:
                    hidden_states = hidden_states + self.temp_pos_embed
                hidden_states = temp_block(hidden_states, None, scale)
                hidden_states = hidden_states.reshape(batch, tokens, frames, width)
                hidden_states = hidden_states.transpose(1, 2).reshape(-1, tokens, width)
        return self.proj_out(hidden_states).reshape(batch, frames, tokens, width)


class _Block(nn.Module):
    """[B, T, C]: tokens meet, and the time matters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, attention_mask, timestep):
        mixed = hidden_states + hidden_states.mean(dim=1, keepdim=True) + timestep
        return hidden_states + torch.tanh(self.linear(mixed))


# Real pipelines.


def make(kind: str, scheduler=None):
    scheduler = DDIMScheduler(clip_sample=False) if scheduler is None else scheduler
    if kind == "text":
        return build("latte", scheduler=scheduler, layers=LAYERS)
    pipe = LatteClassPipeline(class_model(), tiny_vae(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, steps: int = STEPS) -> torch.Tensor:
    if not isinstance(pipe, LatteClassPipeline):
        return sample_text_to_video(pipe, steps)
    return pipe(
        class_labels=[1, 3],
        num_inference_steps=steps,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames


@pytest.fixture(params=["text", "class"])
def kind(request):
    return request.param


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_pipeline_under_every_scheduler(kind, scheduler):
    """Never reusing changes no bit; at interval 3 the layers of the plan run, both blocks of each;
    taken off, everything is as it was.
    """
    pipe = make(kind, scheduler())
    expected = sample(pipe)
    before = surroundings(pipe)
    with skip_cache(pipe, interval=1, **OPEN):
        assert torch.equal(sample(pipe), expected)
        assert set(cache_stats(pipe).plan) == {"F"}

    apply_skip_cache(pipe, interval=3, **OPEN)
    with counted_layers(pipe.transformer) as counts:
        found = sample(pipe)
    plan = cache_stats(pipe).plan
    # Heun calls twice a step but the last; what follows its call at time 0 refreshes.
    assert plan == ("FrrFrrFrrFF" if scheduler is HeunDiscreteScheduler else "FrrFrr")
    for layer in range(LAYERS):
        is_deep = 1 <= layer < LAYERS - 1
        wanted = plan.count("F") if is_deep else len(plan)
        assert counts[0, layer] == counts[1, layer] == wanted
    assert cache_stats(pipe).layers_run == sum(counts.values()) // 2
    assert not torch.allclose(found, expected, atol=1e-2)

    assert remove_skip_cache(pipe)
    assert torch.equal(sample(pipe), expected)
    assert surroundings(pipe) == before


def test_decoded_frames_come_from_the_cached_run(kind):
    """A cached pipeline still answers with frames of the right shape and range."""
    pipe = make(kind)
    apply_skip_cache(pipe, interval=2, **OPEN)
    if kind == "class":
        frames = pipe(1, num_inference_steps=4, output_type="pt").frames
        assert frames.shape == (1, FRAMES, 3, 8, 8)
    else:
        frames = sample_text_to_video(pipe, 4, output_type="pt")
        assert frames.shape == (1, FRAMES, 3, 64, 64)
    assert 0 <= frames.min() < frames.max() <= 1
    assert cache_stats(pipe).plan == "FrFr"


# Bare models: every layout that the two kinds of blocks can meet.


def text_inputs(frames: int, size: int = 8, seed: int = 0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 4, frames, size, size, generator=draw),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=draw),
        "timestep": torch.tensor([500, 500]),
        "return_dict": False,
    }


def class_inputs(frames: int, size: int = 8, seed: int = 0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 4, frames, size, size, generator=draw),
        "class_labels": torch.tensor([1, 4]),
        "timestep": torch.tensor([500, 500]),
        "return_dict": False,
    }


def research_inputs(seed: int = 0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(2, FRAMES, 6, WIDTH, generator=draw)
    return {"hidden_states": hidden_states, "timestep": torch.tensor([500, 500])}


def text_model(frames: int = FRAMES, size: int = 8) -> nn.Module:
    return transformer_of("latte", LAYERS, video_length=frames, sample_size=size)


def research_model() -> nn.Module:
    torch.manual_seed(0)
    return LatteT2V().eval()


def alternating_model(depth: int = 2 * LAYERS) -> nn.Module:
    """The research code's class-to-video model: one list, spatial and temporal blocks in turn."""
    torch.manual_seed(0)
    return Latte(hidden_size=WIDTH, num_heads=2, depth=depth, num_frames=FRAMES).eval()


def alternating_inputs(seed: int = 0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, FRAMES, 4, 8, 8, generator=draw)
    return {"x": x, "t": torch.tensor([500, 500]), "y": torch.tensor([1, 4])}


NO_TIME = {"enable_temporal_attentions": False}
CASES = {
    "text": (text_model, lambda seed: text_inputs(FRAMES, seed=seed)),
    "text-one-frame": (lambda: text_model(1), lambda seed: text_inputs(1, seed=seed)),
    "text-frames-equal-tokens": (
        lambda: text_model(4, size=4),
        lambda seed: text_inputs(4, size=4, seed=seed),
    ),
    "text-space-only": (text_model, lambda seed: text_inputs(FRAMES, seed=seed) | NO_TIME),
    "class": (class_model, lambda seed: class_inputs(FRAMES, seed=seed)),
    "class-one-frame": (class_model, lambda seed: class_inputs(1, seed=seed)),
    "class-frames-equal-tokens": (
        lambda: class_model(4, size=4),
        lambda seed: class_inputs(4, size=4, seed=seed),
    ),
    "research": (research_model, research_inputs),
    "research-class": (alternating_model, alternating_inputs),
    "research-space-only": (research_model, lambda seed: research_inputs(seed) | NO_TIME),
}
SPANS = [(0, 1), (1, 1), (2, 2), (1, 3)]


@pytest.fixture(params=CASES)
def case(request):
    make, inputs = CASES[request.param]
    return make(), inputs


def output_of(model: nn.Module, inputs: dict) -> torch.Tensor:
    output = model(**inputs)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
@pytest.mark.parametrize(("front", "back"), SPANS)
def test_the_same_input_reused_gives_the_same_output(case, front, back):
    """A forced reuse of the very input that was stored gives its output, bit for bit, in every
    layout; another input does not give the uncached output.
    """
    model, inputs = case
    plain = [output_of(model, inputs(seed)) for seed in (0, 1)]
    has_time = inputs(0).get("enable_temporal_attentions", True)
    layers = {"front_layers": front, "back_layers": back}
    schedule = MaskSchedule((0,), steps=3)
    with skip_cache(model, adapter=latte, schedule=schedule, estimator="hold", **layers):
        with skip_cache_run(model), counted_layers(model) as counts:
            found = [output_of(model, inputs(seed)) for seed in (0, 0, 1)]
        assert cache_stats(model).plan == "Frr"
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[0])
    assert not torch.allclose(found[2], plain[1], rtol=1e-2)
    is_alternating = isinstance(model, Latte)
    for layer in range(LAYERS):
        wanted = 1 if front <= layer < LAYERS - back else 3
        space, time = (
            ((0, 2 * layer), (0, 2 * layer + 1)) if is_alternating else ((0, layer), (1, layer))
        )
        assert counts[space] == wanted
        assert counts[time] == (wanted if has_time else 0)
    assert torch.equal(output_of(model, inputs(1)), plain[1])


@torch.no_grad()
@pytest.mark.parametrize("estimator", ["hold", "residual", "taylor(2)"])
def test_never_reusing_is_bit_identical(case, estimator):
    """With any estimator, refreshing at every step changes no bit."""
    model, inputs = case
    expected = output_of(model, inputs(0))
    with skip_cache(model, adapter=latte, schedule=IntervalSchedule(1), estimator=estimator):
        for _ in range(2):
            assert torch.equal(output_of(model, inputs(0)), expected)


@torch.no_grad()
def test_reuse_goes_on_from_the_stored_feature(case):
    """The block where reuse resumes is entered with the stored feature, [B·F, N, C], untouched by
    the layers and relayouts before it.
    """
    model, inputs = case
    entered = []
    if isinstance(model, Latte):
        resume = model.blocks[2 * (LAYERS - 2)]
    else:
        resume = model.transformer_blocks[LAYERS - 2]

    def look(module, args, kwargs):
        entered.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    resume.register_forward_pre_hook(look, with_kwargs=True)
    schedule = MaskSchedule((0,), steps=3)
    options = {"schedule": schedule, "estimator": "hold", "back_layers": 2}
    with skip_cache(model, adapter=latte, **options), skip_cache_run(model):
        output_of(model, inputs(0))
        output_of(model, inputs(1))
    assert entered[0].shape[-1] == WIDTH
    assert entered[0].shape[0] % 2 == 0
    assert torch.equal(entered[0], entered[1])


class Relayouts(TorchFunctionMode):
    """Counts the bytes that reshaping copies."""

    copied = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function in (torch.Tensor.reshape, torch.Tensor.flatten):
            before, after = (t.untyped_storage().data_ptr() for t in (args[0], output))
            self.copied += output.numel() * output.element_size() if before != after else 0
        return output


@torch.no_grad()
@pytest.mark.parametrize("name", ["text", "research", "research-class"])
def test_skipped_layers_are_not_copied(name):
    """On a reuse step no skipped layer is copied into its two layouts; where the adapter did not
    say that it may be so, each is.
    """
    make, inputs = CASES[name]
    model = make()
    told = registry().backbone_of(model)
    (entry,) = told.lists
    if isinstance(entry, Zipped):
        lists = tuple(dataclasses.replace(spec, relayouts=False) for spec in entry.lists)
        untold = dataclasses.replace(told, lists=(Zipped(lists),))
    else:
        untold = dataclasses.replace(told, lists=(dataclasses.replace(entry, relayouts=False),))
    options = {"schedule": MaskSchedule((0,), steps=2), "estimator": "hold"}
    copied, outputs = [], []
    for backbone in (untold, told):
        with skip_cache(model, adapter=backbone, **options), skip_cache_run(model):
            output_of(model, inputs(0))
            with Relayouts() as watch:
                outputs.append(output_of(model, inputs(1)))
            assert cache_stats(model).plan == "Fr"
        copied.append(watch.copied)
    assert torch.equal(*outputs)
    tokens = 6 if name == "research" else 16
    feature_bytes = 2 * FRAMES * tokens * WIDTH * 4
    assert copied[0] - copied[1] == 2 * (LAYERS - 2) * feature_bytes


@torch.no_grad()
@pytest.mark.parametrize("form", ["replace", "residual"])
def test_branches_on_alternating_blocks(form):
    """Branches join pairs of layers, not of blocks: by hand, and as they run in the model, with a
    cache and without.
    """
    model, inputs = alternating_model(), alternating_inputs()
    plain = output_of(model, inputs)
    branches = SkipBranches(WIDTH, LAYERS, form=form)
    torch.manual_seed(3)
    for parameter in branches.parameters():
        nn.init.normal_(parameter, std=0.3)
    outputs, handles = {}, []
    for layer in range(LAYERS):  # a layer is entered at its spatial block, and left at the next

        def merge(module, args, layer=layer):
            outputs[layer - 1] = args[0]
            merged = args[0]
            for source, target in branches.pairs:
                if target == layer:
                    merged = branches.by_target()[layer](args[0], outputs[source])
            return (merged, *args[1:])

        handles.append(model.blocks[2 * layer].register_forward_pre_hook(merge))
    expected = output_of(model, inputs)
    for handle in handles:
        handle.remove()
    assert not torch.allclose(expected, plain, rtol=1e-2)

    add_skip_branches(model, branches, adapter=latte)
    assert torch.equal(output_of(model, inputs), expected)
    apply_skip_cache(model, adapter=latte, schedule=MaskSchedule((0,), steps=3), estimator="hold")
    with skip_cache_run(model):
        found = [output_of(model, inputs) for _ in range(3)]
    assert cache_stats(model).plan == "Frr"
    assert all(torch.equal(output, expected) for output in found)


@torch.no_grad()
@pytest.mark.parametrize("frames", [3, 5])
def test_frames_that_the_model_was_not_made_for(frames):
    """Text-to-video Latte refuses another number of frames before a layer runs; a single frame, and
    any number without temporal attention, it can do.
    """
    model = text_model(4)
    with pytest.raises(RuntimeError, match="size of tensor"):
        output_of(model, text_inputs(frames))
    pipe = make("text")
    with skip_cache(model, adapter=latte), counted_layers(model) as counts:
        with pytest.raises(ConfigError, match=f"hidden_states has {frames} frames.*for 1 or 4"):
            output_of(model, text_inputs(frames))
        assert counts.total() == 0
        for inputs in (text_inputs(4), text_inputs(1), text_inputs(frames) | NO_TIME):
            assert torch.isfinite(output_of(model, inputs)).all()
    apply_skip_cache(pipe, interval=2, **OPEN)
    steps = []
    with pytest.raises(ConfigError, match=f"{frames} frames.*for 1 or {FRAMES}"):
        pipe(
            **{**inputs_of("latte"), "video_length": frames},
            callback_on_step_end=lambda *_: steps.append(1),
        )
    assert steps == []
    assert torch.equal(sample(pipe), sample(apply_skip_cache(make("text"), interval=2, **OPEN)))


@torch.no_grad()
def test_another_number_of_frames_refreshes():
    """A video of another length within a run is never given the stored feature."""
    model = class_model()
    expected = output_of(model, class_inputs(1))
    with skip_cache(model, adapter=latte, schedule=IntervalSchedule(9), estimator="hold"):
        with skip_cache_run(model):
            output_of(model, class_inputs(2))
            found = output_of(model, class_inputs(1))
        assert cache_stats(model).plan == "FF"
    assert torch.equal(found, expected)


@torch.no_grad()
def test_an_odd_call_without_temporal_attention():
    """Turning temporal attention off for one step keeps the layout, so reuse goes on."""
    model = text_model()
    with skip_cache(model, adapter=latte, schedule=IntervalSchedule(9), estimator="hold"):
        with skip_cache_run(model):
            for extra in ({}, NO_TIME, {}):
                found = output_of(model, text_inputs(FRAMES) | extra)
                assert torch.isfinite(found).all()
        assert cache_stats(model).plan == "Frr"


# What the adapter claims.


def registry() -> AdapterRegistry:
    adapters = AdapterRegistry()
    adapters.register(latte, "latte")
    return adapters


@pytest.mark.parametrize("make", [text_model, class_model, research_model])
def test_what_the_adapter_says(make):
    """One layer is a pair of blocks; the name and the width are told."""
    backbone = registry().backbone_of(make())
    assert backbone.name == "latte"
    assert backbone.hidden_size == WIDTH
    (zipped,) = backbone.lists
    assert [spec.path for spec in zipped.lists] == [
        "transformer_blocks",
        "temporal_transformer_blocks",
    ]
    assert backbone.native_skips == ()


def test_what_the_adapter_says_of_alternating_blocks():
    """A layer is two blocks of the one list; the time is called t."""
    backbone = registry().backbone_of(alternating_model())
    assert (backbone.name, backbone.hidden_size) == ("latte", WIDTH)
    (blocks,) = backbone.lists
    assert (blocks.path, blocks.blocks_per_layer, blocks.takes) == ("blocks", 2, ("x",))
    assert backbone.timestep.argument == "t"


def test_subclasses_are_claimed():
    """A subclass is known by the name of the class that it derives from."""

    class Tuned(LatteT2V):
        pass

    assert registry().backbone_of(Tuned()).name == "latte"


def namesake() -> nn.Module:
    """A LatteT2V without temporal blocks."""
    model = type("LatteT2V", (nn.Module,), {})()
    model.transformer_blocks = nn.ModuleList([nn.Linear(2, 2)])
    return model


@pytest.mark.parametrize(
    "make", [lambda: transformer_of("pixart"), lambda: nn.Linear(2, 2), namesake]
)
def test_other_models_are_not_claimed(make):
    """An image model, a linear layer and a namesake are none of this adapter's models."""
    with pytest.raises(AdapterError, match="'latte' does not claim"):
        registry().backbone_of(make(), "latte")


def test_bad_configurations_fail_when_applied():
    """Too few layers and uneven lists are refused, and nothing is left on the model."""
    model = class_model(layers=2)
    with pytest.raises(ConfigError, match="2 layers"):
        apply_skip_cache(model, adapter=latte)
    with pytest.raises(AdapterError, match="7 blocks, spatial and temporal in turn"):
        apply_skip_cache(alternating_model(7), adapter=latte)
    with pytest.raises(ConfigError, match="2 layers"):
        apply_skip_cache(alternating_model(4), adapter=latte)
    model = class_model()
    del model.temporal_transformer_blocks[-1]
    with pytest.raises(AdapterError, match="zipped lists differ in length"):
        apply_skip_cache(model, adapter=latte)
    assert type(model.transformer_blocks) is nn.ModuleList
    assert not model._forward_pre_hooks
