"""``adapter="auto"``: the first forward is traced, and the cache works from then on, or is gone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import pipelines
import research_code
from pipelines import build, flux_call, sample, surroundings, transformer_of
from skipcache import (
    Backbone,
    BlockList,
    MaskSchedule,
    SkipBranches,
    Timestep,
    add_skip_branches,
    apply_skip_cache,
    cache_stats,
    is_skip_cached,
    plugins,
    remove_skip_cache,
    skip_cache,
    skip_cache_run,
)
from skipcache.errors import AdapterError, ConfigError, NotCachingWarning
from skipcache.plugins import AdapterRegistry
from skipcache.runtime.controller import controller_of
from skipcache.testing import AdapterCase, CheckFailure
from skipcache.testing.auto import GuessingController
from skipcache.testing.case import largest_difference
from skipcache.testing.checks import check_no_list_is_missing
from skipcache.testing.guess import adapter_source, guess_backbone, varied

OPEN = {"interval": 2, "window": (1.0, 0.0), "estimator": "hold"}
AUTO = {"adapter": "auto", **OPEN}
STEPS = (999.0, 800.0, 600.0, 400.0, 200.0)
STACK = Backbone("stack", (BlockList("blocks", ("x",), "x"),), Timestep("t"), hidden_size=8)


@pytest.fixture(autouse=True)
def no_adapters(monkeypatch):
    """None is installed, so that "auto" has to guess."""
    monkeypatch.setattr(plugins, "_default", AdapterRegistry())


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, c):
        return x + torch.tanh(self.linear(x)) + c


class Stack(nn.Module):
    """x [B, N, 8], t [B]; takes one of ``extra`` out a layer, as models with a ControlNet do."""

    def __init__(self, layers: int = 5, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x, t, extra=None):
        c = t.float()[:, None, None] / 1000
        for block in self.blocks:
            x = block(x, c if extra is None else c + extra.pop())
        return x


class Noisy(Stack):
    """Draws noise in its forward."""

    def forward(self, x, t, extra=None):
        return super().forward(x + 0.1 * torch.randn_like(x), t, extra)


class Deaf(Stack):
    """No layer changes its output."""

    def forward(self, x, t, extra=None):
        return x + 0 * super().forward(x, t, extra)


def noise(seed: int = 0, *shape: int) -> torch.Tensor:
    shape = shape or (2, 4, 8)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs_of(model, x=None, steps=STEPS, **inputs) -> list[torch.Tensor]:
    x = noise() if x is None else x
    return [model(x, torch.full((x.shape[0],), t), **inputs) for t in steps]


def same(found, expected) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def marks_of(model: nn.Module) -> dict:
    """What a cache could leave behind."""
    return {
        name: (type(m), sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }


def live(model: nn.Module) -> nn.Module:
    """Research code starts with shut gates; here every layer matters."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                scale = 0.5 if parameter.dim() < 2 else 1.2 / parameter[0].numel() ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=draw))
    return model.eval()


