"""hunyuan_dit: diffusers' HunyuanDiT, with ControlNet and PAG, and the research code's class."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    HunyuanDiTControlNetPipeline,
    HunyuanDiTPAGPipeline,
    HunyuanDiTPipeline,
    UniPCMultistepScheduler,
)
from torch import nn

from pipelines import (
    ALWAYS_OPEN,
    counted_layers,
    inputs_of,
    surroundings,
    tiny_controlnet,
    tiny_vae,
    transformer_of,
)
from skipcache import (
    IntervalSchedule,
    MaskSchedule,
    apply_skip_cache,
    cache_stats,
    remove_skip_cache,
    skip_cache,
    skip_cache_run,
)
from skipcache.errors import AdapterError, ConfigError
from skipcache.plugins import AdapterRegistry
from skipcache_adapters import hunyuan_dit  # noqa: TID251 (a plugin module as adapter=)

LAYERS, STEPS, WIDTH = 8, 6, 16
SCHEDULERS = (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
OPEN = {"adapter": hunyuan_dit, "window": ALWAYS_OPEN, "estimator": "hold"}


def make(kind: str, scheduler=None):
    parts = dict.fromkeys(
        (
            "text_encoder",
            "tokenizer",
            "text_encoder_2",
            "tokenizer_2",
            "safety_checker",
            "feature_extractor",
        )
    )
    parts["transformer"] = transformer_of("hunyuan_dit", LAYERS)
    parts["vae"] = tiny_vae(blocks=4)
    parts["scheduler"] = DDIMScheduler(clip_sample=False) if scheduler is None else scheduler
    parts["requires_safety_checker"] = False
    if kind == "controlnet":
        pipe = HunyuanDiTControlNetPipeline(controlnet=tiny_controlnet(LAYERS), **parts)
    elif kind == "pag":
        pipe = HunyuanDiTPAGPipeline(pag_applied_layers=["blocks.2", "blocks.6"], **parts)
    else:
        pipe = HunyuanDiTPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **changes) -> torch.Tensor:
    inputs = {**inputs_of("hunyuan_dit", STEPS), **changes}
    if isinstance(pipe, HunyuanDiTControlNetPipeline):
        draw = torch.Generator().manual_seed(7)
        inputs.setdefault("control_image", torch.rand(1, 3, 64, 64, generator=draw))
    if isinstance(pipe, HunyuanDiTPAGPipeline):
        inputs.setdefault("pag_scale", 2.0)
    torch.manual_seed(8)  # the ControlNet pipeline encodes its picture with the global generator
    return pipe(**inputs)[0]


@pytest.fixture(params=["plain", "controlnet", "pag"])
def kind(request):
    return request.param


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_pipeline_under_every_scheduler(kind, scheduler):
    """Never reusing changes no bit; at interval 3 exactly the layers of the plan run; taken off,
    everything is as it was.
    """
    pipe = make(kind, scheduler())
    expected = sample(pipe)
    before = surroundings(pipe)
    with skip_cache(pipe, interval=1, **OPEN):
        assert torch.equal(sample(pipe), expected)
        assert set(cache_stats(pipe).plan) == {"F"}

    apply_skip_cache(pipe, interval=3, front_layers=2, back_layers=2, **OPEN)
    with counted_layers(pipe.transformer) as counts:
        found = sample(pipe)
    plan = cache_stats(pipe).plan
    # Heun calls twice a step but the last; what follows its call at time 0 refreshes.
    assert plan == ("FrrFrrFrrFF" if scheduler is HeunDiscreteScheduler else "FrrFrr")
    for layer in range(LAYERS):
        is_deep = 2 <= layer < LAYERS - 2
        assert counts[0, layer] == (plan.count("F") if is_deep else len(plan))
    assert cache_stats(pipe).layers_run == sum(counts.values())
    assert not torch.allclose(found, expected, atol=1e-2)

    assert remove_skip_cache(pipe)
    assert torch.equal(sample(pipe), expected)
    assert surroundings(pipe) == before


def test_guides_are_heard():
    """The tiny ControlNet and PAG change the output, cached or not, so what is said of them above
    means something.
    """
    for kind, silent in (
        ("controlnet", {"controlnet_conditioning_scale": 0.0}),
        ("pag", {"pag_scale": 0.0}),
    ):
        pipe = make(kind)
        assert not torch.allclose(sample(pipe), sample(pipe, **silent), atol=1e-2)
        apply_skip_cache(pipe, interval=2, **OPEN)
        assert not torch.allclose(sample(pipe), sample(pipe, **silent), atol=1e-2)


# Bare models.


def inputs_for(seed: int = 0, residuals: bool = False, style: bool = True) -> dict:
    draw = torch.Generator().manual_seed(seed)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=draw),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=draw),
        "text_embedding_mask": torch.ones(2, 5),
        "encoder_hidden_states_t5": torch.randn(2, 4, 16, generator=draw),
        "text_embedding_mask_t5": torch.ones(2, 4),
        "return_dict": False,
    }
    if style:
        inputs |= {"image_meta_size": torch.full((2, 6), 64.0)}
        inputs |= {"style": torch.zeros(2, dtype=torch.long)}
    if residuals:
        inputs["controlnet_block_samples"] = [
            torch.randn(2, 16, WIDTH, generator=draw) for _ in range(LAYERS // 2 - 1)
        ]
    return inputs


class ResearchBlock(nn.Module):
    """[B, T, C]; a late one takes a skip, as in the research code."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.skip_linear = nn.Linear(2 * WIDTH, WIDTH) if skip else None

    def forward(self, x, c=None, text_states=None, freq_cis_img=None, skip=None):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        return x + torch.tanh(self.linear(x + c))


