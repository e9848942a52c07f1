"""Skip branches: the module against its formula, and the retrofit on every transformer."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
import torch._dynamo
from diffusers import DDIMScheduler
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from pipelines import (
    ALWAYS_OPEN,
    LAYERS,
    STEPS,
    apply_to,
    backbone_of,
    block_lists,
    build,
    flux_call,
    reference,
    sample,
    surroundings,
    tiny_vae,
    transformer_of,
)
from skipcache import (
    Backbone,
    BlockList,
    Hold,
    SkipBranch,
    SkipBranches,
    Taylor,
    add_skip_branches,
    apply_skip_cache,
    cache_stats,
    freeze_backbone,
    is_skip_cached,
    remove_skip_branches,
    remove_skip_cache,
    skip_cache_run,
)
from skipcache.errors import BranchError, ConfigError, NotCachingWarning, TargetError
from skipcache.latte_class import LatteClassPipeline, LatteClassTransformer3DModel
from skipcache.runtime.conductor import conductor_of
from skipcache.runtime.controller import controller_of

CPU = torch.device("cpu")
WIDTH = 16
MODELS = ("dit", "latte", "latte_class", "pixart", "flux")
RETROFITTED = ("dit", "latte", "pixart")  # of the pipelines; HunyuanDiT has skips of its own


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def opened(module: nn.Module, scale: float = 0.2) -> Any:
    """The module with weights that all matter: new branches are zero, new norms one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def model_of(kind: str, layers: int = LAYERS) -> Any:
    if kind != "latte_class":
        return transformer_of(kind, layers)
    torch.manual_seed(0)
    return LatteClassTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        video_length=3,
        num_classes=5,
    ).eval()


def spoken_of(kind: str, layers: int = LAYERS) -> Backbone | None:
    """What to pass as adapter; None where the installed one claims the model."""
    if kind in ("dit", "latte", "latte_class"):
        return None
    return dataclasses.replace(backbone_of(kind, layers), hidden_size=WIDTH)


def retrofit(model: Any, kind: str, branches: SkipBranches | None = None, **options: Any) -> Any:
    layers = LAYERS if not isinstance(branches, SkipBranches) else branches.depth
    return add_skip_branches(model, branches, adapter=spoken_of(kind, layers), **options)


def predict(model: Any, kind: str, time: float, seed: int = 0) -> torch.Tensor:
    """One call of the bare transformer, of two samples where it takes a batch; time 1 = noise."""
    kept = next(p.dtype for p in block_lists(model)[0].parameters())
    t = torch.full((2,), 1000 * time)
    if kind == "flux":
        inputs = flux_call(seed, batch=2, time=time)
        inputs = {k: v.to(kept) if v is not False else v for k, v in inputs.items()}
        return model(**inputs)[0]
    frames = {"latte": (2,), "latte_class": (3,)}.get(kind, ())
    x = draw(2, 4, *frames, 8, 8, seed=seed).to(kept)
    if kind in ("dit", "latte_class"):
        return model(x, t, torch.tensor([1, 3]), return_dict=False)[0]
    options = {"encoder_hidden_states": draw(2, 5, 12, seed=seed + 1).to(kept)}
    if kind == "pixart":
        options["added_cond_kwargs"] = {}
    return model(x, timestep=t, return_dict=False, **options)[0]


def trajectory(model: Any, kind: str, is_cached: bool = False) -> torch.Tensor:
    """The outputs of some steps, each with an input of its own; cached where that is applied."""
    times = [1.0 - step / STEPS for step in range(STEPS)]
    run = skip_cache_run(model) if is_cached else contextlib.nullcontext()
    with torch.no_grad(), run:
        return torch.stack([predict(model, kind, t, seed) for seed, t in enumerate(times)])


def apply(model: Any, kind: str, **options: Any) -> Any:
    options = {"interval": 3, "window": ALWAYS_OPEN, "estimator": "hold", **options}
    return apply_skip_cache(model, adapter=spoken_of(kind), **options)


# The module.


