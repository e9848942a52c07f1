from __future__ import annotations

import dataclasses
import gzip
import importlib
import json
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from skipcache import cache_stats, is_skip_cached, skip_cache
from skipcache.cli import main
from skipcache.demo import CLASS_NAMES, MODEL_FOLDER, MOTIONS, TASKS, judge, load_pipeline, run_demo
from skipcache.demo import model as demo_models
from skipcache.demo.model import MODELS, SKIP_MODEL
from skipcache.demo.show import CELL, LINE, MARGIN, TITLE, number_of_methods
from skipcache.demo.tasks import PICTURED, SETTINGS, UNCACHED
from skipcache.errors import ConfigError, SkipCacheError
from skipcache.evaluation.metrics import psnr

EXAMPLES = Path(__file__).parents[1] / "examples"
NEW_MODELS = {
    "c2v": MODELS["class-to-video"],
    "c2v-skip": SKIP_MODEL,
    "t2v": MODELS["text-to-video"],
    "t2i": MODELS["text-to-image"],
}


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def sample(pipeline, seed=0, steps=20):
    return pipeline(
        list(range(10)),
        guidance_scale=2.0,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images


def test_model_is_small_and_half_precision():
    """The model in the wheel is a diffusers folder of at most 30 MB, with safetensors only,
    and its fit of at most 12 MB beside it."""
    files = [path for path in MODEL_FOLDER.rglob("*") if path.is_file()]
    fit = [path for path in files if path.name.startswith("skip_branches.")]
    assert sum(path.stat().st_size for path in fit) <= 12e6
    assert sum(path.stat().st_size for path in files if path not in fit) <= 30e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}


def test_model_is_trained(pipeline):
    """Samples look like their class: nearer to another sample of it than to those of other classes.

    Means over four seeds, so that pose and shade average out; random weights give one grey mush.
    """
    first = sum(sample(pipeline, seed, steps=8) for seed in range(4)) / 4
    second = sum(sample(pipeline, seed, steps=8) for seed in range(4, 8)) / 4
    distance = torch.cdist(first.flatten(1), second.flatten(1))
    matches = (distance.argmin(dim=1) == torch.arange(10)).sum()
    assert matches >= 8
    assert first.std() > 0.2


def test_cached_pictures_are_near_the_uncached_ones(pipeline):
    """The default stays above 35 dB to the uncached pictures, and reuses on every other step."""
    expected = sample(pipeline, steps=50)
    with skip_cache(pipeline):
        found = sample(pipeline, steps=50)
        stats = cache_stats(pipeline)
    assert 35 < psnr(found, expected) < 80
    assert stats.plan == "Fr" * 25
    assert stats.layers_run == 25 * 18 + 25 * 2


def test_demo_measures_every_method(pipeline):
    """Each setting is run, counted and pictured, and the pipeline is left uncached."""
    plain = set(vars(pipeline.transformer.transformer_blocks))
    ticks = []
    result = run_demo(steps=6, repeats=1, pipeline=pipeline, progress=lambda: ticks.append(1))
    assert set(result.images) == set(result.seconds) == {UNCACHED, *SETTINGS}
    assert len(ticks) == 2 * number_of_methods()
    assert all(images.shape == (10, 1, 32, 32) for images in result.images.values())
    assert result.stats[UNCACHED] is None
    assert result.stats["interval 3"].plan == "FrrFrr"
    assert len(result.table().splitlines()) == 2 + number_of_methods()
    assert set(vars(pipeline.transformer.transformer_blocks)) == plain
    assert not is_skip_cached(pipeline)


def test_demo_command_prints_a_table_and_writes_a_picture(tmp_path, capsys):
    """The command ends with the table on stdout and a PNG of the size that its rows need."""
    out = tmp_path / "new" / "demo.png"
    assert main(["demo", "--steps", "6", "--repeats", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for name in (UNCACHED, *SETTINGS):
        assert f"| {name}" in printed
    picture = Image.open(out)
    rows = 2 * len(PICTURED) - 1
    assert picture.size == (MARGIN + CELL * len(CLASS_NAMES), TITLE + CELL * rows)
    assert len(picture.getcolors(256)) > 50


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--steps", "0"], "at least 1"),
        (["--repeats", "-1"], "at least 1"),
        (["--steps", "many"], "invalid"),
        (["--sed", "1", "--step"], "expected one argument"),
        (["--task", "text-to-music"], "invalid choice"),
    ],
)
def test_demo_refuses_bad_arguments(arguments, expected, capsys):
    """Wrong arguments end at once with what is wrong."""
    with pytest.raises(SystemExit):
        main(["demo", *arguments])
    assert expected in capsys.readouterr().err


