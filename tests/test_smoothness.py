"""The smoothness of features and weights: what is measured, written, drawn and refused."""

from __future__ import annotations

import copy
import csv
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import nn

from pipelines import build, inputs_of, surroundings
from skipcache import Backbone, BlockList, add_skip_branches, apply_skip_cache
from skipcache.cli import main
from skipcache.errors import ConfigError, SkipCacheError, TargetError
from skipcache.evaluation.smoothness import Smoothness, measure_smoothness
from skipcache.evaluation.smoothness_plots import plot_smoothness, plot_surfaces, write_smoothness
from skipcache.evaluation.smoothness_surface import (
    Surface,
    filter_direction,
    perturbation_surface,
)

LISTED = Backbone("listed", (BlockList("blocks"),))
STEPS = 4


class Stretch(nn.Module):
    """A layer that doubles the second channel."""

    def forward(self, hidden_states):
        return hidden_states * torch.tensor([1.0, 2.0])


class Drift(nn.Module):
    """A transformer whose features are known: layer l gives (1, 2^(l + 1) speed t).

    The first entry of a batch stands still, the second drifts.
    """

    def __init__(self, speed, layers=3):
        super().__init__()
        self.speed = speed
        self.blocks = nn.ModuleList(Stretch() for _ in range(layers))
        self.head = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.head.weight)

    def forward(self, hidden_states, timestep, sign=1.0):
        features = torch.ones(2, 1, 2)
        features[1, 0, 1] = sign * self.speed * timestep / 1000
        for block in self.blocks:
            features = block(features)
        return (self.head(hidden_states),)


class LoopPipeline:
    """A sampler with a real scheduler: one call of its transformer a step for each sign."""

    def __init__(self, transformer):
        self.transformer = transformer
        self.scheduler = DDIMScheduler()

    def __call__(self, num_inference_steps, signs=(1.0,), generator=None):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(2, 1, 2, generator=generator)
        for t in self.scheduler.timesteps:
            for sign in signs:
                noise = self.transformer(latents, timestep=t, sign=sign)[0]
            latents = self.scheduler.step(noise, t, latents).prev_sample


def tiny(kind: str = "dit", **options):
    """A pipeline of random weights, and what to call it with; the seed is the function's own."""
    pipe = build(kind, layers=4, **options)
    call = inputs_of(kind, STEPS)
    del call["generator"]
    if kind == "latte":
        call["video_length"] = pipe.transformer.config.video_length
    return pipe, call


def read(path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


# Features between steps


def test_features_that_stand_still_have_similarity_one_and_no_change():
    """Constant features: exactly 1 and exactly 0, at every layer and step."""
    measured = measure_smoothness(
        LoopPipeline(Drift(speed=0.0)), {"num_inference_steps": STEPS}, adapter=LISTED
    )
    assert measured.similarity.shape == measured.change.shape == (3, STEPS - 1)
    assert (measured.similarity == 1).all()
    assert (measured.change == 0).all()
    assert measured.times == pytest.approx([0.75, 0.5, 0.25, 0.0], abs=2e-3)


@pytest.mark.parametrize("signs", [(1.0,), (1.0, -3.0)])
def test_linear_drift_has_the_values_of_its_formula(signs):
    """Features (1, g t) turn and grow as trigonometry says; guidance passes are not mixed up.

    One entry of the batch stands still, so the mean is half of the other's.
    """
    call = {"num_inference_steps": STEPS, "signs": signs}
    measured = measure_smoothness(LoopPipeline(Drift(speed=0.7)), call, adapter=LISTED)
    for layer in range(3):
        at = 2 ** (layer + 1) * 0.7 * measured.times
        cosines, changes = [], []
        for sign in signs:
            before, now = sign * at[:-1], sign * at[1:]
            cosines.append((1 + before * now) / np.sqrt((1 + before**2) * (1 + now**2)))
            changes.append(np.abs(before - now) / (1 + np.abs(before)))
        similarity = (1 + np.mean(cosines, axis=0)) / 2
        assert measured.similarity[layer] == pytest.approx(similarity, abs=1e-6)
        assert measured.change[layer] == pytest.approx(np.mean(changes, axis=0) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "last_list"),
    [("dit", "transformer_blocks"), ("latte", "temporal_transformer_blocks")],
)
def test_pipeline_is_measured_as_by_hand(kind, last_list):
    """The values are those of the outputs of each layer's last block, noted by other hooks."""
    pipe, call = tiny(kind)
    seen: list[list[np.ndarray]] = [[] for _ in range(4)]
    for layer, block in enumerate(getattr(pipe.transformer, last_list)):
        block.register_forward_hook(
            lambda module, args, output, layer=layer: seen[layer].append(output.double().numpy())
        )
    measured = measure_smoothness(pipe, call, seed=3)
    for layer, outputs in enumerate(seen):
        assert len(outputs) == STEPS
        for step, (before, now) in enumerate(pairwise(outputs)):
            a, b = before.reshape(len(before), -1), now.reshape(len(now), -1)
            norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            cosine = ((a * b).sum(axis=1) / norms).mean()
            change = (np.abs(b - a).sum(axis=1) / np.abs(a).sum(axis=1)).mean()
            assert measured.similarity[layer, step] == pytest.approx(cosine, abs=1e-6)
            assert measured.change[layer, step] == pytest.approx(change, abs=1e-6)
    assert measured.change.min() > 1e-4  # or the comparison would say nothing


