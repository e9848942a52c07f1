import pytest
import torch
from PIL import Image

from skipcache import cache_stats, skip_cache
from skipcache.cli import main
from skipcache.demo import CLASS_NAMES, MODEL_FOLDER, load_pipeline, run_demo
from skipcache.demo.show import CELL, MARGIN, PICTURED, SETTINGS, TITLE, UNCACHED, number_of_methods
from skipcache.evaluation.metrics import psnr


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
    """The model in the wheel is a diffusers folder of at most 30 MB, with safetensors only."""
    files = [path for path in MODEL_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30e6
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
    result = run_demo(steps=4, repeats=1, pipeline=pipeline, progress=lambda: ticks.append(1))
    assert set(result.images) == set(result.seconds) == {UNCACHED, *SETTINGS}
    assert len(ticks) == 2 * number_of_methods()
    assert all(images.shape == (10, 1, 32, 32) for images in result.images.values())
    assert result.stats[UNCACHED] is None
    assert result.stats["interval 3"].plan == "FrrF"
    assert len(result.table().splitlines()) == 2 + number_of_methods()
    assert set(vars(pipeline.transformer.transformer_blocks)) == plain


def test_demo_command_prints_a_table_and_writes_a_picture(tmp_path, capsys):
    """The command ends with the table on stdout and a PNG of the size that its rows need."""
    out = tmp_path / "new" / "demo.png"
    assert main(["demo", "--steps", "3", "--repeats", "1", "--out", str(out)]) == 0
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
