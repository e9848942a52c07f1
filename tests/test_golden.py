"""Runs of the reference implementation of arXiv:2411.17616, where its outputs are at hand: all four
tasks, each uncached without its skip branches, with them, and with Skip-Cache.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanDiT2DModel
from safetensors import safe_open
from torch import nn

from research_code import DiT, Latte
from skipcache import (
    IntervalSchedule,
    SkipBranches,
    add_skip_branches,
    apply_skip_cache,
    cache_stats,
    convert_skip_dit,
    load_skip_dit,
    skip_cache_run,
)

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
TOLERANCE = 1e-4
CONVERTED = ("c2i", "t2v", "c2v")
BRANCHES = ("skip_norms.", "skip_linears.")

pytestmark = pytest.mark.skipif(
    not GOLDEN.exists(), reason="the stored runs of the reference implementation are not here"
)


@dataclass(frozen=True)
class Golden:
    """One of the stored files."""

    config: dict[str, Any]
    cache: dict[str, Any]
    weights: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    runs: dict[str, tuple[torch.Tensor, torch.Tensor]]  # timesteps, outputs

    @property
    def heads(self) -> int:
        return self.config.get("num_heads") or self.config["num_attention_heads"]

    @property
    def schedule(self) -> IntervalSchedule:
        """The rule of the file. Where the cache is reset by t < stop, in place of t <= stop, the
        last such t is one lower, timesteps being whole numbers.
        """
        rule = self.cache
        assert ("t <= stop" in rule["rule"]) != ("t < stop" in rule["rule"])
        stop = rule["stop"] - ("t < stop" in rule["rule"])
        return IntervalSchedule(rule["interval"], rule["start"] / 1000, stop / 1000)

    def plan(self) -> str:
        """Which calls of the cached run refresh, by the file's rule in words."""
        rule, letters, count, is_cached = self.cache, [], 0, False
        for t in self.runs["cache"][0].tolist():
            refresh = count % rule["interval"] == 0 or not is_cached or t >= rule["start"]
            letters.append("F" if refresh else "r")
            count, is_cached = count + 1, True
            if t < rule["stop"] or (t == rule["stop"] and "t <= stop" in rule["rule"]):
                count, is_cached = 0, False
        return "".join(letters)