def test_compiled_transformer_gives_the_same_values():
    """Hooks are no part of compiled code, so a compiled model is measured in eager mode."""
    pipe, call = tiny()
    expected = measure_smoothness(pipe, call)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    found = measure_smoothness(pipe, call)
    np.testing.assert_array_equal(found.similarity, expected.similarity)
    assert found.change.shape == (4, STEPS - 1)


def test_seed_decides_and_global_generator_is_left_alone():
    """The same seed gives the same numbers, another seed others; torch's generator stays put."""
    pipe, call = tiny()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (measure_smoothness(pipe, call, seed=seed).change for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4
    assert torch.equal(torch.get_rng_state(), state)


# Perturbed weights


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2, 2)])
def test_direction_has_the_norm_of_every_filter(shape):
    """d[i] = g[i] / |g[i]| |w[i]|, in a plain loop; g is what a weight of unit filters shows."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=draw)
    weight[1] = 0
    ones = torch.ones(shape)
    unit = filter_direction(ones / ones[0].norm(), "some.weight", axis=0, seed=0)
    found = filter_direction(weight, "some.weight", axis=0, seed=0)
    for i, row in enumerate(weight):
        assert unit[i].norm() == pytest.approx(1)
        torch.testing.assert_close(found[i], unit[i] * row.norm())
    assert not found[1].any()


def test_direction_is_gaussian_and_drawn_anew_by_name_axis_and_seed():
    """Directions are independent: their cosines, and the mean of their entries, are near zero."""
    weight = torch.ones(64, 64)
    keys = [("a", 0, 0), ("a", 1, 0), ("a", 0, 1), ("b", 0, 0)]
    drawn = [filter_direction(weight, name, axis, seed).flatten() for name, axis, seed in keys]
    torch.testing.assert_close(filter_direction(weight, "a", 0, 0).flatten(), drawn[0])
    gram = torch.stack(drawn) @ torch.stack(drawn).T / 64**2
    torch.testing.assert_close(gram, torch.eye(4), atol=0.06, rtol=0)
    assert drawn[0].mean().abs() < 0.06
    assert (drawn[0] ** 4).mean() == pytest.approx(3, abs=0.3)  # the kurtosis of a Gaussian


def test_surface_is_that_of_weights_moved_by_hand():
    """Each corner is the cosine of the first four channels, with theta + alpha d + beta e."""
    pipe, call = tiny()
    surface = perturbation_surface(pipe, call, step=1, grid=2, span=0.4, seed=3)
    inputs = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    torch.manual_seed(3)
    pipe(**call, generator=torch.Generator().manual_seed(3))
    handle.remove()
    args, kwargs = inputs[1]

    @torch.no_grad()
    def noise(alpha, beta):
        moved = copy.deepcopy(pipe.transformer)
        for name, module in moved.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                weight, name = module.weight.clone(), f"{name}.weight"
                module.weight += alpha * filter_direction(weight, name, 0, seed=3)
                module.weight += beta * filter_direction(weight, name, 1, seed=3)
        return moved(*args, **kwargs)[0][:, :4].flatten(1)

    plain = noise(0, 0)
    for i, alpha in enumerate((-0.4, 0.4)):
        for j, beta in enumerate((-0.4, 0.4)):
            cosine = torch.cosine_similarity(plain, noise(alpha, beta)).mean()
            assert surface.similarity[i, j] == pytest.approx(cosine.item(), abs=1e-5)
    assert len(np.unique(surface.similarity)) == 4
    assert surface.similarity.max() < 0.999
    assert surface.step == 1
    assert surface.time == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("span", [1.0, 0.03])
def test_unperturbed_model_is_in_the_middle_with_similarity_exactly_one(span):
    """An odd grid holds alpha = beta = 0, exactly, and there the model is itself."""
    call = {"num_inference_steps": 3}
    pipe = LoopPipeline(Drift(speed=1.0))
    surface = perturbation_surface(pipe, call, grid=15, span=span, adapter=LISTED)
    assert surface.alphas[7] == surface.betas[7] == 0
    assert surface.alphas[[0, -1]] == pytest.approx([-span, span])
    assert surface.similarity[7, 7] == 1
    assert (surface.similarity <= 1 + 1e-12).all()
    assert surface.similarity.min() < 1
    assert surface.step == 1  # the middle of three


class Stop(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_surroundings_are_put_back_bit_for_bit(dtype):
    """After a measurement, and after an exception in one, nothing has changed."""
    pipe, call = tiny()
    pipe.to(dtype)
    measure_smoothness(pipe, call)  # the first run of all leaves attributes on the scheduler
    before = copy.deepcopy(pipe.transformer.state_dict())
    around = surroundings(pipe)
    moved = []

    def stop_at_third():
        moved.append(pipe.transformer.proj_out_2.weight.clone())
        if len(moved) == 3:
            raise Stop

    with pytest.raises(Stop):
        perturbation_surface(pipe, call, grid=2, progress=stop_at_third)
    assert not torch.equal(moved[0], moved[1])
    for _ in range(2):
        after = pipe.transformer.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert surroundings(pipe) == around
        perturbation_surface(pipe, call, grid=2)


def test_measurement_that_fails_leaves_nothing_behind():
    """An exception inside the sampling loop takes every hook and tap out again."""
    pipe, call = tiny()
    measure_smoothness(pipe, call)
    around = surroundings(pipe)
    steps = []

    def fail(steps_made):
        steps.append(steps_made)
        raise Stop

    pipe.scheduler.after_step = fail
    for measure in (measure_smoothness, perturbation_surface):
        with pytest.raises(Stop):
            measure(pipe, call)
    assert steps == [1, 1]
    del pipe.scheduler.after_step
    assert surroundings(pipe) == around


# Files and pictures


def test_csv_files_hold_what_was_measured(tmp_path):
    """Parsed back, every row has its indices and, in full precision, its values."""
    pipe, call = tiny()
    features = measure_smoothness(pipe, call)
    surface = perturbation_surface(pipe, call, grid=3)
    rows = read(features.save_csv(tmp_path / "new"))
    assert [(row["layer"], row["step"]) for row in rows] == [
        (layer, step) for layer in range(4) for step in range(1, STEPS)
    ]
    for row in rows:
        layer, step = int(row["layer"]), int(row["step"])
        assert row["time"] == features.times[step]
        assert row["similarity"] == features.similarity[layer, step - 1]
        assert row["relative_l1_change"] == features.change[layer, step - 1]
    rows = read(surface.save_csv(tmp_path / "new"))
    assert [(row["alpha"], row["beta"]) for row in rows] == [
        (alpha, beta) for alpha in (-1, 0, 1) for beta in (-1, 0, 1)
    ]
    assert [row["similarity"] for row in rows] == surface.similarity.flatten().tolist()


def test_new_branches_change_no_number_and_no_pixel(tmp_path):
    """Branches begin as zero, so before and after are the same, and are drawn the same."""
    pipe, call = tiny()
    other = add_skip_branches(tiny()[0])
    written = write_smoothness({"before": pipe, "after": other}, call, tmp_path, grid=3)
    assert [path.name for path in written] == [
        "smoothness-before.csv",
        "surface-before.csv",
        "smoothness-after.csv",
        "surface-after.csv",
        "smoothness.png",
        "surface.png",
    ]
    for what in ("smoothness", "surface"):
        before, after = (tmp_path / f"{what}-{name}.csv" for name in ("before", "after"))
        assert before.read_bytes() == after.read_bytes()
        with Image.open(tmp_path / f"{what}.png") as picture:
            assert picture.width > picture.height  # two columns
    pictures = [
        plot_smoothness({"title": measure_smoothness(each, call)}, tmp_path / f"{name}.png")
        for name, each in {"a": pipe, "b": other}.items()
    ]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_branches_that_work_change_both_measurements():
    """Branches of the paper's form, with random weights, are seen by features and by surface."""
    pipe, call = tiny()
    torch.manual_seed(0)
    other = add_skip_branches(tiny()[0], form="replace")
    features = [measure_smoothness(each, call).change for each in (pipe, other)]
    assert np.abs(features[0] - features[1]).max() > 1e-3
    surfaces = [perturbation_surface(each, call, grid=2).similarity for each in (pipe, other)]
    assert np.abs(surfaces[0] - surfaces[1]).max() > 1e-3