def merge(branch: SkipBranch, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """The branch written out, with nothing but its weights."""
    both = torch.cat([x, skip], dim=-1).float()
    mean = both.mean(dim=-1, keepdim=True)
    variance = ((both - mean) ** 2).mean(dim=-1, keepdim=True)
    normed = (both - mean) / torch.sqrt(variance + 1e-6)
    normed = normed * branch.skip_norm.weight.float() + branch.skip_norm.bias.float()
    if branch.skip_down is not None:
        normed = normed @ branch.skip_down.weight.float().T
    merged = normed @ branch.skip_linear.weight.float().T + branch.skip_linear.bias.float()
    return x + merged if branch.form == "residual" else merged


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("form", ["replace", "residual"])
def test_branch_is_its_formula(form, rank):
    """LayerNorm and Linear over the concatenation, added or not, whatever the rank."""
    branch = opened(SkipBranch(8, form=form, rank=rank))
    x, skip = 3 * draw(2, 5, 8), draw(2, 5, 8, seed=1) + 2
    torch.testing.assert_close(branch(x, skip), merge(branch, x, skip))
    assert not torch.allclose(branch(x, skip), branch(skip, x), atol=1e-3)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_autocast", [False, True])
def test_new_residual_branch_changes_no_bit(dtype, rank, has_autocast):
    """Zero-initialised, it gives its input back in its own dtype, with autocast or without."""
    branch = SkipBranch(8, rank=rank).to(torch.float32 if has_autocast else dtype)
    x, skip = draw(2, 5, 8).to(dtype), 100 * draw(2, 5, 8, seed=1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=has_autocast):
        result = branch(x, skip)
    assert result.dtype == dtype
    assert torch.equal(result, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_autocast", [False, True])
def test_norm_stays_in_fp32(dtype, has_autocast):
    """A small signal on a large mean survives, in half precision and under autocast: the norm is
    computed in fp32, and handed to the Linear in its dtype.
    """
    branch = opened(SkipBranch(8, form="replace"))
    if not has_autocast:
        branch = branch.to(dtype)
    x = (1000 + draw(2, 5, 8)).to(torch.float32 if has_autocast else dtype)
    normed: list[torch.Tensor] = []
    branch.skip_norm.register_forward_hook(lambda module, args, output: normed.append(output))
    with torch.autocast("cpu", dtype, enabled=has_autocast):
        result = branch(x, x.flip(-1))
    both = torch.cat([x, x.flip(-1)], dim=-1).float()
    norm = branch.skip_norm
    expected = nn.functional.layer_norm(both, (16,), norm.weight.float(), norm.bias.float(), 1e-6)
    assert normed[0].dtype == torch.float32
    assert torch.equal(normed[0], expected)
    assert result.dtype == x.dtype
    torch.testing.assert_close(result.float(), merge(branch, x, x.flip(-1)), atol=0.05, rtol=0.05)


def test_weights_of_another_dtype_than_the_stream():
    """Branches in fp32 serve a half-precision stream, and the other way round."""
    for weights, stream in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        branch = opened(SkipBranch(8, form="replace")).to(weights)
        x, skip = draw(2, 5, 8).to(stream), draw(2, 5, 8, seed=1).to(stream)
        assert branch(x, skip).dtype == stream
        torch.testing.assert_close(
            branch(x, skip).float(), merge(branch, x.float(), skip.float()), atol=0.05, rtol=0.05
        )


def test_weights_stored_in_fp8():
    """Layerwise casting keeps the Linears in fp8 between calls, and the output near the unstored
    one.
    """
    model = transformer_of("dit")
    opened(add_skip_branches(model, form="replace", rank=4).skip_branches)
    expected = trajectory(model, "dit")
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    branch = model.skip_branches.by_target()[3]
    assert branch.skip_linear.weight.dtype == branch.skip_down.weight.dtype == torch.float8_e4m3fn
    error = (trajectory(model, "dit") - expected).norm() / expected.norm()
    assert 0 < error < 0.5


@pytest.mark.parametrize(
    ("depth", "pairs"),
    [
        (2, ((0, 1),)),
        (3, ((0, 2),)),
        (6, ((2, 3), (1, 4), (0, 5))),
        (7, ((2, 4), (1, 5), (0, 6))),
    ],
)
def test_pairs_of_odd_and_even_depth(depth, pairs):
    """Layer i meets layer L - 1 - i; the middle one of an odd depth meets nobody."""
    branches = SkipBranches(4, depth)
    assert branches.pairs == pairs
    assert set(branches.by_target()) == {target for _, target in pairs}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"dim": True}, "dim is True"),
        ({"depth": 1}, "depth is 1"),
        ({"depth": 6.0}, "depth is 6.0"),
        ({"form": "Replace"}, "'replace', 'residual'"),
        ({"rank": 0}, "rank is 0"),
        ({"tensor": 1}, "tensor is 1"),
        ({"pairs": []}, "At least one"),
        ({"pairs": [(0, 6)]}, "0 to 5"),
        ({"pairs": [(-1, 3)]}, "0 to 5"),
        ({"pairs": [(3, 3)]}, "to a later one"),
        ({"pairs": [(0, 4), (1, 4)]}, "at most"),
        ({"pairs": [(0.5, 4)]}, "source, target"),
        ({"pairs": [(float("inf"), 4)]}, "source, target"),
        ({"pairs": ["04"]}, "source, target"),
        ({"pairs": 4}, "source, target"),
    ],
)
def test_branches_that_cannot_be(options, says):
    """Every impossible width, depth, form, rank, tensor or pair is named, with what is allowed."""
    with pytest.raises(BranchError, match=says):
        SkipBranches(**{"dim": 4, "depth": 6, **options})