class GuidedDiT(research_code.DiT):
    """With the method that research samplers call, which goes past the module's hooks."""

    def forward_with_cfg(self, x, t, y, cfg_scale):
        half = x[: len(x) // 2]
        noises, rest = self.forward(torch.cat([half, half]), t, y).split(4, dim=1)
        cond, uncond = noises.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


SIZES = {"hidden_size": 16, "depth": 6, "num_heads": 2}


# Bare modules


def test_bare_module_is_cached_as_with_its_adapter():
    """Guessed from the first forward, the cache gives what a described one gives, step by step."""
    model, described = apply_skip_cache(Stack(), **AUTO), Stack()
    apply_skip_cache(described, adapter=STACK, **OPEN)
    assert same(outputs_of(model), outputs_of(described))
    assert cache_stats(model) == cache_stats(described)
    assert cache_stats(model).plan == "FrFrF"
    assert controller_of(model).bound.backbone.lists == STACK.lists


def test_within_an_explicit_run():
    """A ``skip_cache_run`` that began before the guess goes on after it, and ends as always."""
    model = apply_skip_cache(Stack(), **AUTO)
    with skip_cache_run(model, streams=2, timesteps=STEPS):
        for t in STEPS:
            outputs_of(model, noise(0), (t,))
            outputs_of(model, noise(1), (t,))
        assert {name: s.plan for name, s in cache_stats(model).streams.items()} == {
            "0": "FrFrF",
            "1": "FrFrF",
        }
    assert controller_of(model).clock.explicit == []


@pytest.mark.parametrize(
    "times", [(1.0, 0.8, 0.6, 0.4, 0.2), (0.0, 0.2, 0.4, 0.6, 0.8)], ids=["falling", "rising"]
)
def test_times_of_an_explicit_run_tell_their_scale(times):
    """Where no scale could be guessed, times from 1 to 0 or 0 to 1 are read as what they are, and a
    window works.
    """
    model = apply_skip_cache(Stack(), adapter="auto", interval=2, window=(0.7, 0.1))
    with skip_cache_run(model, timesteps=times):
        outputs_of(model, steps=times)
    assert cache_stats(model).plan == "FFFrF"
    assert controller_of(model).bound.backbone.timestep is None


def test_bare_calls_of_unknown_scale_say_so():
    """Without a run, a model whose times go from 1 to 0 is not cached on a guess, but warns."""
    model = apply_skip_cache(Stack(), **AUTO)
    with pytest.warns(NotCachingWarning, match="skip_cache_run"):
        outputs_of(model, steps=(1.0, 0.5))


@pytest.mark.parametrize("name", ["DiT", "Latte"])
def test_research_code(name):
    """Plain PyTorch research models are guessed, and never reusing leaves every bit."""
    sizes = {**SIZES, **({"num_frames": 2} if name == "Latte" else {})}
    model = live(getattr(research_code, name)(**sizes))
    shape = (2, 2, 4, 8, 8) if name == "Latte" else (2, 4, 8, 8)
    inputs = {"x": noise(0, *shape), "y": torch.tensor([1, 2])}
    expected = outputs_of(model, **inputs)
    found = outputs_of(apply_skip_cache(model, **AUTO), **inputs)
    assert cache_stats(model).plan == "FrFrF"
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[1], expected[1])
    apply_skip_cache(model, **{**AUTO, "interval": 1})
    assert same(outputs_of(model, **inputs), expected)


def test_blocks_on_two_layouts_are_one_layer():
    """Blocks of one class that see frames and places in turns make layers of two, so that features
    of one layout are compared wherever the layers left out end.
    """
    model = live(research_code.Latte(num_frames=2, **{**SIZES, "depth": 8}))
    inputs = {"x": noise(0, 2, 2, 4, 8, 8), "y": torch.tensor([1, 2])}
    options = {**AUTO, "estimator": "residual"}
    for front, back in ((0, 1), (1, 1), (1, 2)):
        apply_skip_cache(model, **options, front_layers=front, back_layers=back)
        assert all(torch.isfinite(output).all() for output in outputs_of(model, **inputs))
        assert cache_stats(model).plan == "FrFrF"
        assert cache_stats(model).layers_total == 5 * 4


def test_native_skips_of_research_code_are_refused():
    """Skips that go past what flows from block to block are not guessed away."""
    model = apply_skip_cache(live(research_code.SkipDiT(**SIZES)), **AUTO)
    with pytest.raises(AdapterError, match="cannot be guessed"):
        outputs_of(model, noise(0, 2, 4, 8, 8), y=torch.tensor([1, 2]))