def test_demo_says_where_it_cannot_write(tmp_path, capsys):
    """A path that cannot be written fails before anything is sampled."""
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "demo.png")]) == 1
    assert "skipcache:" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "demo.doc")]) == 1
    assert "ending" in capsys.readouterr().err


# The other tasks: their recipes pack models of random weights


@contextmanager
def recipe(folder: str) -> Iterator[None]:
    """Its scripts can be imported, and are forgotten afterwards: recipes share names."""
    path, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(EXAMPLES / folder))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - known:
            if EXAMPLES in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
                del sys.modules[name]


def write_checkpoint(model: nn.Module, path: Path) -> None:
    """A checkpoint such as the training writes, with weights that make every layer matter."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.04)
    state = EMAModel([p for p in model.parameters() if p.requires_grad]).state_dict()
    torch.save({"ema": state, "step": 7, "seconds": 1.0}, path)


def pack(script: ModuleType, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pack.py", *arguments])
        script.main()


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> dict[str, Path]:
    """Folders of all four models, written by the scripts that pack the trained ones."""
    pytest.importorskip("transformers", reason="text encoders need transformers (extra: text)")
    if not EXAMPLES.is_dir():
        pytest.skip("the recipes are not here")
    root = tmp_path_factory.mktemp("packed")
    vae = str(MODEL_FOLDER / "vae")
    torch.manual_seed(0)
    with recipe("fashion_video"):
        c2v, t2v = importlib.import_module("train_c2v"), importlib.import_module("train_t2v")
        for kind, has_branches in (("plain", False), ("skip", True)):
            model = c2v.build_transformer(has_branches=has_branches)
            write_checkpoint(model, root / f"c2v_{kind}_checkpoint.pt")
        parts = {"transformer": t2v.build_transformer(), "text_encoder": t2v.build_text()[1]}
        write_checkpoint(nn.ModuleDict(parts), root / "t2v_checkpoint.pt")
        script = importlib.import_module("pack")
        for kind in ("c2v", "c2v-skip", "t2v"):
            to = str(root / kind)
            pack(script, "--out", str(root), "--kind", kind, "--to", to, "--vae", vae)
    with recipe("fashion_text"):
        hunyuan = importlib.import_module("train_hunyuan")
        model = hunyuan.build_transformer()
        hunyuan.CompactText(model)
        write_checkpoint(model, root / "hunyuan_checkpoint.pt")
        importlib.import_module("train_vae").build_vae().save_pretrained(root / "vae")
        pack(importlib.import_module("pack"), "--out", str(root), "--to", str(root / "t2i"))
    return {kind: root / kind for kind in NEW_MODELS}


@pytest.fixture
def demo_of_random(packed, monkeypatch) -> None:
    """Lets the demo find those folders."""
    for task, kind in (
        ("class-to-video", "c2v"),
        ("text-to-video", "t2v"),
        ("text-to-image", "t2i"),
    ):
        monkeypatch.setitem(MODELS, task, dataclasses.replace(MODELS[task], folder=packed[kind]))
    skip = dataclasses.replace(SKIP_MODEL, folder=packed["c2v-skip"])
    monkeypatch.setattr(demo_models, "SKIP_MODEL", skip)


def check_folder(folder: Path) -> int:
    """An ordinary diffusers folder in half precision; its size in bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    assert "skipcache project" in (folder / "README.md").read_text()
    for path in folder.glob("*/config.json"):
        assert "_name_or_path" not in json.loads(path.read_text())
    weights = [path for path in folder.glob("*/*.safetensors") if path.stem != "recipe"]
    for path in weights:
        kinds = {tensor.dtype for tensor in load_file(path).values()}
        assert kinds <= {torch.float16, torch.int64}, path
    return sum(path.stat().st_size for path in files)