class HunYuanDiT(nn.Module):
    """The shape of the research code's class: skips are pushed and popped by layer number."""

    def __init__(self, depth: int = LAYERS) -> None:
        super().__init__()
        self.depth, self.hidden_size = depth, WIDTH
        self.x_embedder = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(ResearchBlock(skip=i > depth // 2) for i in range(depth))
        self.final_layer = nn.Linear(WIDTH, 4)

    def forward(self, x, t):
        c, x, skips = (t / 1000).reshape(-1, 1, 1), self.x_embedder(x), []
        for layer, block in enumerate(self.blocks):
            if layer > self.depth // 2:
                x = block(x, c, None, None, skips.pop())
            else:
                x = block(x, c, None, None)
            if layer < self.depth // 2 - 1:
                skips.append(x)
        return self.final_layer(x)


def research_model() -> nn.Module:
    torch.manual_seed(0)
    return HunYuanDiT().eval()


def research_inputs(seed: int = 0) -> dict:
    draw = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(2, 6, 4, generator=draw), "t": torch.tensor([500.0, 500.0])}


def later_version() -> nn.Module:
    """As of v1.2: no style and no image size."""
    return transformer_of("hunyuan_dit", LAYERS, use_style_cond_and_image_meta_size=False)


CASES = {
    "diffusers": (lambda: transformer_of("hunyuan_dit", LAYERS), inputs_for),
    "diffusers-1.2": (later_version, lambda seed: inputs_for(seed, style=False)),
    "controlnet": (
        lambda: transformer_of("hunyuan_dit", LAYERS),
        lambda seed: inputs_for(seed, residuals=True),
    ),
    "research": (research_model, research_inputs),
}
SPANS = [(1, 1), (2, 2), (3, 2), (4, 1), (3, 3), (6, 1)]


@pytest.fixture(params=CASES)
def case(request):
    make_model, inputs = CASES[request.param]
    return make_model(), inputs


def output_of(model: nn.Module, inputs: dict) -> torch.Tensor:
    output = model(**inputs)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
@pytest.mark.parametrize(("front", "back"), SPANS)
def test_the_same_input_reused_gives_the_same_output(case, front, back):
    """A forced reuse of the very input that was stored gives its output, bit for bit: each skip,
    and each ControlNet residual, reaches the layer that it is for.
    """
    model, inputs = case
    plain = [output_of(model, inputs(seed)) for seed in (0, 1)]
    options = {"schedule": MaskSchedule((0,), steps=3), "estimator": "hold"}
    options |= {"front_layers": front, "back_layers": back}
    with skip_cache(model, adapter=hunyuan_dit, **options):
        with skip_cache_run(model), counted_layers(model) as counts:
            found = [output_of(model, inputs(seed)) for seed in (0, 0, 1)]
        assert cache_stats(model).plan == "Frr"
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[0])
    assert not torch.allclose(found[2], plain[1], rtol=1e-2)
    for layer in range(LAYERS):
        assert counts[0, layer] == (1 if front <= layer < LAYERS - back else 3)
    assert torch.equal(output_of(model, inputs(1)), plain[1])