def test_pictures_show_differences_and_missing_values(tmp_path):
    """Values, NaN and infinity can all be drawn, and other values give another picture."""
    times = np.linspace(1, 0, 6)
    shade = np.geomspace(1e-6, 0.5, 20).reshape(4, 5)
    odd = shade.copy()
    odd[0, 0], odd[1, 1], odd[2, 2] = math.nan, math.inf, 0
    files = [
        plot_smoothness({"a": Smoothness(1 - values, values, times)}, tmp_path / f"{i}.png")
        for i, values in enumerate((shade, odd, np.zeros((4, 5))))
    ]
    axis = np.linspace(-1, 1, 5)
    bowl = 1 - 0.5 * (axis[:, None] ** 2 + axis**2)
    for values in (bowl, np.where(bowl < 0.5, math.nan, bowl), np.ones((5, 5))):
        surface = {"a": Surface(axis, axis, values, step=0, time=1.0)}
        files.append(plot_surfaces(surface, tmp_path / f"{len(files)}.png"))
    colours = []
    for file in files:
        with Image.open(file) as picture:
            assert min(picture.size) >= 500
            colours.append(len(picture.convert("RGB").getcolors(picture.width * picture.height)))
    assert min(colours) > 20
    assert len({file.read_bytes() for file in files}) == len(files)


