"""dit_xl: diffusers' DiT, the patched Transformer2DModel, and the research code's own DiT class."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, Transformer2DModel, UNet2DModel
from torch import nn

from skipcache import (
    IntervalSchedule,
    apply_skip_cache,
    cache_stats,
    is_skip_cached,
    remove_skip_cache,
    skip_cache_run,
)
from skipcache.errors import NoAdapterError, NotCachingWarning
from skipcache.plugins import default_registry

LAYERS = 5
LABELS = torch.tensor([3, 7])
EVERY_THIRD = {"schedule": IntervalSchedule(3), "estimator": "hold"}
PLAN = "FrrFrr"
TIMES = [900, 750, 600, 450, 300, 150]


def diffusers_dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        num_layers=LAYERS,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def patched(norm_type: str) -> nn.Module:
    is_single = norm_type == "ada_norm_single"
    return Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=4,
        num_layers=LAYERS,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type=norm_type,
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
        cross_attention_dim=8 if is_single else None,
        caption_channels=6 if is_single else None,
    )


class ResearchBlock(nn.Module):
    """adaLN-modulated, as in the paper's code; [N, T, C] and c of [N, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x, c):
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return x + self.mlp(self.norm(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """The shape of the research code's class, its guidance method included."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(2, width)
        self.y_embedder = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(ResearchBlock(width) for _ in range(LAYERS))
        self.final_layer = nn.Linear(width, 2)

    def forward(self, x, t, y):
        c = self.y_embedder(y) + (t / 1000).unsqueeze(1)
        x = self.x_embedder(x)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x)

    def forward_with_cfg(self, x, t, y, cfg_scale):
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half], dim=0), t, y)
        cond, uncond = out.chunk(2, dim=0)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([guided, guided], dim=0)


class DiTThatCallsItself(DiT):
    """Guidance that goes through the module's call, hooks and all."""

    def forward_with_cfg(self, x, t, y, cfg_scale):
        half = x[: len(x) // 2]
        cond, uncond = self(torch.cat([half, half], dim=0), t, y).chunk(2, dim=0)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([guided, guided], dim=0)


def image(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(seed))


def call_dit(model: nn.Module, t: int, seed: int = 0) -> torch.Tensor:
    return model(image(seed), timestep=torch.tensor([t, t]), class_labels=LABELS).sample


def call_single(model: nn.Module, t: int, seed: int = 0) -> torch.Tensor:
    return model(
        image(seed),
        encoder_hidden_states=torch.ones(2, 3, 6),
        timestep=torch.tensor([t, t]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample


def call_research(model: nn.Module, t: int, seed: int = 0) -> torch.Tensor:
    return model(tokens(seed), torch.tensor([t, t]), LABELS)


def call_with_cfg(model: nn.Module, t: int, seed: int = 0) -> torch.Tensor:
    return model.forward_with_cfg(tokens(seed), torch.tensor([t, t]), y=LABELS, cfg_scale=4.0)


CASES = {
    "diffusers": (diffusers_dit, call_dit),
    "patched_zero": (lambda: patched("ada_norm_zero"), call_dit),
    "patched_single": (lambda: patched("ada_norm_single"), call_single),
    "research": (DiT, call_research),
    "research_cfg": (DiT, call_with_cfg),
    "research_cfg_call": (DiTThatCallsItself, call_with_cfg),
}


def made(make) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():  # adaLN-zero starts with every gate closed: open them
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(params=CASES)
def case(request):
    make, call = CASES[request.param]
    return made(make), call


def count_blocks(model: nn.Module) -> list[int]:
    """How often each block runs from here on, counted by hooks on the real blocks."""
    blocks = getattr(model, "transformer_blocks", None) or model.blocks
    counts = [0] * len(blocks)

    def counting(index):
        def hook(module, args):
            counts[index] += 1

        return hook

    for index in range(len(blocks)):
        blocks[index].register_forward_pre_hook(counting(index))
    return counts


@torch.no_grad()
def test_is_cached_as_scheduled(case):
    """Each model and entry point is cached: refreshes give the uncached output, reuse steps skip
    the span.
    """
    model, call = case
    plain = copy.deepcopy(model)
    counts = count_blocks(model)
    apply_skip_cache(model, **EVERY_THIRD)
    for index, t in enumerate(TIMES):
        before = list(counts)
        found, expected = call(model, t, index), call(plain, t, index)
        ran = [now - then for now, then in zip(counts, before, strict=True)]
        if PLAN[index] == "F":
            assert ran == [1] * LAYERS
            assert torch.equal(found, expected)
        else:
            assert ran == [1, 0, 0, 0, 1]
            assert not torch.equal(found, expected)
    stats = cache_stats(model)
    assert stats.plan == PLAN
    assert list(stats.streams) == ["0"]
    assert stats.layers_run == 2 * LAYERS + 4 * 2


@torch.no_grad()
@pytest.mark.parametrize("knows_times", [True, False])
def test_explicit_runs(case, knows_times):
    """skip_cache_run counts one step a call, whichever entry point the sampler uses."""
    model, call = case
    apply_skip_cache(model, **EVERY_THIRD)
    for _ in range(2):
        with skip_cache_run(model, timesteps=TIMES if knows_times else None):
            for t in TIMES:
                call(model, t)
        assert cache_stats(model).plan == PLAN


@torch.no_grad()
def test_window_reads_the_models_own_timestep(case):
    """The adapter says where the timestep is, so a window in normalised time holds in a
    bare loop.
    """
    model, call = case
    apply_skip_cache(model, schedule=IntervalSchedule(9, 0.7, 0.4), estimator="hold")
    for t in TIMES:
        call(model, t)
    assert cache_stats(model).plan == "FFrrrF"


@torch.no_grad()
def test_the_same_input_reused_gives_the_same_output(case):
    """A forced reuse of the very step that was stored gives the refresh's output, bit for bit."""
    model, call = case
    apply_skip_cache(model, **EVERY_THIRD)
    with skip_cache_run(model):
        refreshed, reused = call(model, 500), call(model, 500)
    assert cache_stats(model).plan == "Fr"
    assert torch.equal(refreshed, reused)


def attributes_of(model: nn.Module) -> dict[str, list]:
    return {name: [type(m), *m.__dict__] for name, m in model.named_modules()}


@torch.no_grad()
def test_remove_restores(case):
    """Taken off, the model has the classes, attributes, parameter names and output that it had."""
    model, call = case
    names, attributes, expected = list(model.state_dict()), attributes_of(model), call(model, 500)
    apply_skip_cache(model, **EVERY_THIRD)
    assert list(model.state_dict()) == names
    for t in TIMES:
        call(model, t)
    assert remove_skip_cache(model)
    assert "forward_with_cfg" not in model.__dict__
    assert attributes_of(model) == attributes
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert list(model.state_dict()) == names
    assert torch.equal(call(model, 500), expected)


@torch.no_grad()
def test_deepcopy_runs_its_own_weights(case):
    """A copy of a cached model computes with its own weights and counts its own steps, by every
    entry point.
    """
    model, call = case
    apply_skip_cache(model, **EVERY_THIRD)
    call(model, 900)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.add_(0.05)
    plain = copy.deepcopy(twin)
    assert remove_skip_cache(plain)
    assert is_skip_cached(twin)
    found = call(twin, 750)
    assert torch.equal(found, call(plain, 750))  # a refresh: the copy starts with nothing cached
    assert cache_stats(twin).plan == "F"
    assert cache_stats(model).plan == "F"
    before = call(model, 750)
    assert cache_stats(model).plan == "Fr"
    assert not torch.equal(before, found)
    assert remove_skip_cache(twin)
    assert is_skip_cached(model)
    assert torch.equal(call(twin, 750), found)


@torch.no_grad()
def test_both_entry_points_in_one_run():
    """A sampler that guides some steps only, changing the entry point and batch, never meets a
    stale feature.
    """
    model = made(DiT)
    plain = copy.deepcopy(model)
    apply_skip_cache(model, schedule=IntervalSchedule(99), estimator="hold")
    outputs = [call_with_cfg(model, 900), call_with_cfg(model, 750)]
    for t in (600, 450):
        outputs.append(model(tokens()[:1], torch.tensor([t]), LABELS[:1]))
    assert cache_stats(model).plan == "FrFr"
    assert torch.equal(outputs[2], plain(tokens()[:1], torch.tensor([600]), LABELS[:1]))


@torch.no_grad()
def test_a_diffusers_scheduler_drives_the_research_model():
    """A pipeline-like object around the research code is followed by its scheduler."""

    class Pipeline:
        def __init__(self) -> None:
            self.transformer, self.scheduler = made(DiT), DDIMScheduler()

    pipeline = apply_skip_cache(Pipeline(), **EVERY_THIRD)
    for _ in range(2):
        pipeline.scheduler.set_timesteps(6)
        for t in pipeline.scheduler.timesteps:
            noise = call_with_cfg(pipeline.transformer, t)
            pipeline.scheduler.step(noise, t, tokens())
        assert cache_stats(pipeline).plan == PLAN


@pytest.mark.parametrize("make", [DiT, DiTThatCallsItself])
def test_a_refused_call_does_not_end_caching(make):
    """Where the warning about gradients is an error, the calls after it are cached as ever."""
    model = made(make)
    apply_skip_cache(model, **EVERY_THIRD)
    with pytest.raises(NotCachingWarning, match="gradients are on"):
        call_with_cfg(model, 900)
    with torch.no_grad():
        for t in TIMES:
            call_with_cfg(model, t)
    assert cache_stats(model).plan == PLAN


@torch.no_grad()
@pytest.mark.parametrize("make", [DiT, DiTThatCallsItself])
def test_a_hook_of_somebody_else_that_raises(make):
    """A pre-hook that was there first and raises once leaves the count of calls right."""
    model = made(make)
    is_broken = [True]

    def picky(module, args):
        if is_broken:
            raise KeyError(is_broken.pop())

    model.register_forward_pre_hook(picky)
    apply_skip_cache(model, **EVERY_THIRD)
    with pytest.raises(KeyError):
        call_research(model, 950)
    for t in TIMES:
        call_with_cfg(model, t)
    stats = cache_stats(model)
    assert list(stats.streams) == ["0"]
    assert stats.plan == PLAN


@torch.no_grad()
def test_an_exception_inside_the_guided_method():
    """A block that fails inside forward_with_cfg ends the run, and the next call starts a
    new one.
    """
    model = made(DiT)
    plain = copy.deepcopy(model)
    apply_skip_cache(model, schedule=IntervalSchedule(99), estimator="hold")
    call_with_cfg(model, 900)
    with pytest.raises(TypeError):
        model.forward_with_cfg(tokens(), torch.tensor([750, 750]), None, 4.0)
    assert torch.equal(call_with_cfg(model, 750), call_with_cfg(plain, 750))
    assert cache_stats(model).plan == "F"


class Subclass(DiT):
    """Somebody's variant of the class."""


@pytest.mark.parametrize("make", [Subclass, lambda: type("Tuned", (DiTTransformer2DModel,), {})])
def test_subclasses_are_claimed(make):
    """A subclass is known by the name of the class that it derives from."""
    model = make()
    if isinstance(model, type):
        model = object.__new__(model)
        nn.Module.__init__(model)
    assert default_registry().backbone_of(model).name == "dit_xl"


def unet() -> nn.Module:
    return UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=2,
        layers_per_block=1,
    )


def impostor() -> nn.Module:
    """A class named DiT with blocks but without an embedder and a final layer."""
    model = type("DiT", (nn.Module,), {})()
    model.blocks = nn.ModuleList([nn.Linear(2, 2)])
    return model


def unpatched() -> nn.Module:
    """A Transformer2DModel of a UNet: its input is no patches."""
    return Transformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=8, norm_num_groups=2
    )


@pytest.mark.parametrize("make", [unet, lambda: nn.Linear(2, 2), impostor, unpatched])
def test_other_models_are_not_claimed(make):
    """A UNet, a linear layer, an unpatched transformer and a namesake are none of this adapter's
    models.
    """
    model = make()
    with pytest.raises(NoAdapterError, match="'dit_xl' does not claim"):
        default_registry().backbone_of(model, "dit_xl")


@pytest.mark.parametrize(
    ("make", "width"), [(diffusers_dit, 8), (lambda: patched("ada_norm_zero"), 8), (DiT, None)]
)
def test_what_the_adapter_says(make, width):
    """The description names the adapter, and the width where the model tells it."""
    backbone = default_registry().backbone_of(make())
    assert backbone.name == "dit_xl"
    assert backbone.hidden_size == width