def test_streams_of_different_tokens():
    """A skip with other tokens than the stream is refused with both shapes."""
    with pytest.raises(BranchError, match=r"\(1, 4, 8\).*\(1, 5, 8\)"):
        SkipBranch(8)(draw(1, 4, 8), draw(1, 5, 8))


def test_leaf_names_are_no_targets_of_lora():
    """The usual targets of LoRA, matched by suffix as peft does, hit no module of a branch."""
    targets = ("to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2", "proj", "linear")
    branches = SkipBranches(WIDTH, LAYERS, rank=2)
    names = [f"skip_branches.{name}" for name, _ in branches.named_modules() if name]
    assert any(name.endswith("skip_linear") for name in names)
    hit = [n for n in names for t in targets if n == t or n.endswith(f".{t}")]
    assert not hit


def test_whether_branches_do_anything():
    """New residual branches do nothing; the paper's form does, and so does one trained weight."""
    branches = SkipBranches(4, 6, rank=2)
    assert not branches.changes_output
    assert SkipBranches(4, 6, form="replace").changes_output
    nn.init.ones_(branches.by_target()[4].skip_linear.bias)
    assert branches.changes_output


# Zero-initialised branches on real models.


@contextlib.contextmanager
def as_is(model: nn.Module) -> Iterator[None]:
    yield


@contextlib.contextmanager
def in_bf16(model: nn.Module) -> Iterator[None]:
    for parameter in model.parameters():  # as .to does, less the warning of diffusers
        parameter.data = parameter.data.to(torch.bfloat16)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(torch.bfloat16) if buffer is not None else None
    yield