@pytest.mark.parametrize("by_name", [True, False])
def test_method_that_goes_past_the_hooks(by_name):
    """Sampled through ``forward_with_cfg``, research code is guessed and cached too."""

    def outputs(model):
        x, y = noise(0, 2, 4, 8, 8), torch.tensor([1, 2])
        more = ((), {"y": y, "cfg_scale": 2.0}) if by_name else ((y, 2.0), {})
        with torch.no_grad():
            return [
                model.forward_with_cfg(x, torch.full((2,), t), *more[0], **more[1]) for t in STEPS
            ]

    model, described = live(GuidedDiT(**SIZES)), live(GuidedDiT(**SIZES))
    before = marks_of(model)
    backbone = Backbone("d", STACK.lists, Timestep("t"), entry_points=("forward_with_cfg",))
    apply_skip_cache(described, adapter=backbone, **OPEN)
    assert same(outputs(apply_skip_cache(model, **AUTO)), outputs(described))
    assert cache_stats(model).plan == "FrFrF"
    assert 'entry_points=("forward_with_cfg",)' in adapter_source(
        model, controller_of(model).bound.backbone
    )
    remove_skip_cache(model)
    assert marks_of(model) == before


# Pipelines


def test_inside_a_pipeline():
    """Guessed in the middle of a pipeline's call, it caches that call already, by the scheduler."""
    pipe, described = apply_skip_cache(build("pixart"), **AUTO), build("pixart")
    apply_skip_cache(described, adapter=pipelines.backbone_of("pixart"), **OPEN)
    for _ in range(2):
        assert torch.equal(sample(pipe), sample(described))
        assert cache_stats(pipe).plan == cache_stats(described).plan == "FrFrFr"
    assert not isinstance(controller_of(pipe.transformer), GuessingController)


def test_removed_from_a_pipeline():
    """Before the guess or after it, everything is as it was, the scheduler too."""
    pipe = build("pixart")
    expected, before = sample(pipe), surroundings(pipe)
    for is_guessed in (False, True):
        apply_skip_cache(pipe, **AUTO)
        if is_guessed:
            sample(pipe)
        assert remove_skip_cache(pipe)
        assert surroundings(pipe) == before
        assert torch.equal(sample(pipe), expected)


def test_refused_within_a_pipeline():
    """A model that cannot be guessed stops the pipeline with the reason, and is left restored."""
    pipe = build("pixart")
    with torch.no_grad():
        for parameter in pipe.transformer.proj_out.parameters():
            parameter.zero_()
    expected, before = sample(pipe), surroundings(pipe)
    apply_skip_cache(pipe, **AUTO)
    with pytest.raises(AdapterError, match="'PixArtTransformer2DModel' cannot be guessed") as error:
        sample(pipe)
    assert "check_output_is_telling" in str(error.value)
    assert "The cache was taken off again." in str(error.value)
    assert not is_skip_cached(pipe)
    assert surroundings(pipe) == before
    assert torch.equal(sample(pipe), expected)


def test_named_passes():
    """The pass that was under way at the guess keeps its name, and no later call inherits it."""
    model = apply_skip_cache(transformer_of("flux"), **AUTO)
    with torch.no_grad(), skip_cache_run(model, 2, timesteps=[1.0, 0.75, 0.5, 0.25]):
        for step in range(4):
            for name in ("cond", "uncond"):
                with model.cache_context(name):
                    model(**flux_call(step, time=1 - step / 4))
    plans = {name: stream.plan for name, stream in cache_stats(model).streams.items()}
    assert plans == {"cond": "FrFr", "uncond": "FrFr"}
    assert controller_of(model).clock.context.name is None
    remove_skip_cache(model)
    assert "cache_context" not in model.__dict__


# What does not go to plan


def test_refusal_restores_the_model():
    """Refused, a bare module has the same attributes and hooks as before, and the same output."""
    model = Deaf()
    before, expected = marks_of(model), outputs_of(model)
    apply_skip_cache(model, **AUTO)
    with pytest.raises(AdapterError, match="deep span does not matter"):
        outputs_of(model)
    assert marks_of(model) == before
    assert not is_skip_cached(model)
    assert same(outputs_of(model), expected)