def test_packed_folders_are_small_and_half_precision(packed):
    """What the recipes pack is half precision, tells no path, and stays below 35 MB together."""
    assert 20e6 < sum(check_folder(folder) for folder in packed.values()) <= 35e6
    assert (packed["c2v-skip"] / "transformer" / "skip_branches.safetensors").is_file()
    assert not (packed["c2v"] / "transformer" / "skip_branches.json").exists()
    index = json.loads((packed["c2v"] / "model_index.json").read_text())
    assert index["_class_name"] == "LatteClassPipeline"
    for kind in ("c2v", "c2v-skip"):
        assert "LatteClassPipeline.from_pretrained" in (packed[kind] / "README.md").read_text()


@pytest.mark.parametrize("kind", NEW_MODELS)
def test_shipped_folders_are_as_packed(kind):
    """A model that comes with skipcache is a folder such as the recipe packs."""
    folder = NEW_MODELS[kind].folder
    if not folder.is_dir():
        pytest.skip(f"{folder.name} is not built: python {NEW_MODELS[kind].recipe}")
    assert check_folder(folder) <= 25e6


@pytest.mark.parametrize(
    ("task", "has_branches", "kind", "preset"),
    [
        ("class-to-video", False, "LatteClassPipeline", None),
        ("class-to-video", True, "LatteClassPipeline", "skip-dit/latte-c2v"),
        ("text-to-image", False, "HunyuanDiTPipeline", "skip-dit/hunyuan"),
        ("text-to-video", False, "LattePipeline", None),
    ],
)
def test_models_load_in_fp32_and_have_their_adapter(
    task, has_branches, kind, preset, demo_of_random
):
    """Each loads as its class in fp32, and the cache picks the preset of a model with skips."""
    pipeline = load_pipeline(task=task, has_branches=has_branches)
    assert type(pipeline).__name__ == kind
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.float32}
    assert hasattr(pipeline.transformer, "skip_branches") == has_branches
    with skip_cache(pipeline):
        assert cache_stats(pipeline).preset == preset


def test_packed_tokenizers_are_those_of_the_training(packed):
    """Every caption is cut into the same tokens as in training, without a word unknown."""
    video = load_pipeline(packed["t2v"], task="text-to-video")
    text = load_pipeline(packed["t2i"], task="text-to-image")
    with recipe("fashion_video"):
        captions = importlib.import_module("motions").all_captions()
        tokenizer, _ = importlib.import_module("train_t2v").build_text()
    assert video.tokenizer(captions).input_ids == tokenizer(captions).input_ids
    assert video.tokenizer.unk_token_id not in chain(*tokenizer(captions).input_ids)
    with recipe("fashion_text"):
        captions, _ = importlib.import_module("captions").all_captions()
        bert, _, t5, _ = importlib.import_module("train_hunyuan").build_text()
    for found, expected in ((text.tokenizer, bert), (text.tokenizer_2, t5)):
        ids = expected(captions).input_ids
        assert found(captions).input_ids == ids
        assert found.unk_token_id not in chain(*ids)