@torch.no_grad()
@pytest.mark.parametrize("estimator", ["hold", "residual", "taylor(2)"])
def test_never_reusing_is_bit_identical(case, estimator):
    """With any estimator, refreshing at every step changes no bit."""
    model, inputs = case
    expected = output_of(model, inputs(0))
    options = {"schedule": IntervalSchedule(1), "estimator": estimator}
    with skip_cache(model, adapter=hunyuan_dit, **options):
        for _ in range(2):
            assert torch.equal(output_of(model, inputs(0)), expected)


@torch.no_grad()
def test_residuals_of_this_step_reach_the_back():
    """At a reuse step the back takes this step's residuals, each its own, and none is left over."""
    model = transformer_of("hunyuan_dit", LAYERS)
    skips = {}
    for layer in (6, 7):
        model.blocks[layer].register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: skips.update({layer: kwargs["skip"]}),
            with_kwargs=True,
        )
    options = {"schedule": MaskSchedule((0,), steps=2), "estimator": "hold"}
    options |= {"front_layers": 2, "back_layers": 2}
    with skip_cache(model, adapter=hunyuan_dit, **options), skip_cache_run(model):
        model(**inputs_for(0, residuals=True))
        model(**inputs_for(1))
        without = dict(skips)
        inputs = inputs_for(1, residuals=True)
        residuals = list(inputs["controlnet_block_samples"])
    with skip_cache(model, adapter=hunyuan_dit, **options), skip_cache_run(model):
        model(**inputs_for(0, residuals=True))
        model(**inputs)
        assert cache_stats(model).plan == "Fr"
    assert inputs["controlnet_block_samples"] == []
    # Last in, first out: the first residual is for the last layer.
    for layer in (6, 7):
        torch.testing.assert_close(skips[layer] - without[layer], residuals[7 - layer])


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_residuals_is_refused(count):
    """Too few or too many residuals are refused before a layer runs, by number; the model itself
    fails too, without saying why. The next run is a clean one.
    """
    model = transformer_of("hunyuan_dit", LAYERS)
    plain = output_of(model, inputs_for(1))

    def wrong():
        residuals = [torch.zeros(2, 16, WIDTH) for _ in range(count)]
        return inputs_for(0) | {"controlnet_block_samples": residuals}

    with pytest.raises((IndexError, ValueError), match=r"empty list|number of controls"):
        model(**wrong())
    options = {"schedule": IntervalSchedule(9), "estimator": "hold"}
    with skip_cache(model, adapter=hunyuan_dit, **options):
        model(**inputs_for(0))
        message = f"controlnet_block_samples has {count} ControlNet residuals.*made for 3"
        with counted_layers(model) as counts, pytest.raises(ConfigError, match=message):
            model(**wrong())
        assert counts.total() == 0
        with skip_cache_run(model):
            assert torch.equal(output_of(model, inputs_for(1)), plain)


@pytest.mark.parametrize("depth", [4, 12])
def test_a_controlnet_of_another_depth_is_refused(depth):
    """A pipeline whose ControlNet was made for another depth is refused at its first step."""
    pipe = make("controlnet")
    pipe.controlnet = tiny_controlnet(depth)
    steps = []
    apply_skip_cache(pipe, interval=2, **OPEN)
    with pytest.raises(ConfigError, match=f"has {depth // 2 - 1} ControlNet residuals.*for 3"):
        sample(pipe, callback_on_step_end=lambda *_: steps.append(1))
    assert steps == []
    pipe.controlnet = tiny_controlnet(LAYERS)
    fresh = apply_skip_cache(make("controlnet"), interval=2, **OPEN)
    assert torch.equal(sample(pipe), sample(fresh))


# What the adapter claims.


def registry() -> AdapterRegistry:
    adapters = AdapterRegistry()
    adapters.register(hunyuan_dit, "hunyuan_dit")
    return adapters