def test_perturbation_that_overflows_is_nan(tmp_path):
    """A model driven to infinity gives NaN in its place, and is drawn all the same."""
    pipe, call = LoopPipeline(Drift(speed=1.0)), {"num_inference_steps": 3}
    surface = perturbation_surface(pipe, call, grid=3, span=3e38, adapter=LISTED)
    assert surface.similarity[1, 1] == 1
    assert np.isnan(surface.similarity[0, 0])
    assert plot_surfaces({"a": surface}, tmp_path / "surface.png").stat().st_size > 1000


# The command


def test_command_writes_its_files(tmp_path, capsys):
    """On the demo model the command prints the names of two CSV files and two pictures."""
    out = tmp_path / "new"
    assert main(["smoothness", "demo", "--steps", "3", "--grid", "2", "--out", str(out)]) == 0
    names = ["smoothness.csv", "surface.csv", "smoothness.png", "surface.png"]
    assert capsys.readouterr().out.split() == [str(out / name) for name in names]
    assert len(read(out / "smoothness.csv")) == 18 * 2
    assert len(read(out / "surface.csv")) == 4


def test_command_compares_with_branches_and_with_a_pipeline(tmp_path, capsys):
    """``--compare`` takes the files of branches, or the folder of a second pipeline."""
    pipe, _ = tiny(scheduler=DDIMScheduler())
    pipe.save_pretrained(tmp_path / "pipe")
    torch.manual_seed(0)
    add_skip_branches(pipe, form="replace").transformer.skip_branches.save_pretrained(
        tmp_path / "branches"
    )
    common = ["--steps", "3", "--grid", "2", "--call", '{"class_labels": [1]}']
    for other, is_same in (("branches", False), ("pipe", True)):
        out = tmp_path / f"with-{other}"
        command = ["smoothness", str(tmp_path / "pipe"), "--compare", str(tmp_path / other)]
        assert main([*command, *common, "--out", str(out)]) == 0
        texts = [(out / f"smoothness-{name}.csv").read_text() for name in ("before", "after")]
        assert (texts[0] == texts[1]) is is_same
    assert "surface-after.csv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demo", "--steps", "1"], "--steps is 1"),
        (["no-such-folder"], "there is no folder 'no-such-folder'"),
        (["empty"], "no model_index.json"),
        (["broken"], "cannot be loaded on 'cpu'"),
        (["headless"], "cannot be loaded on 'cpu'"),
        (["demo", "--device", "cuda:99"], "cannot be loaded on 'cuda:99'"),
        (["demo", "--device", "nonsense"], "cannot be loaded on 'nonsense'"),
        (["demo", "--compare", "empty"], "skip_branches.json"),
        (["demo", "--steps", "2", "--grid", "1"], "grid is 1"),
        (["demo", "--steps", "2", "--span", "nan"], "span is nan"),
        (["demo", "--steps", "2", "--step", "-1"], "step is -1"),
        (["demo", "--steps", "2", "--step", "2", "--grid", "2"], "had 2 steps"),
        (["demo", "--call", '{"class_label": [1]}'], "call does not fit 'DiTPipeline'"),
        (["demo", "--out", "file/folder"], "skipcache: "),
    ],
)
def test_command_refuses(arguments, expected, tmp_path, monkeypatch, capsys):
    """Each bad argument ends with status 1 and says what is wrong, on one line."""
    monkeypatch.chdir(tmp_path)
    for folder, text in {"empty": None, "broken": "{", "headless": "{}"}.items():
        (tmp_path / folder).mkdir()
        if text is not None:
            (tmp_path / folder / "model_index.json").write_text(text)
    (tmp_path / "file").write_text("")
    assert main(["smoothness", *arguments]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "skipcache: " in last
    assert expected in last


@pytest.mark.parametrize("text", ["{", "[1, 2]", "labels"])
def test_command_refuses_what_is_no_json_object(text, capsys):
    """``--call`` that cannot be read is an error of the command line."""
    with pytest.raises(SystemExit, match="2"):
        main(["smoothness", "demo", "--call", text])
    assert "is no JSON" in capsys.readouterr().err


def test_pipeline_with_a_prompt_has_to_be_told_what_to_sample(tmp_path, capsys):
    """Nothing can be guessed for a pipeline that takes a prompt: ``--call`` is asked for."""
    pipe, _ = tiny("latte", scheduler=DDIMScheduler())
    pipe.save_pretrained(tmp_path / "latte")
    assert main(["smoothness", str(tmp_path / "latte"), "--steps", "2"]) == 1
    assert "Pass --call" in capsys.readouterr().err


def test_missing_matplotlib_is_said_before_anything_runs(tmp_path, monkeypatch, capsys):
    """Without matplotlib the error names it, nothing is measured and no folder is made."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["smoothness", "demo", "--out", str(tmp_path / "out")]) == 1
    assert "pictures need matplotlib" in capsys.readouterr().err
    pipe, call = tiny()
    with pytest.raises(SkipCacheError, match="pip install"):
        write_smoothness({"a": pipe}, call, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Refusals


def test_cached_pipeline_is_refused():
    """A reused feature would look smooth."""
    pipe, call = tiny()
    apply_skip_cache(pipe)
    for measure in (measure_smoothness, perturbation_surface):
        with pytest.raises(ConfigError, match="remove_skip_cache"):
            measure(pipe, call)


def test_bare_module_and_wrong_component_are_refused():
    """There is a pipeline or nothing to measure, and its transformers are listed."""
    pipe, call = tiny()
    with pytest.raises(TargetError, match="bare module"):
        measure_smoothness(pipe.transformer, call)
    with pytest.raises(TargetError, match="component='transformer'"):
        measure_smoothness(pipe, call, component="transformer_2")


def test_single_step_is_refused():
    """One step has no neighbour."""
    pipe, call = tiny()
    with pytest.raises(ConfigError, match="two or more"):
        measure_smoothness(pipe, {**call, "num_inference_steps": 1})


@pytest.mark.parametrize("call", [None, [1], "labels"])
def test_call_that_is_no_mapping_is_refused(call):
    """The keywords are asked for, with an example."""
    with pytest.raises(ConfigError, match="keywords of one call"):
        measure_smoothness(tiny()[0], call)


def test_no_pipeline_is_refused(tmp_path):
    """There has to be something to measure."""
    with pytest.raises(ConfigError, match="pipes is empty"):
        write_smoothness({}, {}, tmp_path)


class Untimed:
    """A pipeline without a scheduler, whose transformer tells no time."""

    def __init__(self):
        self.transformer = Drift(speed=1.0)

    def __call__(self, steps):
        for _ in range(steps):
            self.transformer(torch.ones(2, 1, 2), torch.tensor(1.0))


def test_pipeline_that_does_not_tell_its_steps_is_refused():
    """Steps that nobody tells are not guessed."""
    untimed = Backbone("listed", (BlockList("blocks"),), timestep=None)
    with pytest.raises(ConfigError, match="no scheduler that tells"):
        measure_smoothness(Untimed(), {"steps": 2}, adapter=untimed)


def test_weights_that_cannot_be_moved_are_refused():
    """Quantised and absent weights, and a model without any, are named."""
    pipe = LoopPipeline(Drift(speed=1.0))
    call = {"num_inference_steps": 2}
    head = pipe.transformer.head
    head.weight = nn.Parameter(head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"'head\.weight' of 'Drift' is quantised"):
        perturbation_surface(pipe, call, adapter=LISTED)
    pipe.transformer.head = nn.Linear(2, 2, device="meta")
    with pytest.raises(ConfigError, match=r"'head\.weight' of 'Drift' is offloaded"):
        perturbation_surface(pipe, call, adapter=LISTED)
    pipe.transformer.head = nn.Identity()
    with pytest.raises(ConfigError, match="no weights to perturb"):
        perturbation_surface(pipe, call, adapter=LISTED)