def test_packed_hunyuan_predicts_what_was_trained(packed):
    """On the pipeline's 333 tokens it predicts what the training computed from 33 of them."""
    pipeline = load_pipeline(packed["t2i"], task="text-to-image")
    with recipe("fashion_text"):
        hunyuan = importlib.import_module("train_hunyuan")
        text = {name: tensor[[5, 300]] for name, tensor in hunyuan.encode_captions().items()}
        rotary = hunyuan.rotary_embedding()
        model = hunyuan.build_transformer()
        compact = hunyuan.CompactText(model)
        weights = pipeline.transformer.state_dict()
        weights["text_embedding_padding"] = weights["text_embedding_padding"][:1]
        model.load_state_dict(weights)
        latents, timestep = torch.randn(2, 16, 4, 4), torch.tensor([900.0, 300.0])
        names = ("bert", "bert_mask", "t5", "t5_mask")
        with torch.no_grad():
            trained = compact(latents, timestep, *(text[name] for name in names), rotary)
            found = pipeline.transformer(
                latents,
                timestep,
                encoder_hidden_states=text["bert"],
                text_embedding_mask=text["bert_mask"],
                encoder_hidden_states_t5=text["t5"],
                text_embedding_mask_t5=text["t5_mask"],
                image_rotary_emb=rotary,
                return_dict=False,
            )[0]
    assert trained.std() > 0.01
    torch.testing.assert_close(found, trained, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("task", ["text-to-image", "text-to-video"])
def test_prompts_and_negative_prompts_reach_the_model(task, demo_of_random):
    """Batches and single prompts run; another prompt or negative prompt makes another sample."""
    pipeline = load_pipeline(task=task)
    options = {name: value for name, value in TASKS[task].call.items() if name != "prompt"}

    def run(prompt, negative_prompt):
        return pipeline(
            prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            return_dict=False,
            **options,
        )[0]

    both = run(["a bag", "a coat"], ["a shirt", ""])
    assert len(both) == 2
    assert len(run("a bag", "a shirt")) == 1
    other = run(["a bag", "a dress"], ["a coat", ""])
    changes = (both - other).flatten(1).abs().amax(1)
    assert changes[0] > 1e-5  # by its negative prompt
    assert changes[1] > 1e-5  # by its prompt


def test_tasks_ask_for_what_the_models_know():
    """Every task has a model, one caption a sample, and clips whose labels are in range."""
    assert TASKS.keys() == MODELS.keys()
    for task in TASKS.values():
        (asked,) = [value for value in task.call.values() if isinstance(value, list)]
        assert len(asked) == len(task.captions)
        assert set(task.pictured) <= set(task.methods)
        assert {method.baseline for method in task.methods.values()} <= set(task.methods)
    video = TASKS["class-to-video"]
    for label, caption in zip(video.call["class_labels"], video.captions, strict=True):
        item, motion = divmod(label, len(MOTIONS))
        assert caption == f"{CLASS_NAMES[item]} {MOTIONS[motion]}"


def test_captions_of_the_demo_are_captions_of_the_training():
    """The prompts that the demo shows are ones that the recipes make."""
    pytest.importorskip("transformers", reason="the recipes need transformers (extra: text)")
    if not EXAMPLES.is_dir():
        pytest.skip("the recipes are not here")
    with recipe("fashion_video"):
        motions = importlib.import_module("motions")
        known = set(motions.all_captions())
    assert {prompt.lower() for prompt in TASKS["text-to-video"].call["prompt"]} <= known
    with recipe("fashion_text"):
        known = set(importlib.import_module("captions").all_captions()[0])
    assert set(TASKS["text-to-image"].call["prompt"]) <= known


def shorten(task: str, count: int, monkeypatch) -> None:
    """Lets the demo of a task sample fewer."""
    full = TASKS[task]
    call = {k: v[:count] if isinstance(v, list) else v for k, v in full.call.items()}
    short = dataclasses.replace(full, captions=full.captions[:count], call=call)
    monkeypatch.setitem(TASKS, task, short)


@pytest.mark.parametrize("task", ["class-to-video", "text-to-image", "text-to-video"])
def test_demo_shows_every_task(task, demo_of_random, monkeypatch, tmp_path, capsys):
    """The command measures every method of the task, and draws samples of each pictured one."""
    shorten(task, 2, monkeypatch)
    methods, pictured = TASKS[task].methods, TASKS[task].pictured
    out = tmp_path / TASKS[task].picture
    assert main(["demo", "--task", task, "--steps", "2", "--repeats", "1", "--out", str(out)]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert [row[0] for row in rows] == list(methods)
    for row, method in zip(rows, methods.values(), strict=True):
        assert (row[4] == "-") == (method.options is None)
    lines = len(pictured) + sum(methods[name].options is not None for name in pictured)
    with Image.open(out) as picture:
        assert getattr(picture, "n_frames", 1) == (8 if task.endswith("video") else 1)
        assert picture.width == MARGIN + CELL * 2
        assert picture.height - TITLE - CELL * lines in (0, LINE, 2 * LINE)


def test_demo_compares_each_model_with_its_own_uncached_clips(demo_of_random, monkeypatch):
    """Class-to-video measures two models, both by the preset of the paper's code."""
    shorten("class-to-video", 1, monkeypatch)
    result = run_demo(task="class-to-video", steps=6, repeats=1)
    plain, skip = result.images["plain, uncached"], result.images["Skip-DiT, uncached"]
    assert plain.shape == skip.shape == (1, 8, 32, 32)
    assert not torch.equal(plain, skip)
    for name in ("Skip-DiT, interval 3, hold", "plain, interval 3, hold"):
        assert result.stats[name].preset == "skip-dit/latte-c2v"
        assert result.stats[name].plan == "FrrFrr"
    assert result.stats["plain, interval 3"].preset is None
    rows = {line.split("|")[1].strip(): line.split("|")[5] for line in result.table().splitlines()}
    for name, method in TASKS["class-to-video"].methods.items():
        if method.options is not None:
            expected = psnr(result.images[name], result.images[method.baseline])
            assert float(rows[name]) == pytest.approx(expected, abs=0.051)


def write_items(folder: Path, split: str, count: int) -> None:
    """Pictures of noise in the files of Fashion-MNIST."""
    values = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8).numpy()
    labels = (torch.arange(count) % 10).to(torch.uint8).numpy()
    for array, name in ((values, "images-idx3"), (labels, "labels-idx1")):
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        file = folder / f"{split}-{name}-ubyte.gz"
        file.write_bytes(gzip.compress(header + array.tobytes(), 1))


@pytest.mark.parametrize(
    ("folder", "arguments", "methods", "questions"),
    [
        (
            "fashion_video",
            ["--task", "class-to-video", "--intervals", "2", "--with-default", "--clips", "128"],
            [
                *("plain, uncached", "plain, N = 2"),
                *("Skip-DiT, uncached", "Skip-DiT, N = 2"),
                "plain, N = 2, taylor(2)",
            ],
            2,
        ),
        (
            "fashion_video",
            ["--task", "text-to-video", "--intervals", "2", "--clips", "128"],
            ["uncached", "interval 2", "interval 2, hold"],
            2,
        ),
        (
            "fashion_text",
            ["--pictures", "128"],
            ["uncached", *list(SETTINGS)[:3], "interval 2, taylor(2)", "interval 3, taylor(2)"],
            5,
        ),
    ],
    ids=["class-to-video", "text-to-video", "text-to-image"],
)
def test_evaluations_judge_every_method(
    folder, arguments, methods, questions, demo_of_random, monkeypatch, tmp_path, capsys
):
    """Each prints reference rows and a row a method: speedup, layers, PSNR, answers, distance."""
    pytest.importorskip("torchmetrics", reason="the judge needs torchmetrics (extra: train)")
    for split in ("train", "t10k"):
        write_items(tmp_path, split, 128)
    small = ["--samples", "4", "--batch-size", "2", "--steps", "2", "--epochs", "1", "--real", "64"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data", str(tmp_path), *arguments, *small])
    with recipe(folder):
        importlib.import_module("evaluate").main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in rows[3:]] == methods
    for row in rows:
        answers = [float(cell) for cell in row[4:-1]]
        assert len(answers) == questions
        assert all(0 <= answer <= 100 for answer in answers)
        assert float(row[-1]) > -0.01
    for row in rows[3:]:
        assert (row[3] == "-") == ("uncached" in row[0])
        assert float(row[1].rstrip("x")) > 0
    assert float(rows[0][-1]) == pytest.approx(0, abs=0.01)  # test pictures beside themselves


def test_judges_are_trained_by_their_recipe(monkeypatch, tmp_path):
    """It writes every judge that comes with skipcache, with the sums of held-out features."""
    pytest.importorskip("torchmetrics", reason="the judge needs torchmetrics (extra: train)")
    for split in ("train", "t10k"):
        write_items(tmp_path, split, 128)
    small = ["--pictures", "128", "--clips", "64", "--real", "64", "--epochs", "1"]
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path), *small]
    monkeypatch.setattr(sys, "argv", ["train_judges.py", *arguments])
    with recipe("fashion_video"):
        importlib.import_module("train_judges").main()
    for name in judge.JUDGES.values():
        sizes = [
            {key: tensor.shape for key, tensor in load_file(folder / f"{name}.safetensors").items()}
            for folder in (judge.FOLDER, tmp_path)
        ]
        assert sizes[0] == sizes[1]
    monkeypatch.setattr(judge, "FOLDER", tmp_path)
    assert {judge.judge_of(task).count for task in TASKS} == {64}