def skips_seen(model: nn.Module, inputs: dict) -> set[tuple[int, int]]:
    """(source, target) of every skip, found by watching the blocks."""
    outputs, pairs = {}, set()

    def before(module, args, kwargs, layer):
        skip = kwargs.get("skip", args[4] if len(args) > 4 else None)
        if skip is not None:
            pairs.update((i, layer) for i, output in outputs.items() if output is skip)

    for layer, block in enumerate(model.blocks):
        block.register_forward_pre_hook(
            lambda m, a, k, layer=layer: before(m, a, k, layer), with_kwargs=True
        )
        block.register_forward_hook(lambda m, a, out, layer=layer: outputs.update({layer: out}))
    model(**inputs)
    return pairs


@torch.no_grad()
@pytest.mark.parametrize("depth", [2, 4, 6, 40])
def test_pairs_are_those_of_the_model(depth):
    """The pairs told are those that the model's own forward makes, at any even depth."""
    model = transformer_of("hunyuan_dit", depth)
    told = registry().backbone_of(model).native_skips
    assert len(set(told)) == len(told) == depth // 2 - 1
    assert set(told) == skips_seen(model, inputs_for())
    assert set(told) == {(i, depth - 1 - i) for i in range(depth // 2 - 1)}


@torch.no_grad()
def test_pairs_of_the_research_model():
    """Likewise of the research code's class."""
    model = research_model()
    told = registry().backbone_of(model).native_skips
    assert set(told) == skips_seen(model, research_inputs())


@pytest.mark.parametrize(
    ("make_model", "flow", "argument"),
    [
        (lambda: transformer_of("hunyuan_dit"), "hidden_states", "timestep"),
        (later_version, "hidden_states", "timestep"),
        (research_model, "x", "t"),
        (lambda: type("Tuned", (HunYuanDiT,), {})(), "x", "t"),
    ],
    ids=["diffusers", "diffusers-1.2", "research", "subclass"],
)
def test_what_the_adapter_says(make_model, flow, argument):
    """Name, width, flowing tensor and timestep, of each class and its subclasses."""
    backbone = registry().backbone_of(make_model())
    assert backbone.name == "hunyuan_dit"
    assert backbone.hidden_size == WIDTH
    assert backbone.lists[0].takes == (flow,)
    assert backbone.timestep.argument == argument


@torch.no_grad()
@pytest.mark.parametrize("make_model", [lambda n: transformer_of("hunyuan_dit", n), HunYuanDiT])
@pytest.mark.parametrize("depth", [3, 7])
def test_an_odd_depth_is_the_models_own_fault(make_model, depth):
    """An odd depth is refused before sampling, and rightly: the model cannot run."""
    model = make_model(depth)
    message = f"{depth} blocks.*keeps {depth // 2 - 1}.*odd depth the model itself cannot run"
    with pytest.raises(AdapterError, match=message):
        apply_skip_cache(model, adapter=hunyuan_dit)
    inputs = research_inputs() if isinstance(model, HunYuanDiT) else inputs_for()
    with pytest.raises(IndexError, match="pop from empty list"):
        model(**inputs)


@pytest.mark.parametrize("depth", [1, 2])
def test_too_shallow_to_cache(depth):
    """One or two blocks have no skips and no deep span: refused when applied."""
    model = transformer_of("hunyuan_dit", depth)
    assert registry().backbone_of(model).native_skips == ()
    with pytest.raises(ConfigError, match=f"{depth} layer"):
        apply_skip_cache(model, adapter=hunyuan_dit)


def test_a_span_that_cuts_a_skip():
    """More layers at the back than at the front would cut a skip in two: refused when applied."""
    model = transformer_of("hunyuan_dit", LAYERS)
    with pytest.raises(ConfigError, match="starts at layer 1, which a reuse step leaves out"):
        apply_skip_cache(model, adapter=hunyuan_dit, front_layers=1, back_layers=2)
    assert type(model.blocks) is nn.ModuleList


def namesake() -> nn.Module:
    """A HunYuanDiT without embedder and final layer."""
    model = type("HunYuanDiT", (nn.Module,), {})()
    model.blocks = nn.ModuleList([nn.Linear(2, 2)])
    return model


@pytest.mark.parametrize(
    "make_model",
    [tiny_controlnet, lambda: transformer_of("dit"), lambda: nn.Linear(2, 2), namesake],
)
def test_other_models_are_not_claimed(make_model):
    """A ControlNet, a DiT, a linear layer and a namesake are none of this adapter's models."""
    with pytest.raises(AdapterError, match="'hunyuan_dit' does not claim"):
        registry().backbone_of(make_model(), "hunyuan_dit")