@functools.cache
def golden_of(task: str) -> Golden:
    with safe_open(GOLDEN / f"{task}.safetensors", "pt") as stored:
        metadata = {key: json.loads(value) for key, value in stored.metadata().items()}
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118

    def under(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    runs = under("runs/")
    kinds = {name.partition("/")[0] for name in runs}
    return Golden(
        metadata["config"],
        metadata["cache"],
        under("weights/"),
        under("inputs/"),
        {kind: (runs[f"{kind}/timesteps"], runs[f"{kind}/outputs"]) for kind in kinds},
    )


def call(task: str, model: nn.Module, t: torch.Tensor) -> torch.Tensor:
    """One prediction, in the layout of the stored ones."""
    inputs = dict(golden_of(task).inputs)
    x = inputs.pop("x") * (0.5 + t / 1000)
    times = t.expand(len(x))
    if task == "c2i":
        return model(x, timestep=times, class_labels=inputs["y"], return_dict=False)[0]
    if task == "t2v":
        return model(x, timestep=times, return_dict=False, **inputs)[0]
    if task == "c2v":  # the reference has frames before channels
        return model(x.transpose(1, 2), times, inputs["y"], return_dict=False)[0].transpose(1, 2)
    rotary = (inputs.pop("image_rotary_cos"), inputs.pop("image_rotary_sin"))
    return model(x, times.float(), image_rotary_emb=rotary, return_dict=False, **inputs)[0]


def apply_rule(task: str, model: nn.Module) -> None:
    """Skip-Cache as the file says it was used."""
    golden = golden_of(task)
    layers = golden.cache["branch"]
    apply_skip_cache(
        model,
        schedule=golden.schedule,
        front_layers=layers,
        back_layers=layers,
        estimator="hold",
    )


def largest_error(task: str, kind: str, predict: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """The largest distance of any number of the run's 50 outputs from the stored one."""
    timesteps, expected = golden_of(task).runs[kind]
    found = torch.stack([predict(t) for t in timesteps])
    assert found.shape == expected.shape
    assert len(found) == 50
    assert bool((timesteps.diff() < 0).all())
    return float((found - expected).abs().max())


def announced(told_by: str, model: nn.Module, task: str) -> Any:
    """The run's timesteps told before it, or to be read off the calls."""
    if told_by == "calls":
        return nullcontext()
    return skip_cache_run(model, timesteps=golden_of(task).runs["cache"][0])


# Converted checkpoints


def write_checkpoint(task: str, wrapper: str | None, path: Path, *, is_plain: bool = False) -> Path:
    """The stored weights as the released file holds them: fp32, bare or wrapped."""
    weights = golden_of(task).weights
    if is_plain:
        weights = {k: tensor for k, tensor in weights.items() if not k.startswith(BRANCHES)}
    torch.save(weights if wrapper is None else {wrapper: weights}, path)
    return path


def told(task: str) -> dict[str, int]:
    """What the tensors cannot tell."""
    config = golden_of(task).config
    told = {"num_attention_heads": golden_of(task).heads}
    if task == "t2v":
        told |= {name: config[name] for name in ("sample_size", "video_length")}
    return told


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    """The converted folder of a task, made once."""

    @functools.cache
    def folder(task: str) -> Path:
        parent = tmp_path_factory.mktemp(task)
        path = write_checkpoint(task, "ema", parent / "released.pt")
        return convert_skip_dit(path, parent / "out", **told(task))

    return folder


@pytest.mark.parametrize("task", CONVERTED)
@torch.no_grad()
def test_converted_model_with_branches_equals_the_reference(task, folders):
    """A released checkpoint, converted and loaded: all 50 outputs within 1e-4."""
    model = load_skip_dit(folders(task))
    assert largest_error(task, "skip", lambda t: call(task, model, t)) < TOLERANCE


@pytest.mark.parametrize("task", CONVERTED)
@torch.no_grad()
def test_converted_model_without_branches_equals_the_reference(task, tmp_path):
    """The same backbone from a file without branches, as plain DiT and Latte are released."""
    path = write_checkpoint(task, None, tmp_path / "plain.pt", is_plain=True)
    model = load_skip_dit(path, **told(task))
    assert not hasattr(model, "skip_branches")
    if task == "c2v":  # a sample without a class is among them
        assert model.null_class in golden_of(task).inputs["y"]
    assert largest_error(task, "plain", lambda t: call(task, model, t)) < TOLERANCE


@pytest.mark.parametrize("told_by", ["timesteps", "calls"])
@pytest.mark.parametrize("task", CONVERTED)
@torch.no_grad()
def test_converted_model_with_skip_cache_equals_the_reference(task, told_by, folders):
    """Cached by the rule of the file: all outputs within 1e-4, and refreshes where the rule has
    them.
    """
    model = load_skip_dit(folders(task))
    apply_rule(task, model)
    with announced(told_by, model, task):
        assert largest_error(task, "cache", lambda t: call(task, model, t)) < TOLERANCE
    assert cache_stats(model).plan == golden_of(task).plan()
    assert cache_stats(model).reused > 10


@pytest.mark.parametrize("wrapper", [None, "ema", "model"])
@pytest.mark.parametrize("task", CONVERTED)
def test_every_wrapping_gives_the_same_model(task, wrapper, folders, tmp_path):
    """Bare or wrapped, loaded at once or converted before: the same class, sizes and weights."""
    path = write_checkpoint(task, wrapper, tmp_path / "released.pt")
    loaded, converted = load_skip_dit(path, **told(task)), load_skip_dit(folders(task))
    assert type(loaded) is type(converted)
    state = loaded.state_dict()
    assert state.keys() == converted.state_dict().keys()
    for name, tensor in converted.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    sizes = golden_of(task).config
    layers = sizes.get("num_layers") or sizes["depth"] // (2 if task == "c2v" else 1)
    assert (loaded.config.num_layers, loaded.skip_branches.depth) == (layers, layers)


# HunyuanDiT, whose skips are its own


@pytest.mark.parametrize(
    ("kind", "told_by"), [("skip", "calls"), ("cache", "timesteps"), ("cache", "calls")]
)
@torch.no_grad()
def test_hunyuan_dit_equals_the_reference(kind, told_by):
    """HunyuanDiT, uncached and with Skip-Cache in its window: all 50 outputs within 1e-4."""
    golden = golden_of("t2i")
    model = HunyuanDiT2DModel(**golden.config).eval()
    model.load_state_dict(golden.weights)
    if kind == "cache":
        apply_rule("t2i", model)
    with announced(told_by, model, "t2i"):
        assert largest_error("t2i", kind, lambda t: call("t2i", model, t)) < TOLERANCE
    if kind == "cache":
        assert cache_stats(model).plan == golden.plan()
        assert cache_stats(model).reused > 10


# The research code's own classes


def research_model(task: str) -> nn.Module:
    """The class of the research code with the stored weights, without the skip branches."""
    golden = golden_of(task)
    names = ("hidden_size", "num_heads", "depth", "in_channels", "input_size", "num_classes")
    config = {name: golden.config[name] for name in names}
    model: nn.Module
    if task == "c2i":
        model = DiT(**config)
    else:
        model = Latte(num_frames=golden.config["num_frames"], **config)
    own = {k: tensor for k, tensor in golden.weights.items() if not k.startswith(BRANCHES)}
    model.load_state_dict(own)
    return model.eval()


def named_by_layer(
    weights: dict[str, torch.Tensor], first: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """The branches by the layer that they lead to, as ``SkipBranches`` names them."""
    for name, tensor in weights.items():
        if name.startswith(BRANCHES):
            kind, number, *_, leaf = name.split(".")
            module = "skip_norm" if kind == "skip_norms" else "skip_linear"
            yield f"layers.{first + int(number)}.{module}.{leaf}", tensor


def call_research(task: str, model: nn.Module, t: torch.Tensor) -> torch.Tensor:
    inputs = golden_of(task).inputs
    x = inputs["x"] * (0.5 + t / 1000)
    return model(x, t.expand(len(x)), inputs["y"])


@pytest.mark.parametrize("kind", ["plain", "skip", "cache"])
@pytest.mark.parametrize("task", ["c2i", "c2v"])
@torch.no_grad()
def test_research_code_equals_the_reference(task, kind):
    """The research code's DiT and class-to-video Latte, given the branches and cached in place: no
    file is converted.
    """
    golden, model = golden_of(task), research_model(task)
    if kind != "plain":
        layers = golden.config["depth"] // (2 if task == "c2v" else 1)
        branches = SkipBranches(golden.config["hidden_size"], layers, form="replace")
        branches.load_state_dict(dict(named_by_layer(golden.weights, layers // 2)))
        add_skip_branches(model, branches)
    if kind == "cache":
        apply_rule(task, model)
    assert largest_error(task, kind, lambda t: call_research(task, model, t)) < TOLERANCE
    if kind == "cache":
        assert cache_stats(model).plan == golden.plan()