def test_settings_that_do_not_fit_are_told():
    """Layers that leave nothing to skip, known with the depth only, are a ``ConfigError`` at the
    first forward.
    """
    model = Stack()
    before = marks_of(model)
    apply_skip_cache(model, adapter="auto", front_layers=3, back_layers=3)
    with pytest.raises(ConfigError, match=r"5 layers.*The cache was taken off again"):
        outputs_of(model)
    assert marks_of(model) == before


def test_wrong_call_leaves_the_guess_to_the_next():
    """An error of the model's own is raised as it is, and the next call is guessed from."""
    model = apply_skip_cache(Stack(), **AUTO)
    with skip_cache_run(model, timesteps=STEPS):
        with pytest.raises(RuntimeError, match="shapes"):
            outputs_of(model, noise(0, 2, 4, 3))
        assert is_skip_cached(model)
        outputs_of(model)
    assert cache_stats(model).plan == "FrFrF"


def test_arguments_without_names_are_refused():
    """A forward of ``*args`` that is called by position says that the call has no names."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Stack()

        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs)

    with pytest.raises(AdapterError, match="no names"):
        outputs_of(apply_skip_cache(Wrapper(), **AUTO))


def test_gradients_on():
    """With gradients nothing is guessed, the output and its gradients are the model's own; without
    them the same model is then cached.
    """
    model, plain = apply_skip_cache(Stack(), **AUTO), Stack()
    x, t = noise().requires_grad_(), torch.full((2,), 500.0)
    with pytest.warns(NotCachingWarning, match="gradients are on"):
        found = model(x, t)
    assert torch.equal(found, plain(x, t))
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (found, plain(x, t))]
    assert torch.equal(*gradients)
    assert cache_stats(model).plan == ""
    outputs_of(model)
    assert cache_stats(model).plan == "FrFrF"


@pytest.mark.parametrize("estimator", ["residual", "taylor", None])
def test_every_estimator_waits_for_the_guess(estimator):
    """An estimator that compares features can be asked for before there are layers to compare."""
    model = apply_skip_cache(Stack(), adapter="auto", window=(1.0, 0.0), estimator=estimator)
    described = apply_skip_cache(Stack(), adapter=STACK, window=(1.0, 0.0), estimator=estimator)
    assert same(outputs_of(model), outputs_of(described))
    assert cache_stats(model).plan == "FrFrF"


def test_inputs_that_the_forward_empties():
    """A list that the forward takes apart is whole when the caller's own forward gets it."""
    extra = [noise(seed, 1, 1, 8) for seed in range(5)]
    expected = outputs_of(Stack(), steps=STEPS[:1], extra=list(extra))
    model = apply_skip_cache(Stack(), **AUTO)
    assert same(outputs_of(model, steps=STEPS[:1], extra=extra), expected)
    assert cache_stats(model).plan == "F"


def test_random_state_is_untouched():
    """Guessing draws nothing: the forward's own noise and all after it are as without a cache."""
    torch.manual_seed(5)
    expected = [*outputs_of(Noisy(seed=5), steps=STEPS[:1]), torch.rand(3)]
    model = apply_skip_cache(Noisy(seed=5), **AUTO)
    found = [*outputs_of(model, steps=STEPS[:1]), torch.rand(3)]
    assert same(found, expected)
    assert cache_stats(model).plan == "F"


# Before the first forward


def test_nothing_has_happened_before_the_first_forward():
    """Until then it counts as applied, has empty stats, and can be taken off without a trace."""
    model = Stack()
    before = marks_of(model)
    apply_skip_cache(model, **AUTO)
    assert is_skip_cached(model)
    stats = cache_stats(model)
    assert (stats.plan, stats.layers_run, stats.compute_fraction) == ("", 0, 1.0)
    assert remove_skip_cache(model)
    assert marks_of(model) == before
    assert not remove_skip_cache(model)