@pytest.mark.parametrize("kind", NEW_MODELS)
def test_missing_model_says_how_to_build_it(kind, monkeypatch, tmp_path, capsys):
    """Without its folder a task fails with the command that packs its model."""
    model = dataclasses.replace(NEW_MODELS[kind], folder=tmp_path / "absent")
    task = next(task for task, known in MODELS.items() if known.pipeline == model.pipeline)
    if kind == "c2v-skip":
        monkeypatch.setattr(demo_models, "SKIP_MODEL", model)
    else:
        monkeypatch.setitem(MODELS, task, model)
        out = str(tmp_path / "demo.gif")
        assert main(["demo", "--task", task, "--out", out]) == 1
        assert "pack.py" in capsys.readouterr().err
    with pytest.raises(SkipCacheError, match=r"python examples/fashion_\w+/pack.py --out runs/"):
        load_pipeline(task=task, has_branches=kind == "c2v-skip")


def test_text_tasks_say_that_they_need_transformers(packed, monkeypatch):
    """Without transformers a text task fails with what to install."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SkipCacheError, match="extra 'text'"):
        load_pipeline(packed["t2v"], task="text-to-video")


def test_unknown_tasks_are_refused():
    """A task that is none is refused with the nearest, and so are branches where there are none."""
    with pytest.raises(ConfigError, match="Did you mean 'text-to-video'"):
        load_pipeline(task="text-to-vido")
    with pytest.raises(ConfigError, match="leave has_branches out"):
        load_pipeline(task="text-to-image", has_branches=True)


# The trained ones


def shipped(task: str, *, has_branches: bool = False):
    model = SKIP_MODEL if has_branches else MODELS[task]
    if not model.folder.is_dir():
        pytest.skip(f"{model.folder.name} is not built: python {model.recipe}")
    if model.needs_text:
        pytest.importorskip("transformers", reason="text encoders need transformers (extra: text)")
    return load_pipeline(task=task, has_branches=has_branches)


def centres(frames: torch.Tensor) -> torch.Tensor:
    """Centre of brightness of pictures [..., 32, 32]: x right and y down, in -1..1."""
    place = torch.linspace(-1, 1, 32)
    weight = frames / frames.sum((-2, -1), keepdim=True).clamp_min(1e-6)
    return torch.stack([(weight.sum(-2) * place).sum(-1), (weight.sum(-1) * place).sum(-1)], -1)


@pytest.mark.parametrize("has_branches", [False, True])
def test_class_to_video_model_moves_items_as_asked(has_branches):
    """Items cross the picture in the direction of their label, plain and Skip-DiT."""
    pipeline = shipped("class-to-video", has_branches=has_branches)
    labels = [item * len(MOTIONS) + motion for item in (1, 8) for motion in range(4)]
    clips = pipeline(
        labels,
        num_inference_steps=15,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames[:, :, 0]
    check_directions(clips)


def test_text_to_video_model_moves_items_as_asked():
    """Items cross the picture in the direction that the caption names."""
    pipeline = shipped("text-to-video")
    options = {k: v for k, v in TASKS["text-to-video"].call.items() if k != "prompt"}
    clips = pipeline(
        [f"a {item} {motion}" for item in ("trouser", "bag") for motion in MOTIONS[:4]],
        num_inference_steps=15,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **options,
    ).frames[:, :, 0]
    check_directions(clips)


def check_directions(clips: torch.Tensor) -> None:
    """Two of each of left, right, up and down, [8, F, 32, 32]; one may go astray."""
    middle = centres(clips)
    travel = middle[:, -1] - middle[:, 0]
    wanted = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]]).repeat(2, 1)
    assert ((travel * wanted).sum(1) > 0.4).sum() >= 7


def test_text_to_image_model_places_items_as_asked():
    """Small items stand where the caption says, and bright ones are brighter than dark ones."""
    pipeline = shipped("text-to-image")
    places = ("on the left", "on the right", "at the top", "at the bottom")
    shades = ("dark", "bright")
    pictures = pipeline(
        [f"a small {shade} bag {place}" for shade in shades for place in places],
        num_inference_steps=15,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        use_resolution_binning=False,
    ).images[:, 0]
    wanted = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]]).repeat(2, 1)
    assert ((centres(pictures) * wanted).sum(1) > 0.2).sum() >= 7
    assert pictures[4:].mean() > 1.5 * pictures[:4].mean()