@contextlib.contextmanager
def under_autocast(model: nn.Module) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # Flux's own
@pytest.mark.parametrize("is_cached", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("precision", [as_is, in_bf16, under_autocast], ids=lambda p: p.__name__)
@pytest.mark.parametrize("kind", MODELS)
def test_new_residual_branches_change_no_bit(kind, precision, is_cached):
    """On every transformer, in fp32, bf16 and under autocast, cached or not: the base model's
    output.
    """
    outputs = []
    for has_branches in (False, True):
        model = model_of(kind)
        with precision(model):
            if has_branches:
                retrofit(model, kind)
            if is_cached:
                apply(model, kind)
            outputs.append(trajectory(model, kind, is_cached))
        if is_cached:
            assert cache_stats(model).plan == "FrrFrr"
    assert torch.isfinite(outputs[0]).all()
    assert torch.equal(*outputs)


@pytest.mark.parametrize("tensor", ["hidden_states", "encoder_hidden_states"])
def test_branches_on_a_named_tensor(tensor):
    """Flux has two lists of two tensors: the branches act on the one that they name."""
    model = model_of("flux")
    plain = trajectory(model, "flux")
    branches = SkipBranches(WIDTH, LAYERS, tensor=tensor, form="residual")
    retrofit(model, "flux", branches)
    assert torch.equal(trajectory(model, "flux"), plain)
    opened(branches)
    seen: list[torch.Tensor] = []
    branches.by_target()[4].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    assert not torch.allclose(trajectory(model, "flux"), plain, atol=1e-3)
    tokens = {"hidden_states": 6, "encoder_hidden_states": 3}[tensor]
    assert {tuple(x.shape) for x in seen} == {(2, tokens, WIDTH)}


@pytest.mark.parametrize("is_cached", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("kind", RETROFITTED)
def test_new_residual_branches_in_a_pipeline(kind, is_cached):
    """Pipelines sample the very same latents with new branches, cached or not."""
    pipe = retrofit(build(kind), kind)
    if is_cached:
        apply_to(pipe)
    expected = reference(kind, estimator="hold" if is_cached else None)
    assert torch.equal(sample(pipe), expected)
    assert remove_skip_branches(pipe)
    assert torch.equal(sample(pipe), expected)


def test_new_residual_branches_in_the_class_conditional_latte():
    """Likewise the pipeline of class-to-video Latte; opened branches are seen in its latents."""
    pipe = LatteClassPipeline(
        model_of("latte_class"), tiny_vae(2), DDIMScheduler(clip_sample=False)
    )
    pipe.set_progress_bar_config(disable=True)

    def latents():
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 3, "output_type": "latent", "return_dict": False}
        return pipe(class_labels=[1], generator=generator, **options)[0]

    expected = latents()
    add_skip_branches(pipe)
    assert torch.equal(latents(), expected)
    opened(pipe.transformer.skip_branches)
    assert not torch.allclose(latents(), expected, atol=1e-3)


def test_a_model_with_skips_of_its_own_is_refused():
    """HunyuanDiT is refused, with the reason, and left as it was."""
    pipe = build("hunyuan_dit")
    before = surroundings(pipe)
    with pytest.raises(BranchError, match="2 skip branches of its own"):
        add_skip_branches(pipe)
    assert surroundings(pipe) == before


# Against a slow walk.


class Walk:
    """The branches of a model, hooked onto its blocks by hand; reuses as the paper's rule does.

    Every block runs at every step. At a reuse, what enters the last layer is overwritten with what
    entered it at the last refresh.
    """

    def __init__(self, model: Any, branches: SkipBranches, takes: tuple[str, ...]) -> None:
        self.branches = branches
        self.name = branches.tensor or takes[0]
        self.takes, self.is_reuse = takes, False
        self.outputs: dict[int, torch.Tensor] = {}
        self.stored: list[torch.Tensor] = []
        lists = block_lists(model)
        layers = list(lists[0]) if hasattr(model, "temporal_transformer_blocks") else None
        for number, block in enumerate(layers or [block for each in lists for block in each]):
            block.register_forward_pre_hook(self.entering(number), with_kwargs=True)

    def entering(self, number: int) -> Callable:
        def hook(block, args, kwargs):
            flow = dict(zip(self.takes, args[: len(self.takes)], strict=False))
            flow |= {name: kwargs[name] for name in self.takes if name in kwargs}
            self.outputs[number - 1] = flow[self.name]
            if number == self.branches.depth - 1:
                if self.is_reuse:
                    flow = dict(zip(self.takes, self.stored, strict=True))
                else:
                    self.stored = [flow[name] for name in self.takes]
            for source, target in self.branches.pairs:
                if target == number:
                    branch = self.branches.by_target()[target]
                    flow[self.name] = merge(branch, flow[self.name], self.outputs[source])
            positional = [
                flow[name] if name not in kwargs else value
                for name, value in zip(self.takes, args, strict=False)
            ]
            args = (*positional, *args[len(positional) :])
            return args, kwargs | {name: flow[name] for name in self.takes if name in kwargs}

        return hook


@pytest.mark.parametrize("is_cached", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize(
    ("form", "rank", "pairs"),
    [("replace", None, None), ("residual", 3, None), ("residual", None, [(0, 5), (0, 3), (2, 4)])],
    ids=["replace", "residual-rank", "own-pairs"],
)
@pytest.mark.parametrize(
    ("kind", "tensor"),
    [*((kind, None) for kind in MODELS), ("flux", "encoder_hidden_states")],
)
def test_equals_a_walk_by_hand(kind, tensor, form, rank, pairs, is_cached):
    """With opened branches every model computes what hooks written by hand do; cached with one
    layer at either end, it is the stored feature that meets the skip of this step.
    """
    takes = ("hidden_states", "encoder_hidden_states") if kind == "flux" else ("hidden_states",)
    branches = SkipBranches(WIDTH, LAYERS, pairs, form=form, rank=rank, tensor=tensor)
    opened(branches)
    model = model_of(kind)
    retrofit(model, kind, branches)
    if is_cached:
        apply(model, kind, front_layers=1, back_layers=1)
    found = trajectory(model, kind, is_cached)

    plain = model_of(kind)
    bare = trajectory(plain, kind)
    walk = Walk(plain, branches, takes)
    expected = []
    with torch.no_grad():
        for step in range(STEPS):
            walk.is_reuse = is_cached and step % 3 > 0
            expected.append(predict(plain, kind, 1.0 - step / STEPS, step))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, bare, atol=1e-2)


def test_a_skip_is_let_go_of():
    """After a forward, a failed one too, no skip is kept; and the next one is as if nothing was."""
    model = opened_model()
    expected = trajectory(model, "dit")
    held = conductor_of(model).bound.branches.skips.held

    def fail(block, args):
        assert held
        raise RuntimeError("stop")

    handle = model.transformer_blocks[4].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        trajectory(model, "dit")
    handle.remove()
    assert not held
    assert list(model.transformer_blocks) == list(model.transformer_blocks._modules.values())
    assert torch.equal(trajectory(model, "dit"), expected)
    assert not held


def opened_model(kind: str = "dit", layers: int = LAYERS, **options: Any) -> Any:
    model = model_of(kind, layers)
    retrofit(model, kind, SkipBranches(WIDTH, layers, **options))
    opened(model.skip_branches)
    return model


class Leaving(nn.Module):
    """A model that can leave a block out, or run one again."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Doubling() for _ in range(4))
        self.order = (0, 1, 2, 3)

    def forward(self, x, timestep):
        blocks = list(self.blocks)
        for i in self.order:
            x = blocks[i](x)
        return x


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear(x)


class InPlace(Doubling):
    def forward(self, x):
        return x.add_(self.linear(x))


@torch.no_grad()
def test_blocks_that_work_in_place():
    """A skip is what its layer put out, also where the next blocks overwrite it."""
    backbone = Backbone("leaving", (BlockList("blocks", ("x",), "x"),))
    outputs = []
    for kind in (Doubling, InPlace):
        torch.manual_seed(0)
        model = Leaving()
        for block in model.blocks:
            block.__class__ = kind
        opened(add_skip_branches(model, SkipBranches(4, 4, form="replace"), adapter=backbone))
        outputs.append(model(draw(1, 3, 4), 1.0))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("order", [(0, 2, 3), (0, 1, 2, 3, 3)])
@torch.no_grad()
def test_a_block_left_out_or_run_again(order):
    """A branch whose skip never came, or is gone, says so."""
    model = Leaving()
    backbone = Backbone("leaving", (BlockList("blocks", ("x",), "x"),))
    opened(add_skip_branches(model, SkipBranches(4, 4, form="replace"), adapter=backbone))
    model(draw(1, 3, 4), 1.0)
    model.order = order
    with pytest.raises(BranchError, match="no output of layer"):
        model(draw(1, 3, 4), 1.0)


# Attaching and taking off.


@pytest.mark.parametrize("kind", RETROFITTED)
def test_remove_restores_the_object_graph(kind):
    """Taken off, the pipeline has the same attributes, classes, state dict, hooks and output."""
    pipe = build(kind)
    sample(pipe, 1)
    before = surroundings(pipe)
    for form in ("replace", "residual"):
        retrofit(pipe, kind, form=form)
        sample(pipe, 1)
        assert remove_skip_branches(pipe)
        assert not remove_skip_branches(pipe)
        assert surroundings(pipe) == before
    assert torch.equal(sample(pipe), reference(kind, estimator=None))


@pytest.mark.parametrize("adds_first", [True, False])
@pytest.mark.parametrize("takes_off_first", ["branches", "cache"])
@pytest.mark.parametrize("kind", ["dit", "latte"])
def test_cache_and_branches_in_any_order(kind, adds_first, takes_off_first):
    """Applied in either order they give one output, and taken off in either order what is left."""
    branches = opened(SkipBranches(WIDTH, LAYERS, form="replace"))
    retrofitted = retrofit(build(kind), kind, copy.deepcopy(branches))
    uncached = sample(retrofitted)
    both = sample(apply_to(retrofitted))

    pipe = build(kind)
    sample(pipe, 1)
    before = surroundings(pipe)
    steps = [lambda: retrofit(pipe, kind, branches), lambda: apply_to(pipe)]
    for step in steps if adds_first else reversed(steps):
        step()
        sample(pipe, 2)
    assert torch.equal(sample(pipe), both)
    assert cache_stats(pipe).plan == "FrrFrr"
    if takes_off_first == "branches":
        assert remove_skip_branches(pipe)
        assert torch.equal(sample(pipe), reference(kind))
        assert remove_skip_cache(pipe)
    else:
        assert remove_skip_cache(pipe)
        assert torch.equal(sample(pipe), uncached)
        assert remove_skip_branches(pipe)
    assert surroundings(pipe) == before
    assert torch.equal(sample(pipe), reference(kind, estimator=None))


def test_branches_are_a_submodule():
    """``parameters``, ``state_dict`` and ``.to`` of the transformer see them; ``train`` too."""
    model = opened_model(rank=3)
    branches = model.skip_branches
    own = {f"skip_branches.{name}" for name in branches.state_dict()}
    assert own <= model.state_dict().keys()
    assert {id(p) for p in branches.parameters()} <= {id(p) for p in model.parameters()}
    assert not branches.training
    model.train()
    assert branches.by_target()[3].training
    model.double()
    assert {p.dtype for p in branches.parameters()} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_branches_take_on_the_dtype_of_the_model(dtype):
    """Attached to a model in half precision, they are in it too, and in its mode."""
    model = model_of("dit").train()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    add_skip_branches(model, SkipBranches(WIDTH, LAYERS).eval())
    assert {p.dtype for p in model.skip_branches.parameters()} == {dtype}
    assert model.skip_branches.training


def own_attribute(model):
    model.skip_branches = nn.Identity()


@pytest.mark.parametrize(
    ("change", "options", "error", "says"),
    [
        (None, {"branches": SkipBranches(WIDTH, 4)}, BranchError, "for 4 layers.*has 6"),
        (None, {"branches": SkipBranches(8, LAYERS)}, BranchError, "width 8.*width 16"),
        (
            None,
            {"branches": SkipBranches(WIDTH, LAYERS, tensor="context")},
            BranchError,
            "'context'.*'hidden_states'",
        ),
        (None, {"branches": SkipBranches(WIDTH, LAYERS), "rank": 2}, BranchError, "new branches"),
        (
            None,
            {"branches": SkipBranches(WIDTH, LAYERS), "form": "replace"},
            BranchError,
            "new branches",
        ),
        (None, {"branches": nn.Linear(1, 1)}, BranchError, "Pass SkipBranches"),
        (None, {"form": "sum"}, BranchError, "Allowed: 'replace', 'residual'"),
        (None, {"rank": -1}, BranchError, "rank is -1"),
        (None, {"adapter": backbone_of("dit")}, BranchError, "does not say the width"),
        (own_attribute, {}, BranchError, "attribute 'skip_branches' of its own"),
        (add_skip_branches, {}, BranchError, "remove_skip_branches first"),
        (
            lambda model: apply(model, "dit", front_layers=1, back_layers=2),
            {},
            ConfigError,
            "back_layers no larger than front_layers",
        ),
    ],
)
def test_all_or_nothing(change, options, error, says):
    """Whatever cannot be is said, and model, cache and earlier branches stay as they were."""
    pipe = build("dit")
    if change is not None:
        change(pipe.transformer)
    expected, before = sample(pipe), surroundings(pipe)
    with pytest.raises(error, match=says):
        add_skip_branches(pipe, **options)
    assert surroundings(pipe) == before
    assert torch.equal(sample(pipe), expected)


class TwoStage:
    def __init__(self, *models: Any) -> None:
        self.transformer, self.transformer_2 = models
        self.components = {"transformer": models[0], "transformer_2": models[1]}


def test_two_transformers_are_all_or_nothing():
    """Both get branches, or neither; ready ones belong to one."""
    first, second = model_of("dit"), model_of("dit")
    add_skip_branches(second)
    with pytest.raises(BranchError, match="already"):
        add_skip_branches(TwoStage(first, second))
    assert not hasattr(first, "skip_branches")
    assert remove_skip_branches(second)
    with pytest.raises(BranchError, match="2 transformers"):
        add_skip_branches(TwoStage(first, second), SkipBranches(WIDTH, LAYERS))
    add_skip_branches(TwoStage(first, second))
    assert first.skip_branches is not second.skip_branches
    assert remove_skip_branches(TwoStage(first, second))
    assert not hasattr(second, "skip_branches")


def test_nothing_to_retrofit():
    """A target without a transformer is refused by both."""
    for function in (add_skip_branches, remove_skip_branches, freeze_backbone):
        with pytest.raises(TargetError, match="transformer"):
            function(object())


@pytest.mark.parametrize(("do", "expected"), [(lambda b: b, Taylor), (opened, Hold)])
def test_estimator_of_working_branches(do, expected):
    """Branches that do something make ``hold``, the paper's, the default; new ones do not."""
    model = add_skip_branches(model_of("dit"), do(SkipBranches(WIDTH, LAYERS)))
    apply_skip_cache(model, interval=2, window=ALWAYS_OPEN)
    assert type(controller_of(model).estimator) is expected


# Copies.


def by_pickle(target):
    return pickle.loads(pickle.dumps(target))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
@pytest.mark.parametrize(
    ("kind", "is_cached"), [("dit", False), ("dit", True), ("latte", True), ("flux", True)]
)
def test_copies_run_their_own_weights(kind, duplicate, is_cached):
    """Of a copy and its original each runs its own branches and blocks, and is taken off alone."""
    model = opened_model(kind)
    if is_cached:
        apply(model, kind)
    expected = trajectory(model, kind, is_cached)
    twin = duplicate(model)
    assert torch.equal(trajectory(twin, kind, is_cached), expected)
    opened(twin.skip_branches)
    changed = trajectory(twin, kind, is_cached)
    assert not torch.allclose(changed, expected, atol=1e-3)
    assert torch.equal(trajectory(model, kind, is_cached), expected)
    assert remove_skip_branches(model)
    assert torch.equal(trajectory(twin, kind, is_cached), changed)
    assert remove_skip_branches(twin)
    assert torch.equal(trajectory(twin, kind, is_cached), trajectory(model, kind, is_cached))


# Saving the model.


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("kind", RETROFITTED)
def test_saved_transformer_is_the_base_model(kind, tmp_path):
    """``save_pretrained`` writes the bytes of the bare model, with branches and a cache on it or
    off again, and the branches go on working.
    """
    pipe = build(kind)
    model = pipe.transformer
    model.save_pretrained(tmp_path / "bare")
    opened(retrofit(model, kind).skip_branches)
    expected = sample(pipe)
    model.save_pretrained(tmp_path / "retrofitted")
    assert torch.equal(sample(pipe), expected)
    apply_to(pipe)
    sample(pipe)
    model.save_pretrained(tmp_path / "cached", safe_serialization=True)
    remove_skip_branches(pipe)
    model.save_pretrained(tmp_path / "removed")
    bare = files_of(tmp_path / "bare")
    assert len(bare) == 2
    for state in ("retrofitted", "cached", "removed"):
        assert files_of(tmp_path / state) == bare, state


def test_saved_pipeline_is_the_base_model(tmp_path):
    """A whole pipeline with branches saves the files of the one without."""
    for state in ("bare", "retrofitted"):
        pipe = build("dit", scheduler=DDIMScheduler(clip_sample=False))
        if state == "retrofitted":
            opened(add_skip_branches(pipe).transformer.skip_branches)
        pipe.save_pretrained(tmp_path / state)
    assert files_of(tmp_path / "retrofitted") == files_of(tmp_path / "bare")


def test_saving_that_fails_puts_the_branches_back(tmp_path):
    """After a save that raised, the branches are where they were, in the same order."""
    model = opened_model()
    model.add_module("head", nn.Linear(2, 2))
    names, expected = list(model.state_dict()), trajectory(model, "dit")
    with pytest.raises(TypeError):
        model.save_pretrained(tmp_path, no_such_option=object(), max_shard_size=object())
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert list(model.state_dict()) == names
    assert torch.equal(trajectory(model, "dit"), expected)


# Offloading.


def offload_pipeline(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_submodules(pipe):
    accelerate.cpu_offload(pipe.transformer, execution_device=CPU)


def offload_groups(pipe):
    pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1
    )


def offload_leaves(pipe):
    pipe.transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="leaf_level"
    )


