"""The benchmark: its measures by hand-made cases, its cells, what a stop or an error leaves."""

from __future__ import annotations

import contextlib
import json
import math

import numpy
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from pipelines import build
from skipcache.cli import main
from skipcache.demo.captions import PICTURE_ANSWERS, PLACES, spread_clips, spread_pictures
from skipcache.demo.judge import judge_of
from skipcache.errors import ConfigError
from skipcache.evaluation.bench import quality
from skipcache.evaluation.bench.grid import all_methods, fewer_steps, own_methods
from skipcache.evaluation.bench.methods import (
    UNCACHED,
    Method,
    Unavailable,
    fewer_steps_method,
    skip_cache_method,
)
from skipcache.evaluation.bench.pictures import save_picture
from skipcache.evaluation.bench.results import Cell, Results, Spread
from skipcache.evaluation.bench.run import Plan, run_bench
from skipcache.evaluation.bench.subjects import (
    Features,
    Subject,
    load_subject,
    reference_features,
)
from skipcache.evaluation.bench.tracks import track_of

pytest.importorskip("torchmetrics")

STEPS = 6


def subject(**changes) -> Subject:
    """A tiny DiT pipeline that is asked for three classes."""
    call = {"num_inference_steps": STEPS, "guidance_scale": 1.5}
    given = {"argument": "class_labels", "asked": [1, 2, 3], "captions": ["a", "b", "c"]}
    return Subject("tiny", build("dit"), **{"call": call, "batch_size": 2, **given, **changes})


PLAN = Plan(samples=3, judged=4, repeats=2, shown=2)
HOLD = skip_cache_method(
    "interval 3", "hold", interval=3, estimator="hold", window=(1.0, 0.0), adapter="dit_xl"
)


def failing(when: str) -> Method:
    """A method that breaks on entering, or after it, like a rival would."""

    @contextlib.contextmanager
    def applied(pipeline, steps):
        if when == "unavailable":
            raise Unavailable("it knows no DiT")
        if when == "entering":
            raise RuntimeError("no such blocks\nand more")
        yield
        raise torch.OutOfMemoryError("out of memory")

    return Method("diffusers", "Broken", when, applied=applied, spoils_pipeline=True)


# Measures.


def test_psnr_of_a_known_error():
    """A constant error of 0.1 is 20 dB, in every sample; equal ones count as 200 dB."""
    reference = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.8
    found = quality.psnr_of(reference + 0.1, reference)
    assert found.values == pytest.approx((20.0, 20.0), abs=1e-3)
    assert quality.psnr_of(reference, reference).values == (200.0, 200.0)


def test_psnr_is_not_computed_on_rounded_pictures():
    """Errors below one grey level count: rounding to uint8 would make these equal."""
    reference = torch.full((1, 1, 8, 8), 0.5)
    assert quality.psnr_of(reference + 1e-4, reference).mean == pytest.approx(80.0, abs=0.1)