def test_applying_again_replaces_the_settings():
    """Applied twice, before the guess or after it, the last settings count, and one cache is on."""
    model = Stack()
    before = marks_of(model)
    apply_skip_cache(model, **{**AUTO, "interval": 5})
    apply_skip_cache(model, **{**AUTO, "interval": 3})
    outputs_of(model)
    assert cache_stats(model).plan == "FrrFr"
    apply_skip_cache(model, **AUTO)
    outputs_of(model)
    assert cache_stats(model).plan == "FrFrF"
    assert remove_skip_cache(model)
    assert marks_of(model) == before


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("is_guessed", [False, True])
def test_copies(way, is_guessed):
    """A copy made while the guess is pending, or after it, runs and guesses on weights of its
    own.
    """
    model = apply_skip_cache(Stack(), **AUTO)
    expected = outputs_of(apply_skip_cache(Stack(), adapter=STACK, **OPEN))
    if is_guessed:
        outputs_of(model)
    twin = way(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert same(outputs_of(twin), expected)
    assert cache_stats(twin).plan == "FrFrF"
    assert cache_stats(model).plan == ("FrFrF" if is_guessed else "")
    assert not same(outputs_of(model), expected)
    assert remove_skip_cache(twin)
    assert is_skip_cached(model)


# Beside other things


def test_as_a_context_manager():
    """Guessed inside a ``with`` block it is gone after it; one around it pends again."""
    model = Stack()
    before = marks_of(model)
    with skip_cache(model, **AUTO):
        outputs_of(model)
        assert cache_stats(model).plan == "FrFrF"
    assert marks_of(model) == before
    apply_skip_cache(model, **AUTO)
    with skip_cache(model, adapter=STACK, schedule=MaskSchedule((0,), 5), estimator="hold"):
        outputs_of(model)
        assert cache_stats(model).plan == "Frrrr"
    assert isinstance(controller_of(model), GuessingController)
    outputs_of(model)
    assert cache_stats(model).plan == "FrFrF"


def test_skip_branches_stay_at_work():
    """Applied to a model with skip branches, which were given with a description, it uses that
    description; without a cache the branches go on.
    """
    model = Stack()
    branches = SkipBranches(8, 5)
    for parameter in branches.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = outputs_of(add_skip_branches(model, branches, adapter=STACK) or model)
    apply_skip_cache(model, **AUTO)
    with pytest.warns(NotCachingWarning):
        assert torch.equal(model(noise(), torch.full((2,), STEPS[0])), expected[0])
    assert torch.equal(outputs_of(model)[0], expected[0])
    assert cache_stats(model).plan == "FrFrF"
    assert remove_skip_cache(model)
    assert same(outputs_of(model), expected)


def test_branches_added_while_pending():
    """Skip branches that come with a description end the waiting."""
    model = apply_skip_cache(Stack(), **AUTO)
    add_skip_branches(model, SkipBranches(8, 5), adapter=STACK)
    outputs_of(model)
    assert cache_stats(model).plan == "FrFrF"
    assert controller_of(model).bound.backbone == STACK


@pytest.mark.parametrize("what", ["the module", "a wrapper", "blocks"])
def test_compiled(what):
    """Compiled as a whole, wrapped, or block by block, it is guessed from what runs uncompiled, and
    gives what it gives eagerly.
    """
    torch._dynamo.reset()
    expected = outputs_of(apply_skip_cache(Stack(), adapter=STACK, **OPEN))
    model = apply_skip_cache(Stack(), **AUTO)
    called = model
    if what == "the module":
        model.compile(backend="eager")
    elif what == "a wrapper":
        called = torch.compile(model, backend="eager")
    else:
        for block in model.blocks:
            block.compile(backend="eager", fullgraph=True)
    for _ in range(2):
        for found, due in zip(outputs_of(called), expected, strict=True):
            torch.testing.assert_close(found, due)
        assert cache_stats(model).plan == "FrFrF"
    assert remove_skip_cache(model)
    for found, due in zip(outputs_of(called), outputs_of(Stack()), strict=True):
        torch.testing.assert_close(found, due)
    torch._dynamo.reset()


# The guess itself


def test_guess_leaves_compilation_on():
    """After a guess compiled blocks are compiled still."""
    torch._dynamo.reset()
    model, graphs = Stack(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for block in model.blocks:
        block.compile(backend=backend)
    guess_backbone(model, {"x": noise(), "t": torch.full((2,), 500.0)})
    assert graphs == []
    outputs_of(model)
    assert len(graphs) > 0
    torch._dynamo.reset()


def test_varied_inputs():
    """Features are varied, one number a tensor too; seed 0, masks and times are left alone."""
    inputs = {
        "x": noise(),
        "guidance": torch.ones(1, 1),
        "t": torch.full((2,), 500.0),
        "attention_mask": torch.ones(2, 4),
        "pair": [noise(1), noise(2)],
        "flag": True,
    }
    assert all(varied(inputs, 0)[name] is value for name, value in inputs.items())
    found = varied(inputs, 1)
    assert not torch.equal(found["x"], inputs["x"])
    assert not torch.equal(found["guidance"], inputs["guidance"])
    assert not torch.equal(found["pair"][1], inputs["pair"][1])
    assert all(found[name] is inputs[name] for name in ("t", "attention_mask", "flag"))
    assert torch.equal(found["x"], varied(inputs, 1)["x"])


# The kit that it is checked with


def test_kit_tells_a_nan():
    """An output with a NaN where there was a number differs, and so does one with NaNs alone."""
    expected, wrong = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert largest_difference([expected], [expected]) == 0
    assert largest_difference([wrong], [expected]) == float("inf")
    assert largest_difference([wrong], [wrong]) == float("inf")


def test_kit_leaves_the_random_state():
    """Neither building nor running a case draws from the caller's generator, or seeds it."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    case = AdapterCase(Noisy, lambda seed: {"x": noise(seed), "t": torch.ones(2)}, adapter=STACK)
    first = case.run(case.build(), case.make_inputs(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(case.run(case.build(), case.make_inputs(0)), first)


def test_guess_seeds_no_device_that_is_not_in_use(monkeypatch):
    """A seed that the caller set for a GPU, which is used later in the pipeline, stays."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    outputs_of(apply_skip_cache(Stack(), **AUTO), steps=STEPS[:1])
    torch.manual_seed(7)
    assert set(seeded) == {0, 7}  # Stack's own, and ours
    assert len(seeded) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_guess_leaves_the_random_state_of_devices():
    """Nor is that of a GPU in use changed, wherever the model is."""
    torch.cuda.manual_seed_all(5)
    before = torch.cuda.get_rng_state_all()
    model = Stack()
    torch.cuda.set_rng_state_all(before)
    outputs_of(apply_skip_cache(model, **AUTO))
    assert same(torch.cuda.get_rng_state_all(), before)


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return x


class Staged(nn.Module):
    """Lists inside the members of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage() for _ in range(2))

    def forward(self, x, t):
        for stage in self.stages:
            x = stage(x, t[:, None, None] / 1000)
        return x


def test_kit_knows_lists_inside_lists():
    """A list whose members' own lists are named is not missing; one of which a member is not named
    is.
    """
    paths = ("stages.0.blocks", "stages.1.blocks")
    inputs = {"x": noise(), "t": torch.full((2,), 500.0)}
    backbone = Backbone("s", tuple(BlockList(path, ("x",), "x") for path in paths))
    check_no_list_is_missing(AdapterCase(Staged, lambda seed: inputs, adapter=backbone))
    apart = Backbone("s", backbone.lists[:1])
    with pytest.raises(CheckFailure, match=r"\['stages.1.blocks'\] too"):
        check_no_list_is_missing(AdapterCase(Staged, lambda seed: inputs, adapter=apart))