@pytest.mark.parametrize("adds_first", [True, False])
@pytest.mark.parametrize(
    ("kind", "offload"),
    [
        ("latte", offload_pipeline),
        ("dit", offload_submodules),
        ("pixart", offload_groups),
        ("pixart", offload_leaves),
    ],
)
def test_offloading(kind, offload, adds_first):
    """Offloaded before or after, pipelines sample what they sample without, run after run."""
    expected = sample(retrofit(build(kind), kind, opened(SkipBranches(WIDTH, LAYERS))), 3)
    assert not torch.equal(expected, reference(kind, 3, estimator=None))
    pipe = build(kind)
    steps = [
        lambda: retrofit(pipe, kind, opened(SkipBranches(WIDTH, LAYERS))),
        lambda: offload(pipe),
    ]
    for step in steps if adds_first else reversed(steps):
        step()
    for _ in range(2):
        assert torch.equal(sample(pipe, 3), expected)
    remove_skip_branches(pipe)
    assert torch.equal(sample(pipe, 3), reference(kind, 3, estimator=None))


# Training.


def gradients(model: Any, kind: str, forwards: int = 1) -> dict[str, torch.Tensor]:
    """Of every parameter that has one, after one backward through the given number of forwards."""
    model.zero_grad()
    torch.manual_seed(0)  # labels are dropped at random
    losses = [predict(model, kind, 0.5, seed).square().mean() for seed in range(forwards)]
    sum(losses).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("has_checkpointing", [False, True])