def test_ssim_agrees_with_a_computation_by_hand():
    """Of two constant pictures only the luminance term is left: (2 ab + c1) / (a2 + b2 + c1)."""
    one, other = torch.full((1, 1, 16, 16), 0.3), torch.full((1, 1, 16, 16), 0.6)
    due = (2 * 0.3 * 0.6 + 0.01**2) / (0.3**2 + 0.6**2 + 0.01**2)
    assert quality.ssim_of(one, other).mean == pytest.approx(due, abs=1e-3)
    clip = torch.rand(1, 4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert quality.ssim_of(clip, clip).mean == pytest.approx(1.0, abs=1e-6)


def test_latent_error_is_relative():
    """||a - b|| / ||b|| of each sample by itself."""
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    found = torch.tensor([[3.0, 4.5], [0.0, 1.0]])
    assert quality.latent_error_of(found, reference).values == pytest.approx((0.1, 0.5))


def test_frechet_distance_is_exact_for_known_gaussians():
    """Sets with exact means and covariances: |m1 - m2|^2 + sum (s1 - s2)^2 for diagonal ones."""
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()
    unit = corners * (3 / 4) ** 0.5  # sample covariance: the identity
    one, other = unit * torch.tensor([2.0, 1.0]) + 1, unit * torch.tensor([1.0, 3.0])
    real = Features(lambda x: x, other.sum(0), other.T @ other, len(other))
    due = (1 + 1) + (2 - 1) ** 2 + (1 - 3) ** 2
    assert quality.frechet_distance(one, real) == pytest.approx(due, rel=1e-6)


def test_frechet_drift_of_the_same_features_is_nothing():
    """A method that changes no sample drifts by 0, with an interval of no width."""
    features = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
    real = Features(lambda x: x, features.sum(0), features.T @ features, 20)
    base = quality.frechet_distance(features, real), quality.bootstrap_distances(features, real)
    found = quality.frechet_of(features, *base, real)
    assert (found.drift, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-6)
    moved = quality.frechet_of(features + 1, *base, real)
    assert moved.low <= moved.drift <= moved.high
    assert moved.drift == pytest.approx(3.0, abs=0.2)


def test_spread_of_one_value_is_zero():
    """No spread is made up where there is one sample."""
    assert quality.spread_of([2.0]) == Spread((2.0,), 2.0, 0.0)
    assert quality.spread_of([1.0, 3.0]).deviation == pytest.approx(math.sqrt(2))


def test_reference_features_are_those_of_the_pictures(tmp_path):
    """Sums over all pictures of a folder, by the function given."""
    for i, level in enumerate((0, 255)):
        array = numpy.full((4, 4, 3), level, dtype=numpy.uint8)
        Image.fromarray(array).save(tmp_path / f"{i}.png")
    found = reference_features(tmp_path, lambda pictures: pictures.mean((2, 3)))
    assert found.real_count == 2
    assert found.real_sum.tolist() == [1.0, 1.0, 1.0]
    (tmp_path / "1.png").unlink()
    with pytest.raises(ConfigError, match="two or more"):
        reference_features(tmp_path, lambda pictures: pictures)


@pytest.mark.parametrize(
    ("task", "size", "questions"),
    [
        ("class-to-image", (1, 32, 32), 1),
        ("text-to-image", (1, 32, 32), 5),
        ("class-to-video", (8, 1, 32, 32), 2),
        ("text-to-video", (8, 1, 32, 32), 2),
    ],
)
def test_judge_of_the_demo_knows_its_pictures(task, size, questions):
    """The classifier that comes with the demo gives 64 features and an answer to each question."""
    judge = judge_of(task)
    pictures = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    assert judge.features(pictures).shape == (3, 64)
    assert judge.answers(pictures).shape == (3, questions)
    assert judge.count == 10000


@pytest.mark.parametrize("task", ["text-to-image", "text-to-video"])
def test_text_models_show_what_the_judge_reads(task):
    """Different captions are asked for, and what is sampled shows all that most of them say."""
    pytest.importorskip("transformers", reason="text encoders need transformers (extra: text)")
    asked = load_subject(task, steps=10, batch_size=8)
    assert len(set(asked.asked[:8])) == 8
    assert asked.captions == asked.asked
    pictures = asked.pipeline(**asked.call_of(range(8), 0), output_type="pt", return_dict=False)[0]
    right = asked.is_right(torch.as_tensor(pictures).float(), range(8))
    assert right.sum() >= 3  # by chance it would be one of 80 or more
    wrong = asked.is_right(torch.as_tensor(pictures).float(), range(1, 9))
    assert wrong.sum() < right.sum()


def test_captions_are_spread_like_the_training_pictures():
    """All classes and shades alike, half of the items large, these in the middle."""
    found = torch.tensor(spread_pictures(400))
    for part, answers in zip(found.T, PICTURE_ANSWERS, strict=True):
        counts = part.bincount(minlength=len(answers))
        if len(answers) == len(PLACES):
            assert counts.tolist() == [240, 40, 40, 40, 40]
        else:
            assert (counts == 400 // len(answers)).all()
    assert (found[found[:, 1] == 1, 2] == 0).all()
    assert len(set(spread_clips(80))) == 80
    few = torch.tensor(spread_clips(40))
    assert len(few[:, 0].unique()) == 10
    assert len(few[:, 1].unique()) == 8


# Cells.


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Results, object]:
    out = tmp_path_factory.mktemp("bench")
    methods = [HOLD, fewer_steps_method(3), failing("unavailable"), failing("entering")]
    methods += [failing("after"), skip_cache_method("interval 1", interval=1)]
    return run_bench(subject(), methods, out, PLAN, command=("skipcache", "bench")), out


def cell(results: Results, family: str, setting: str) -> Cell:
    return next(c for c in results.cells if (c.family, c.setting) == (family, setting))


def test_cells_say_what_was_measured(results):
    """Speed as the median ratio of turns, layers counted, quality with a spread, pictures saved."""
    found, out = results
    hold = cell(found, "skipcache", "interval 3")
    assert hold.status == "ok"
    ratios = [b / s for b, s in zip(hold.baseline_seconds, hold.seconds, strict=True)]
    assert len(ratios) == PLAN.repeats
    assert hold.speedup == pytest.approx(sorted(ratios)[0] / 2 + sorted(ratios)[1] / 2)
    assert (hold.speedup_low, hold.speedup_high) == (min(ratios), max(ratios))
    assert hold.layers_total == 6 * STEPS
    assert hold.layers_run == 6 * 2 + 2 * 4
    assert hold.ran == ("111111", "100001", "100001") * 2
    assert hold.cache_bytes > 0
    assert len(hold.psnr.values) == PLAN.samples
    assert hold.psnr.mean < 100
    assert hold.is_repeatable is True
    assert all((out / name).stat().st_size > 0 for name in hold.pictures)
    assert len(hold.pictures) == PLAN.shown


def test_uncached_cell_comes_first_and_is_its_own_reference(results):
    """Identical samples, a speedup of 1, every layer."""
    first = results[0].cells[0]
    assert first.family == "uncached"
    assert first.psnr.mean == 200.0
    assert first.latent_error.mean == 0.0
    assert first.speedup == 1.0
    assert set(first.ran) == {"111111"}


def test_never_reusing_is_told_as_identical(results):
    """A cache that refreshes at every step leaves every sample as it was."""
    assert cell(results[0], "skipcache", "interval 1").psnr.values == (200.0,) * PLAN.samples


def test_fewer_steps_run_fewer_calls(results):
    """Three steps are three calls of the transformer, and other samples."""
    found = cell(results[0], "fewer steps", "3 steps")
    assert len(found.ran) == 3
    assert found.layers_run == 18
    assert found.psnr.mean < 100


@pytest.mark.parametrize(
    ("setting", "status", "message"),
    [
        ("unavailable", "unavailable", "it knows no DiT"),
        ("entering", "failed", "RuntimeError: no such blocks"),
        ("after", "failed", "OutOfMemoryError: out of memory"),
    ],
)
def test_a_method_that_breaks_is_one_cell(results, setting, status, message):
    """It says why, and the others are measured all the same."""
    found = cell(results[0], "diffusers", setting)
    assert (found.status, found.message) == (status, message)
    assert found.speedup is None
    assert cell(results[0], "skipcache", "interval 3").speedup is not None


def test_file_reads_back_as_it_was_written(results):
    """JSON and back: the same results; the CSV has a line a cell."""
    found, out = results
    assert Results.load(out) == found
    lines = (out / "results.csv").read_text().splitlines()
    assert len(lines) == len(found.cells) + 1
    assert lines[0].startswith("family,method,setting,status,message,speedup")
    assert found.machine["threads"] == torch.get_num_threads()
    assert found.versions["torch"] == torch.__version__
    assert found.command == ("skipcache", "bench")


def test_a_finished_benchmark_measures_nothing_again(results, monkeypatch):
    """Run again, everything is taken from the file."""
    found, out = results
    again = subject()
    methods = [HOLD, fewer_steps_method(3), skip_cache_method("interval 1", interval=1)]
    monkeypatch.setattr(type(again.pipeline), "__call__", None)
    assert run_bench(again, methods, out, PLAN).cells == found.cells


def test_stopped_run_goes_on_where_it_was(tmp_path):
    """Ctrl-C in the second cell keeps the first, and the next run samples the rest only."""

    @contextlib.contextmanager
    def interrupted(pipeline, steps):
        if not resumed:
            raise KeyboardInterrupt
        with HOLD.applied(pipeline, steps):
            yield

    resumed: list[bool] = []
    second = Method("skipcache", "second", "stopped", applied=interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_bench(subject(), [HOLD, second], tmp_path, PLAN)
    kept = Results.load(tmp_path)
    assert [c.method for c in kept.cells] == ["uncached", "hold"]
    resumed.append(True)
    done: list[str] = []
    found = run_bench(subject(), [HOLD, second], tmp_path, PLAN, progress=done.append)
    assert done[0] == "skipcache second stopped"
    assert found.cells[1].psnr == kept.cells[1].psnr
    assert found.cells[2].psnr == found.cells[1].psnr
    assert all(len(c.seconds) >= PLAN.repeats for c in found.cells)


def test_folder_of_something_else_is_left_alone(results):
    """Results of another number of steps are not mixed with these."""
    found, out = results
    other = subject(call={"num_inference_steps": 3, "guidance_scale": 1.5})
    with pytest.raises(ConfigError, match="something else"):
        run_bench(other, [HOLD], out, PLAN)
    assert Results.load(out) == found


def test_not_repeatable_method_is_flagged(tmp_path):
    """Pictures of one seed that differ between two runs are told."""

    @contextlib.contextmanager
    def drifting(pipeline, steps):
        block = pipeline.transformer.transformer_blocks[3]
        handle = block.register_forward_hook(
            lambda module, args, output: output + 0.1 * torch.randn_like(output)
        )
        yield
        handle.remove()

    method = Method("diffusers", "Drifting", "", applied=drifting, spoils_pipeline=True)
    found = run_bench(subject(), [method], tmp_path, PLAN)
    assert [c.is_repeatable for c in found.cells] == [True, False]


def test_accuracy_and_distance_come_from_the_subject(tmp_path):
    """What the subject's judge says of all judged samples."""
    features = torch.eye(4).double()
    judged = subject(
        is_right=lambda pictures, indices: torch.tensor([i % 2 == 0 for i in indices]),
        features=Features(
            lambda pictures: pictures.double().flatten(1)[:, :4], features.sum(0), features, 4
        ),
    )
    found = run_bench(judged, [HOLD], tmp_path, PLAN)
    assert [c.accuracy for c in found.cells] == [0.5, 0.5]
    assert found.cells[0].frechet.drift == pytest.approx(0, abs=1e-6)
    assert found.cells[1].frechet.samples == PLAN.judged


# Bad input.


@pytest.mark.parametrize("field", ["samples", "repeats"])
def test_nothing_to_measure_is_refused(field):
    """Zero samples, or no timed run, is an error at once."""
    with pytest.raises(ConfigError, match="At least one"):
        Plan(**{field: 0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no results file"),
        ("[]", "schema None"),
        ('{"schema": "skipcache-bench/9"}', "skipcache-bench/9"),
        ('{"schema": "skipcache-bench/1"}', "incomplete or damaged"),
    ],
)
def test_damaged_or_other_file_is_refused(tmp_path, text, message):
    """What is wrong with the file is said, and what this version reads."""
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Results.load(tmp_path)


def test_missing_results_are_told(tmp_path):
    """Somebody who reports before benchmarking reads what to do first."""
    with pytest.raises(ConfigError, match="Run skipcache bench first"):
        Results.load(tmp_path / "none")


def test_subjects_that_cannot_be(tmp_path):
    """No steps, and a reference set without a function of pictures."""
    with pytest.raises(ConfigError, match="At least one is needed"):
        load_subject("demo", steps=0)
    with pytest.raises(ConfigError, match="needs features"):
        load_subject("demo", reference=str(tmp_path))


# Methods and pictures.


def test_grids_have_no_two_cells_of_one_name():
    """Every method of a grid has a key of its own, ours among them, fewer steps too."""
    for quick in (True, False):
        found = all_methods(subject(), quick=quick, with_rivals=False)
        keys = [Cell(m.family, m.name, m.setting).key for m in [UNCACHED, *found]]
        assert len(set(keys)) == len(keys)
        json.dumps([dict(method.options) for method in found])
    assert len(own_methods()) > len(own_methods(quick=True))
    assert [m.call["num_inference_steps"] for m in fewer_steps(50)] == [33, 25, 17]


def test_track_counts_layers_that_computed(tmp_path):
    """A block whose inner layers do not run did not run, whatever was called."""
    pipe = build("dit")
    track = track_of(pipe.transformer)
    block = pipe.transformer.transformer_blocks[2]
    block.forward = lambda hidden_states, **rest: hidden_states
    with track.following():
        pipe([1], num_inference_steps=2, output_type="pt")
    assert track.ran == ("110111", "110111")


@pytest.mark.parametrize(("shape", "suffix"), [((1, 8, 8), "png"), ((4, 3, 8, 8), "gif")])
def test_pictures_are_files(tmp_path, shape, suffix):
    """A picture is a PNG, a clip a GIF with its frames; small ones are enlarged."""
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    name = save_picture(draw, tmp_path, "pictures/one")
    assert name == f"pictures/one.{suffix}"
    with Image.open(tmp_path / name) as image:
        assert image.size == (256, 256)
        assert getattr(image, "n_frames", 1) == (4 if suffix == "gif" else 1)


# From a shell.


def test_command_on_a_folder(tmp_path, capsys):
    """A pipeline on the disk, our methods alone: a table, results, and status 0."""
    build("dit", scheduler=DDIMScheduler()).save_pretrained(tmp_path / "pipe")
    out = tmp_path / "out"
    command = ["bench", str(tmp_path / "pipe"), "--quick", "--no-rivals", "--steps", "6"]
    command += ["--samples", "2", "--labels", "1", "2", "--out", str(out), "--device", "cpu"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "interval 2" in printed
    assert f"skipcache report {out}" in printed
    assert Results.load(out).subject["captions"] == ["1", "2", "1", "2"]


def test_command_refuses_a_pipeline_without_transformer(tmp_path, capsys):
    """A U-Net pipeline has nothing to cache, and says so."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    assert main(["bench", str(tmp_path / "pipe")]) == 1
    assert "transformer" in capsys.readouterr().err


def test_command_takes_only_the_methods_named(tmp_path, capsys):
    """``--only`` leaves the others out, and names what there is where nothing fits."""
    build("dit", scheduler=DDIMScheduler()).save_pretrained(tmp_path / "pipe")
    command = ["bench", str(tmp_path / "pipe"), "--quick", "--no-rivals", "--steps", "4"]
    command += ["--samples", "1", "--out", str(tmp_path / "out"), "--only"]
    assert main([*command, "skipcache / Skipcache / interval 3"]) == 0
    assert [c.setting for c in Results.load(tmp_path / "out").cells] == ["", "interval 3"]
    assert main([*command, "nothing like it"]) == 1
    assert "fewer steps / fewer steps / 2 steps" in capsys.readouterr().err


def test_compare_writes_one_page(tmp_path, capsys):
    """One command, one file with the pictures inside."""
    pytest.importorskip("jinja2")
    build("dit", scheduler=DDIMScheduler()).save_pretrained(tmp_path / "pipe")
    page = tmp_path / "page.html"
    command = ["compare", str(tmp_path / "pipe"), "--steps", "4", "--samples", "2"]
    assert main([*command, "--labels", "1", "--interval", "3", "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "interval 3" in text
    assert text.count("data:image/png;base64") >= 4
    assert f"Page: {page}" in capsys.readouterr().out
