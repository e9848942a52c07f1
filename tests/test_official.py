"""Released checkpoints: read, converted, loaded again, and refused where they are not sound."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, HunyuanDiT2DModel, LatteTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn

import research_code
from pipelines import transformer_of
from skipcache import (
    Backbone,
    BlockList,
    SkipBranches,
    apply_skip_cache,
    cache_stats,
    convert_skip_dit,
    load_skip_dit,
    remove_skip_branches,
)
from skipcache.branches import stream
from skipcache.cli import main
from skipcache.errors import AdapterError, BranchFileError, ConfigError
from skipcache.evaluation import convert_memory

WIDTH, HEADS, CLASSES, FRAMES, LAYERS = 16, 2, 5, 3, 4
FILES = ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
BRANCH_FILES = ["skip_branches.json", "skip_branches.safetensors"]
SIZES: dict[str, Any] = {"hidden_size": WIDTH, "num_heads": HEADS, "num_classes": CLASSES}
VIDEO: dict[str, Any] = {**SIZES, "depth": 2 * LAYERS, "num_frames": FRAMES}


def randomised(model: nn.Module) -> nn.Module:
    """Weights in which every tensor matters."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "skip_norms" not in name:
            nn.init.normal_(parameter, 0.0, 0.15)
    return model.eval()


def text_latte() -> nn.Module:
    """diffusers' class with the lists of the research code's branches beside its blocks."""
    model = transformer_of("latte", layers=LAYERS, video_length=FRAMES)
    research_code.add_research_branches(model, WIDTH, LAYERS)
    return model.eval()


# What a file is written from: the research code's module, or diffusers' where the names are its.
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "skip-dit": lambda: research_code.SkipDiT(depth=LAYERS, **SIZES),
    "skip-dit-odd": lambda: research_code.SkipDiT(depth=5, **SIZES),
    "dit-256": lambda: research_code.DiT(depth=2, input_size=32, **SIZES),
    "dit-512": lambda: research_code.DiT(depth=2, input_size=64, **SIZES),
    "class-latte": lambda: research_code.skip_latte(**VIDEO),
    "free-latte": lambda: research_code.skip_latte(**VIDEO | {"num_classes": None}),
    "plain-latte": lambda: research_code.Latte(**VIDEO),
    "text-latte": text_latte,
}
WITH_BRANCHES = ("skip-dit", "skip-dit-odd", "class-latte", "free-latte", "text-latte")


@functools.cache
def source_of(family: str) -> nn.Module:
    return randomised(FAMILIES[family]())


def weights_of(family: str) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in source_of(family).state_dict().items()}


def told(family: str) -> dict[str, int]:
    """What the tensors of these small models cannot tell."""
    rest = {"sample_size": 8, "video_length": FRAMES} if family == "text-latte" else {}
    return {"num_attention_heads": HEADS, **rest}


def written(path: Path, family: str = "skip-dit", **changes: torch.Tensor | None) -> Path:
    """A file of that family with some tensors exchanged, or left out (None)."""
    weights: dict[str, Any] = {**weights_of(family), **changes}
    torch.save({k: tensor for k, tensor in weights.items() if tensor is not None}, path)
    return path


def load(path: Path, family: str = "skip-dit", **options: Any) -> nn.Module:
    return load_skip_dit(path, **{**told(family), **options})


def refusal_of(path: Path, family: str = "skip-dit", kind=BranchFileError, **options: Any) -> str:
    """What loading and converting say, which is the same; nothing is left behind."""
    with pytest.raises(kind) as loading:
        load(path, family, **options)
    with pytest.raises(kind) as converting:
        convert_skip_dit(path, path.parent / "refused", **{**told(family), **options})
    assert str(loading.value) == str(converting.value)
    assert not [entry for entry in path.parent.iterdir() if "refused" in entry.name]
    return str(loading.value)