def test_only_branches_train(has_checkpointing):
    """With the backbone frozen an optimiser step changes every branch and nothing else."""
    model = freeze_backbone(opened_model(rank=4)).train()
    if has_checkpointing:
        model.enable_gradient_checkpointing()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    predict(model, "dit", 0.5).square().mean().backward()
    optimiser.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.startswith("skip_branches.")}


def test_freezing_needs_branches():
    """A model without branches is not frozen by accident."""
    model = model_of("dit")
    with pytest.raises(BranchError, match="add_skip_branches"):
        freeze_backbone(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("form", ["replace", "residual"])
def test_training_from_new_branches_lowers_the_loss(form):
    """New branches alone learn to bring the output nearer to a target."""
    torch.manual_seed(0)
    model = freeze_backbone(retrofit(model_of("dit", 4), "dit", SkipBranches(WIDTH, 4, form=form)))
    target = predict(transformer_of("dit", 4, seed=1), "dit", 0.5).detach()
    optimiser = torch.optim.Adam(model.skip_branches.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = (predict(model, "dit", 0.5) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing(kind, forwards):
    """Blocks run again for their gradients meet the skips of their own forward: the gradients of
    the plain backward, also of two forwards with one backward.
    """
    model = opened_model(kind, form="replace").train()
    expected = gradients(model, kind, forwards)
    assert all(expected[n].any() for n in expected if n.startswith("skip_branches."))
    runs: list[int] = []
    model.skip_branches.by_target()[4].register_forward_hook(lambda *_: runs.append(1))
    model.enable_gradient_checkpointing()
    found = gradients(model, kind, forwards)
    assert len(runs) == 2 * forwards
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


@pytest.mark.parametrize("has_checkpointing", [False, True])
def test_training_with_a_cache_applied(has_checkpointing):
    """With gradients on nothing is cached, and branches train as without."""
    model = opened_model().train()
    expected = gradients(model, "dit")
    if has_checkpointing:
        model.enable_gradient_checkpointing()
    apply(model, "dit")
    with pytest.warns(NotCachingWarning, match="gradients are on"):
        found = gradients(model, "dit")
    torch.testing.assert_close(found, expected)


# Compiling.


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def compile_in_place(model, counter):
    model.compile(backend=counter)


def compile_blocks(model, counter):
    for block_list in block_lists(model):
        for block in block_list:
            block.compile(backend=counter, fullgraph=True)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
@pytest.mark.parametrize(
    ("compile_", "has_checkpointing", "graphs"),
    [
        (compile_in_place, False, 1),
        (compile_in_place, True, 4),
        (compile_blocks, False, 2),
        (compile_blocks, True, 2),
    ],
)
def test_training_compiled(compile_, has_checkpointing, graphs, counter):
    """Compiled as a whole or by blocks, with checkpointing or without: the eager gradients, from
    few graphs, and none more in later steps.
    """
    model = opened_model(layers=4, form="replace").train()  # with 3 a graph of the skip is right
    expected = gradients(model, "dit")
    if has_checkpointing:
        model.enable_gradient_checkpointing()
    compile_(model, counter)
    for _ in range(2):
        found = gradients(model, "dit")
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], msg=name)
        assert 1 <= counter.frame_count <= graphs
        graphs = counter.frame_count


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo
def test_training_with_repeated_blocks_compiled(counter):
    """Flux by ``compile_repeated_blocks`` with ``fullgraph``: the eager gradients."""
    model = opened_model("flux", 2).train()
    expected = gradients(model, "flux")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    found = gradients(model, "flux")
    assert counter.frame_count >= 2
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)
    before = counter.frame_count
    gradients(model, "flux")
    assert counter.frame_count == before


@pytest.mark.parametrize(
    ("compile_", "is_cached"),
    [(compile_in_place, False), (compile_in_place, True), (compile_blocks, True)],
)
def test_sampling_compiled(compile_, is_cached, counter):
    """Compiled as a whole or by blocks, sampling with branches gives the eager output, from few
    graphs, and none more in a second run.
    """
    model = opened_model(layers=3)
    if is_cached:
        apply(model, "dit")
    expected = trajectory(model, "dit", is_cached)
    compile_(model, counter)
    torch.testing.assert_close(trajectory(model, "dit", is_cached), expected)
    assert 1 <= counter.frame_count <= 3
    before = counter.frame_count
    torch.testing.assert_close(trajectory(model, "dit", is_cached), expected)
    assert counter.frame_count == before
    assert is_skip_cached(model) == is_cached


class Checkpointing(Leaving):
    """One that checkpoints its blocks, and does not say so."""

    def forward(self, x, timestep):
        for block in self.blocks:
            x = checkpoint(block.__call__, x, use_reentrant=False)
        return x


def test_checkpointing_that_a_compiled_model_keeps_quiet_about(counter):
    """Compiled as a whole, a model whose checkpointing cannot be known of is stopped, and never
    gets wrong gradients; in eager form it trains.
    """
    model = Checkpointing()
    backbone = Backbone("checkpointing", (BlockList("blocks", ("x",), "x"),))
    opened(add_skip_branches(model, SkipBranches(4, 4, form="replace"), adapter=backbone))
    model(draw(1, 3, 4), 1.0).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(BranchError, match="compile its blocks"):
        torch.compile(model, backend=counter)(draw(1, 3, 4), 1.0).sum().backward()


def test_a_model_compiled_as_a_whole_is_unwrapped(counter):
    """Branches are put on what ``torch.compile`` wraps, and come off it again."""
    model = model_of("dit", 3)
    compiled = torch.compile(model, backend=counter)
    plain, expected = predict(model, "dit", 0.5), predict(opened_model(layers=3), "dit", 0.5)
    add_skip_branches(compiled, opened(SkipBranches(WIDTH, 3)))
    assert "skip_branches" in dict(model.named_children())
    with torch.no_grad():
        torch.testing.assert_close(predict(compiled, "dit", 0.5), expected)
    assert counter.frame_count == 1
    assert remove_skip_branches(compiled)
    assert torch.equal(predict(model, "dit", 0.5), plain)