def names_of(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def predict(family: str, model: nn.Module, t: int = 700) -> torch.Tensor:
    """The converted model's output, frames before channels as in the research code."""
    torch.manual_seed(1)
    times, labels = torch.tensor([t, t]), torch.tensor([1, CLASSES])
    if "latte" in family:
        x = torch.randn(2, 4, FRAMES, 8, 8, dtype=model.dtype)
        if family == "text-latte":
            texts = torch.randn(2, 6, 12, dtype=model.dtype)
            return model(x, times, encoder_hidden_states=texts, return_dict=False)[0]
        labels = None if family == "free-latte" else labels
        return model(x, times, labels, return_dict=False)[0].transpose(1, 2)
    side = model.config.sample_size
    x = torch.randn(2, 4, side, side, dtype=model.dtype)
    return model(x, timestep=times, class_labels=labels, return_dict=False)[0]


def predict_by_source(family: str, t: int = 700) -> torch.Tensor:
    torch.manual_seed(1)
    model = source_of(family)
    times, labels = torch.tensor([t, t]), torch.tensor([1, CLASSES])
    if "latte" in family:
        x = torch.randn(2, 4, FRAMES, 8, 8)
        return model(x.transpose(1, 2), times, None if family == "free-latte" else labels)
    side = 8 if family.startswith("skip") else {"dit-256": 32, "dit-512": 64}[family]
    return model(torch.randn(2, 4, side, side), times, labels)


# Sound files


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "text-latte"])
@torch.no_grad()
def test_converted_model_computes_what_the_research_code_does(family, tmp_path):
    """The output is the research module's, of DiT with its branches at work."""
    model = load(written(tmp_path / "a.pt", family), family)
    if "latte" in family:
        remove_skip_branches(model)  # the module that these weights come from has no use of them
    for t in (999, 20):
        expected = predict_by_source(family, t)
        assert expected.abs().max() > 0.05
        torch.testing.assert_close(predict(family, model, t), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_text_latte_keeps_every_weight(tmp_path):
    """Text-to-video Latte is diffusers' model with the names of diffusers."""
    source = source_of("text-latte")
    model = load(written(tmp_path / "a.pt", "text-latte"), "text-latte")
    remove_skip_branches(model)
    assert torch.equal(predict("text-latte", model), predict("text-latte", source))


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_are_those_of_the_file(family, tmp_path):
    """Branch N of the file leads to layer ceil(L / 2) + N; a plain file gives none."""
    weights = weights_of(family)
    model = load(written(tmp_path / "a.pt", family), family)
    assert hasattr(model, "skip_branches") == (family in WITH_BRANCHES)
    if family not in WITH_BRANCHES:
        return
    branches = model.skip_branches
    layers = 5 if family == "skip-dit-odd" else LAYERS
    assert (branches.form, branches.depth, branches.dim) == ("replace", layers, WIDTH)
    assert sorted(branches.by_target()) == list(range((layers + 1) // 2, layers))
    for n, branch in enumerate(branches.by_target().values()):
        for leaf in ("weight", "bias"):
            norm, linear = weights[f"skip_norms.{n}.{leaf}"], f"skip_linears.{n}.linear.{leaf}"
            assert torch.equal(getattr(branch.skip_norm, leaf), norm)
            assert torch.equal(getattr(branch.skip_linear, leaf), weights[linear])


@pytest.mark.parametrize(
    ("family", "name", "sizes"),
    [
        (
            "skip-dit",
            "DiTTransformer2DModel",
            {"num_layers": 4, "sample_size": 8, "num_embeds_ada_norm": 5, "out_channels": 8},
        ),
        ("dit-256", "DiTTransformer2DModel", {"num_layers": 2, "sample_size": 32}),
        ("dit-512", "DiTTransformer2DModel", {"num_layers": 2, "sample_size": 64}),
        (
            "class-latte",
            "LatteClassTransformer3DModel",
            {"num_layers": 4, "sample_size": 8, "num_classes": 5, "video_length": 3},
        ),
        (
            "free-latte",
            "LatteClassTransformer3DModel",
            {"num_layers": 4, "num_classes": None, "video_length": 3},
        ),
        (
            "text-latte",
            "LatteTransformer3DModel",
            {"num_layers": 4, "cross_attention_dim": 16, "caption_channels": 12},
        ),
    ],
)
def test_sizes_are_read_off_the_tensors(family, name, sizes, tmp_path):
    """Depth, width, patch, channels, classes, frames and latents are those of the file; the model
    is ready to run, in eval mode on the CPU.
    """
    model = load(written(tmp_path / "a.pt", family), family)
    assert type(model).__name__ == name
    common = {"in_channels": 4, "patch_size": 2, "attention_head_dim": WIDTH // HEADS}
    assert {key: model.config[key] for key in sizes} == sizes
    assert {key: model.config[key] for key in common} == common
    assert not any(module.training for module in model.modules())
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


def test_what_the_tensors_cannot_tell(tmp_path):
    """Heads are 16 unless told; text-to-video latents are 64 wide and 16 frames long."""
    path = written(tmp_path / "a.pt", "text-latte")
    config = load_skip_dit(path).config
    assert (config.num_attention_heads, config.attention_head_dim) == (16, 1)
    assert (config.sample_size, config.video_length) == (64, 16)
    config = load_skip_dit(path, num_attention_heads=4, sample_size=32, video_length=8).config
    assert (config.num_attention_heads, config.attention_head_dim) == (4, 4)
    assert (config.sample_size, config.video_length) == (32, 8)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"ema": weights},
        lambda weights: {"model": weights},
        lambda weights: {
            "model": {name: tensor + 1 for name, tensor in weights.items()},
            "ema": weights,
            "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
            "args": argparse.Namespace(model="DiT-XL/2", num_classes=5, data_path=None),
        },
        lambda weights: {"ema": {f"module.{name}": tensor for name, tensor in weights.items()}},
        lambda weights: {name: nn.Parameter(tensor) for name, tensor in weights.items()},
    ],
    ids=["bare", "ema", "model", "all-of-training", "data-parallel", "parameters"],
)
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_ways_of_wrapping(wrap, is_zip, tmp_path):
    """Bare or wrapped, new or old torch.save, with a command line and optimizer state besides: the
    averaged weights are what is read.
    """
    path = tmp_path / "a.pt"
    torch.save(wrap(weights_of("skip-dit")), path, _use_new_zipfile_serialization=is_zip)
    model = load(path)
    expected = weights_of("skip-dit")["blocks.3.attn.qkv.weight"].chunk(3)
    attention = model.transformer_blocks[3].attn1
    for linear, tensor in zip(
        (attention.to_q, attention.to_k, attention.to_v), expected, strict=True
    ):
        assert torch.equal(linear.weight, tensor)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["skip-dit", "class-latte", "text-latte"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@torch.no_grad()
def test_dtype_is_that_of_the_file(kind, family, suffix, tmp_path):
    """Weights keep the dtype of the file, pickle or safetensors, run in it, and ``dtype`` asks for
    another one.
    """
    path = tmp_path / f"a.{suffix}"
    weights = {name: tensor.to(kind) for name, tensor in weights_of(family).items()}
    save = save_file if suffix == "safetensors" else torch.save
    save(weights, path)
    model = load(path, family)
    assert {parameter.dtype for parameter in model.parameters()} == {kind}
    assert predict(family, model).dtype == kind
    single = load(path, family, dtype="float32")
    assert {parameter.dtype for parameter in single.parameters()} == {torch.float32}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(single.state_dict()[name], tensor.float(), atol=0, rtol=0)


def test_mixed_dtypes_become_the_one_that_holds_all(tmp_path):
    """A file of fp16 and bf16 tensors becomes an fp32 model, without loss."""
    table = "y_embedder.embedding_table.weight"
    weights = {k: tensor.half() for k, tensor in weights_of("skip-dit").items()}
    weights[table] = weights[table].bfloat16()
    torch.save(weights, tmp_path / "a.pt")
    model = load(tmp_path / "a.pt")
    assert model.dtype == torch.float32
    embedding = model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight
    assert torch.equal(embedding, weights[table].float())


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_of_many_windows_is_read_alike(suffix, tmp_path, monkeypatch):
    """Renewing the mapping after every tensor changes nothing."""
    path, weights = tmp_path / f"a.{suffix}", weights_of("skip-dit")
    (save_file if suffix == "safetensors" else torch.save)(weights, path)
    whole = load(path).state_dict()
    monkeypatch.setattr(stream, "WINDOW_BYTES", 1)
    for name, tensor in load(path).state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_weights_outlive_their_file(tmp_path):
    """The model holds copies: writing over the file changes nothing."""
    path = written(tmp_path / "a.pt")
    model = load(path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path.write_bytes(bytes(path.stat().st_size))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_converted_folder_loads_as_the_file_does(family, dtype, tmp_path):
    """Converted and loaded again: the same names, bit-identical weights and output."""
    path = written(tmp_path / "a.pt", family)
    folder = convert_skip_dit(path, tmp_path / "new" / "out", dtype=dtype, **told(family))
    is_plain = family not in WITH_BRANCHES
    assert names_of(folder) == (FILES[1:] if is_plain else sorted(FILES + BRANCH_FILES))
    expected, found = load(path, family, dtype=dtype), load_skip_dit(folder)
    assert expected.state_dict().keys() == found.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert found.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(found.state_dict()[name], tensor), name
    assert torch.equal(predict(family, found), predict(family, expected))
    if not is_plain:
        assert "a.pt" in found.skip_branches.record.made_by


def test_converted_folder_is_one_of_diffusers(tmp_path):
    """diffusers' own class opens it, without the branches, and their files are those of
    ``SkipBranches``.
    """
    path = written(tmp_path / "a.pt", "text-latte")
    folder = convert_skip_dit(path, tmp_path / "out", **told("text-latte"))
    model = LatteTransformer3DModel.from_pretrained(folder)
    own = remove_branches_of(load_skip_dit(folder))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    assert len(SkipBranches.from_pretrained(folder).pairs) == LAYERS // 2
    assert not [name for name in load_file(folder / FILES[2]) if "skip" in name]


def remove_branches_of(model: nn.Module) -> dict[str, torch.Tensor]:
    remove_skip_branches(model)
    return dict(model.state_dict())


@torch.no_grad()
def test_timestep_frequencies_survive_the_folder(tmp_path):
    """A DiT keeps the research code's frequencies through save_pretrained of the loaded model;
    diffusers' class alone does not know of them.
    """
    first = convert_skip_dit(written(tmp_path / "a.pt"), tmp_path / "out", **told("skip-dit"))
    model = load_skip_dit(first)
    model.save_pretrained(tmp_path / "again")
    remove_skip_branches(model)
    expected = predict("skip-dit", model)
    assert torch.equal(predict("skip-dit", load_skip_dit(tmp_path / "again")), expected)
    plain = DiTTransformer2DModel.from_pretrained(first)
    assert (predict("skip-dit", plain) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["float64", torch.bfloat16, "torch.float16"])
def test_dtype_of_a_folder(dtype, tmp_path):
    """``dtype`` holds for the model of a folder and for its branches, by name or as torch's."""
    folder = convert_skip_dit(written(tmp_path / "a.pt"), tmp_path / "out", **told("skip-dit"))
    kind = getattr(torch, str(dtype).removeprefix("torch."))
    model = load_skip_dit(folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {kind}


@torch.no_grad()
def test_a_loaded_model_caches(tmp_path):
    """apply_skip_cache finds the branches of a loaded model: a step between reuses."""
    model = load(written(tmp_path / "a.pt"))
    apply_skip_cache(model, interval=2, window=(1.0, 0.0), front_layers=1, back_layers=1)
    for t in (900, 700, 500, 300):
        predict("skip-dit", model, t)
    assert cache_stats(model).plan == "FrFr"


# The folder


@pytest.mark.parametrize("is_file", [True, False])
def test_what_is_there_already_stays(is_file, tmp_path):
    """A file, or a folder with something in it, is refused before anything is read."""
    out = tmp_path / "out"
    kept = out if is_file else out / "kept.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(ConfigError, match=r"is there already\. Name a folder that does not exist"):
        convert_skip_dit(tmp_path / "absent.pt", out)
    assert kept.read_text() == "mine"
    assert names_of(tmp_path) == ["out"]


def test_an_empty_folder_is_taken(tmp_path):
    """An empty folder will do, and nothing else is left beside it."""
    (tmp_path / "out").mkdir()
    path = written(tmp_path / "a.pt")
    assert convert_skip_dit(path, str(tmp_path / "out"), **told("skip-dit")) == tmp_path / "out"
    assert names_of(tmp_path) == ["a.pt", "out"]


def test_a_folder_that_cannot_be_made(tmp_path):
    """A parent that is a file: a clear error."""
    path = written(tmp_path / "a.pt")
    with pytest.raises(BranchFileError, match="cannot be written"):
        convert_skip_dit(path, path / "out", **told("skip-dit"))
    assert names_of(tmp_path) == ["a.pt"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    """Writing that fails in the middle, at a limit on the size of files, leaves nothing."""
    resource = pytest.importorskip("resource", reason="limits on file sizes are of POSIX")
    path = written(tmp_path / "a.pt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(BranchFileError, match="out cannot be written"):
            convert_skip_dit(path, tmp_path / "out", **told("skip-dit"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_of(tmp_path) == ["a.pt"]


# Files that cannot be read


def bare(path: Path) -> Path:
    torch.save(weights_of("skip-dit"), path)
    return path


def legacy(path: Path) -> Path:
    torch.save(weights_of("skip-dit"), path, _use_new_zipfile_serialization=False)
    return path


def safe(path: Path) -> Path:
    save_file(weights_of("skip-dit"), path)
    return path


@pytest.mark.parametrize("write", [bare, legacy, safe])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99, 1 - 1e-5])
def test_truncated_file(write, share, tmp_path):
    """Cut off anywhere, a file is refused, and torch's advice to load it unsafely is not passed
    on.
    """
    path = write(tmp_path / "a.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    message = refusal_of(path)
    assert str(path) in message
    assert "truncated" in message
    assert "weights_only" not in message


@pytest.mark.parametrize("write", [bare, legacy, safe])
@pytest.mark.parametrize("place", [12, 40, 200])
def test_corrupt_file(write, place, tmp_path):
    """A header that was written over: an error of ours, whatever the library makes of it."""
    path = write(tmp_path / "a.pt")
    damaged = bytearray(path.read_bytes())
    damaged[place : place + 400] = b"\xff" * 400
    path.write_bytes(damaged)
    refusal_of(path)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n" * 9])
def test_another_kind_of_file(content, tmp_path):
    """A page saved in place of a checkpoint is called that."""
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    assert "neither a safetensors file nor one of torch.save" in refusal_of(path)


def test_absent_file(tmp_path):
    """No such file: said so, with its path."""
    message = refusal_of(tmp_path / "absent.pt")
    assert re.search(r"absent\.pt cannot be read: .*No such file", message)


class Exploit:
    """Unpickled with pickle, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights, code: code,
        lambda weights, code: {**weights, "blocks.0.attn.qkv.bias": code},
        lambda weights, code: {"ema": weights, "args": code},
        lambda weights, code: {"ema": weights, "args": argparse.Namespace(lr=code)},
    ],
    ids=["alone", "as-a-tensor", "besides", "in-the-command-line"],
)
def test_code_in_a_pickle_is_not_run(is_zip, wrap, tmp_path):
    """A pickle that would run code is refused by the name of what it calls, and does not run; the
    same file opened unsafely does.
    """
    path, traces = tmp_path / "a.pt", tmp_path / "traces"
    stored = wrap(weights_of("skip-dit"), Exploit(traces))
    torch.save(stored, path, _use_new_zipfile_serialization=is_zip)
    message = refusal_of(path)
    assert not traces.exists()
    assert "mkdir' beside tensors. Loading that could run code, so it was not loaded" in message
    assert "weights_only" not in message
    torch.load(path, weights_only=False)
    assert traces.exists()


@pytest.mark.parametrize(
    "stored",
    [
        [1, 2],
        3.0,
        {},
        {"ema": {}},
        {"ema": {"a": 1.0}},
        {"a": torch.ones(1), "b": "text"},
        {1: torch.ones(1)},
        torch.ones(3),
    ],
    ids=str,
)
def test_no_state_dict(stored, tmp_path):
    """Something else than names and tensors."""
    torch.save(stored, tmp_path / "a.pt")
    assert "holds no state dict" in refusal_of(tmp_path / "a.pt")


def sparse() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: sparse tensors are in beta
        return torch.eye(3 * WIDTH, WIDTH).to_sparse()


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (lambda: torch.ones(3 * WIDTH, WIDTH, dtype=torch.int64), "torch.int64"),
        (lambda: torch.ones(3 * WIDTH, WIDTH, dtype=torch.complex64), "torch.complex64"),
        (lambda: torch.ones(3 * WIDTH, WIDTH, device="meta"), "meta"),
        (sparse, "sparse"),
        (lambda: torch.ones(1).expand(3 * WIDTH, 10**9), "larger than what the file stores of it"),
    ],
    ids=["integers", "complex", "meta", "sparse", "inflated"],
)
def test_tensors_that_are_no_weights(tensor, says, tmp_path):
    """Integers, sparse tensors, and one that claims more numbers than the file has."""
    changes = {"blocks.1.attn.qkv.weight": tensor()}
    message = refusal_of(written(tmp_path / "a.pt", **changes))
    assert "'blocks.1.attn.qkv.weight'" in message
    assert says in message


# Files whose tensors make no model


@pytest.mark.parametrize(
    ("family", "changes", "missing", "extra"),
    [
        ("skip-dit", {"blocks.1.mlp.fc1.bias": None}, "blocks.1.mlp.fc1.bias", "none"),
        ("skip-dit", {"pos_embed": None}, "pos_embed", "none"),
        ("skip-dit", {"skip_norms.1.bias": None}, "skip_norms.1.bias", "none"),
        ("skip-dit", {"head.weight": torch.ones(1)}, "none", "head.weight"),
        (
            "skip-dit",
            {f"skip_norms.2.{leaf}": torch.ones(2 * WIDTH) for leaf in ("weight", "bias")},
            "none",
            "skip_norms.2.bias, skip_norms.2.weight",
        ),
        ("class-latte", {"blocks.3.attn.proj.bias": None}, "blocks.3.attn.proj.bias", "none"),
        ("text-latte", {"proj_out.bias": None}, "proj_out.bias", "none"),
        ("text-latte", {"proj_in.bias": torch.ones(1)}, "none", "proj_in.bias"),
    ],
)
def test_missing_and_extra_tensors_are_listed(family, changes, missing, extra, tmp_path):
    """Each by its name, and the file by its own."""
    message = refusal_of(written(tmp_path / "a.pt", family, **changes), family)
    assert str(tmp_path / "a.pt") in message
    assert f"Missing: {missing}. Too many: {extra}." in message


def test_a_long_list_is_cut(tmp_path):
    """A block left out of the middle: the first names, and how many more."""
    weights = weights_of("skip-dit")
    block = {name: None for name in weights if name.startswith("blocks.1.")}
    message = refusal_of(written(tmp_path / "a.pt", **block))
    assert re.search(r"Missing: blocks\.1\.\S+, .*Too many: blocks\.3\.", message)


def test_branches_of_another_depth(tmp_path):
    """Branches of an eight-layer model in a file of four layers."""
    deeper = research_code.SkipDiT(depth=8, **SIZES).state_dict()
    branches = {name: tensor for name, tensor in deeper.items() if name.startswith("skip_")}
    message = refusal_of(written(tmp_path / "a.pt", **branches))
    assert "Missing: none. Too many: skip_linears.2.linear.bias" in message


def test_an_odd_number_of_video_blocks(tmp_path):
    """Blocks alternate between space and time, so an odd number of them is not whole."""
    last = {name: None for name in weights_of("plain-latte") if name.startswith("blocks.7.")}
    message = refusal_of(written(tmp_path / "a.pt", "plain-latte", **last), "plain-latte")
    assert "has 7 blocks" in message
    assert "even" in message


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("skip-dit", "blocks.2.mlp.fc2.weight", (WIDTH, 2 * WIDTH)),
        ("skip-dit", "blocks.2.attn.qkv.weight", (4 * WIDTH, WIDTH)),
        ("skip-dit", "blocks.0.attn.proj.bias", ()),
        ("skip-dit", "t_embedder.mlp.0.weight", (WIDTH, 128)),
        ("skip-dit", "skip_linears.1.linear.weight", (WIDTH, WIDTH)),
        ("skip-dit", "skip_norms.0.weight", (WIDTH,)),
        ("class-latte", "temp_embed", (1, FRAMES, 2 * WIDTH)),
        ("text-latte", "transformer_blocks.1.attn2.to_v.weight", (WIDTH, 3)),
    ],
)
def test_a_tensor_of_another_width(family, name, shape, tmp_path):
    """Said by its name, with the shape found."""
    message = refusal_of(written(tmp_path / "a.pt", family, **{name: torch.ones(shape)}), family)
    assert f"{name!r} has shape {tuple(shape)}" in message
    assert "Its tensors are of different models" in message


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("x_embedder.proj.weight", (WIDTH, 4), "4 dimensions"),
        ("y_embedder.embedding_table.weight", (6,), "2 dimensions"),
        ("pos_embed", (1, 15, WIDTH), "15 patches"),
        ("pos_embed", (1, 0, WIDTH), "none of them empty"),
        ("final_layer.linear.weight", (0, WIDTH), "none of them empty"),
    ],
)
def test_sizes_that_cannot_be(name, shape, says, tmp_path):
    """A tensor that sizes are read off, with a shape that gives none."""
    message = refusal_of(written(tmp_path / "a.pt", **{name: torch.ones(shape)}))
    assert says in message
    assert str(tmp_path / "a.pt") in message


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("skip-dit", "blocks.2.attn.qkv.bias", float("nan")),
        ("skip-dit", "skip_linears.1.linear.weight", float("inf")),
        ("skip-dit", "pos_embed", float("nan")),
        ("class-latte", "temp_embed", float("nan")),
        ("text-latte", "scale_shift_table", -float("inf")),
    ],
)
def test_a_value_that_is_not_finite(family, name, value, tmp_path):
    """One in a whole tensor is enough."""
    tensor = weights_of(family)[name]
    tensor.view(-1)[5] = value
    message = refusal_of(written(tmp_path / "a.pt", family, **{name: tensor}), family)
    assert f"{name!r}" in message


def test_a_dtype_too_small_for_a_weight(tmp_path):
    """A weight that fp16 cannot hold is refused when fp16 is asked for, and only then."""
    tensor = weights_of("skip-dit")["skip_linears.1.linear.bias"]
    tensor[3] = 1e5
    path = written(tmp_path / "a.pt", **{"skip_linears.1.linear.bias": tensor})
    folder = convert_skip_dit(path, tmp_path / "out", **told("skip-dit"))
    assert "not finite in torch.float16" in refusal_of(path, dtype="float16")
    with pytest.raises(BranchFileError, match=r"not finite in torch\.float16"):
        load_skip_dit(folder, dtype="float16")
    assert load_skip_dit(folder, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["skip-dit", "text-latte"])
def test_other_position_embeddings(family, tmp_path):
    """Positions that diffusers' class would not compute are refused; its own are taken."""
    name = "pos_embed" if family == "skip-dit" else "pos_embed.pos_embed"
    positions = research_code.picture_positions(WIDTH, 4)
    load(written(tmp_path / "a.pt", family, **{name: positions}), family)
    load(written(tmp_path / "a.pt", family, **{name: positions.half()}), family)
    message = refusal_of(written(tmp_path / "a.pt", family, **{name: positions.flip(1)}), family)
    assert f"{name!r} differs by" in message


def test_hunyuan_dit_needs_no_conversion(tmp_path):
    """Its weights are recognised, and the message says what to do with them."""
    weights = transformer_of("hunyuan_dit").state_dict()
    assert type(transformer_of("hunyuan_dit")) is HunyuanDiT2DModel
    torch.save(weights, tmp_path / "a.pt")
    message = refusal_of(tmp_path / "a.pt")
    assert "HunyuanDiT" in message
    assert "call apply_skip_cache on it" in message


def test_names_of_diffusers_are_left_to_diffusers(tmp_path):
    """A file of diffusers' DiT is of no family here, and the message says who loads it."""
    torch.save(transformer_of("dit").state_dict(), tmp_path / "a.pt")
    message = refusal_of(tmp_path / "a.pt")
    assert "of no family that is known here" in message
    assert "is loaded by diffusers" in message


# What is told


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("skip-dit", {"num_attention_heads": 3}, "divisor of the width"),
        ("skip-dit", {"num_attention_heads": 0}, "divisor of the width"),
        ("skip-dit", {"num_attention_heads": True}, "divisor of the width"),
        ("skip-dit", {"num_attention_heads": "2"}, "divisor of the width"),
        ("skip-dit", {"sample_size": 16}, "the tensors are of 8. Leave it out"),
        ("skip-dit", {"video_length": 3}, "a model of pictures. Leave it out"),
        ("class-latte", {"video_length": 4}, "the tensors are of 3. Leave it out"),
        ("class-latte", {"sample_size": 0}, "a whole number, at least 1"),
        ("text-latte", {"video_length": 2.5}, "a whole number, at least 1"),
        ("skip-dit", {"dtype": "int8"}, "Allowed: float64, float32, float16, bfloat16"),
        ("skip-dit", {"dtype": torch.int64}, "Allowed: float64, float32, float16, bfloat16"),
    ],
)
def test_what_is_told_must_fit(family, options, says, tmp_path):
    """A value that cannot be, or that the tensors contradict."""
    path = written(tmp_path / "a.pt", family)
    assert says in refusal_of(path, family, kind=ConfigError, **options)


def test_what_is_told_and_true(tmp_path):
    """Repeating what the tensors say is no error."""
    path = written(tmp_path / "a.pt", "class-latte")
    assert load(path, "class-latte", sample_size=8, video_length=FRAMES).config.sample_size == 8


def test_adapter_that_does_not_fit(tmp_path):
    """The adapter is asked as in apply_skip_cache, and nothing is written when it is wrong."""
    path = written(tmp_path / "a.pt")
    wrong = Backbone(name="other", lists=(BlockList("layers"),))
    assert "at 'layers' is nothing" in refusal_of(path, kind=AdapterError, adapter=wrong)


# Folders


@pytest.fixture
def folder(tmp_path) -> Path:
    return convert_skip_dit(written(tmp_path / "a.pt"), tmp_path / "out", **told("skip-dit"))


def edited(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), r"is of None"),
        (lambda f: edited(f, _class_name="os.system"), r"is of 'os\.system', and known here are"),
        (lambda f: edited(f, _class_name=[]), r"is of \[\], and known here are"),
        (lambda f: edited(f, num_layers=5), r"Missing: .*Too many: none"),
        (lambda f: edited(f, num_layers=3), r"Missing: none.*Too many: "),
        (lambda f: edited(f, attention_head_dim=4), r"has shape"),
        (lambda f: edited(f, num_layers="many"), r"can be built as"),
        (lambda f: (f / FILES[2]).unlink(), r"safetensors cannot be read"),
        (lambda f: (f / FILES[2]).write_bytes(b"\x00" * 99), r"neither a safetensors file"),
        (lambda f: (f / BRANCH_FILES[0]).write_text("{"), r"json cannot be read"),
        (lambda f: (f / BRANCH_FILES[1]).write_bytes(b"\x00" * 99), r"safetensors cannot be read"),
    ],
)
def test_damaged_folder(spoil, says, folder):
    """Each file of a folder is checked as a checkpoint is."""
    spoil(folder)
    with pytest.raises(BranchFileError, match=says):
        load_skip_dit(folder)


def test_a_folder_is_told_nothing(folder):
    """Its config.json says what the keywords would."""
    with pytest.raises(ConfigError, match=r"config\.json says what .* would. Leave it out"):
        load_skip_dit(folder, num_attention_heads=2)


def test_branches_of_another_model_warn(folder, tmp_path):
    """Branch files beside the weights of another model are noticed."""
    other = {name: -tensor for name, tensor in load_file(folder / FILES[2]).items()}
    save_file(other, folder / FILES[2])
    with pytest.warns(UserWarning, match="its weights differ"):
        load_skip_dit(folder)


# The command


def test_command_converts(tmp_path, capsys):
    """``skipcache convert`` writes the folder, shows a progress bar, and says how to use it."""
    path, out = written(tmp_path / "a.pt", "text-latte"), tmp_path / "out"
    options = ["--num-attention-heads", "2", "--sample-size", "8", "--video-length", "3"]
    assert main(["convert", str(path), str(out), *options, "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr()
    assert f"Wrote {out}: {', '.join(sorted(FILES + BRANCH_FILES))}." in said.out
    assert "reading a.pt: 100%" in said.err
    command = re.search(r"skipcache\.load_skip_dit\('(.*)'\)", said.out)
    model = load_skip_dit(command[1])
    assert (model.dtype, model.config.video_length) == (torch.bfloat16, 3)


def test_command_says_what_is_wrong(tmp_path, capsys):
    """An error of skipcache is one line on stderr and status 1, and no folder."""
    path = written(tmp_path / "a.pt")
    assert main(["convert", str(path), str(tmp_path / "out"), "--num-attention-heads", "3"]) == 1
    assert "skipcache: num_attention_heads is 3" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "b.pt"), str(tmp_path / "out")]) == 1
    assert "b.pt cannot be read" in capsys.readouterr().err
    assert names_of(tmp_path) == ["a.pt"]


def test_loading_is_silent(tmp_path, capfd):
    """Without ``progress`` nothing is printed."""
    load(written(tmp_path / "a.pt"))
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


# The measurement


def test_memory_is_measured_on_such_a_file(tmp_path, capsys):
    """The benchmark's checkpoint is a Skip-DiT, and its step converts it and prints the resident
    memory before and at its peak.
    """
    path, out = tmp_path / "a.pt", tmp_path / "out"
    convert_memory.write_checkpoint(path, width=32, depth=3, classes=CLASSES, side=4)
    convert_memory._main("convert", str(path), str(out), "bfloat16")
    before, peak = map(int, capsys.readouterr().out.split())
    assert 2**20 < before <= peak
    model = load_skip_dit(out)
    assert (model.dtype, model.config.num_layers) == (torch.bfloat16, 3)
    assert model.skip_branches.pairs == ((0, 2),)
