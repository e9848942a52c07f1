"""A recipe: the model that it is for, the speedups that it gives, and how it is applied."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, DPMSolverMultistepScheduler

from pipelines import build, reference, sample, surroundings, transformer_of
from recipes import recipe_for
from skipcache import SkipCacheConfig, apply_skip_cache, cache_stats, is_skip_cached
from skipcache.errors import ConfigError, RecipeError, RecipeFileError, RecipeWarning


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of good files."""
    return recipe_for().save_pretrained(tmp_path / "good")


# The model that it is for


def test_another_class_is_refused(folder):
    """Both classes are named, and the other pipeline is left alone."""
    pipe = build("latte")
    before = surroundings(pipe)
    with pytest.raises(RecipeError, match=r"DiTTransformer2DModel.*LatteTransformer3DModel"):
        apply_skip_cache(pipe, recipe=folder)
    assert surroundings(pipe) == before


def test_other_weights_are_warned_of():
    """A model of the same class with other weights gets the recipe, and a warning."""
    with pytest.warns(RecipeWarning, match="another 'DiTTransformer2DModel'.*weights differ"):
        pipe = apply_skip_cache(build("dit", seed=1), recipe=recipe_for())
    assert is_skip_cached(pipe)


def test_schedulers():
    """Another type of prediction is refused, another scheduler warned of; a bare transformer has
    none to check.
    """
    found, own = recipe_for(), transformer_of("dit")
    found.check_for(own)
    found.check_for(own, build("dit").scheduler)
    with pytest.raises(RecipeError, match="'epsilon', and this scheduler takes 'v_prediction'"):
        found.check_for(own, DDIMScheduler(prediction_type="v_prediction"))
    with pytest.raises(RecipeError, match="takes None"):
        found.check_for(own, object())
    with pytest.warns(RecipeWarning, match="CallingScheduler, and this is DPMSolverMultistep"):
        found.check_for(own, DPMSolverMultistepScheduler())


# Speedups


@pytest.mark.parametrize("speedup", [0.99, 0, -1, math.nan, math.inf, True, "2", None, [2]])
def test_speedups_that_cannot_be(speedup):
    """What is no factor from 1 is refused by name, wherever it is asked for."""
    for asked in (recipe_for().at, recipe_for().predicted_error):
        with pytest.raises(ConfigError, match="It is a factor from 1") as caught:
            asked(speedup)
        assert f"speedup is {speedup!r}" in str(caught.value)


@pytest.mark.parametrize("reuse_cost", [0.0, 0.01, 0.3])
def test_the_highest_speedup(reuse_cost):
    """Two refreshes, that is; it can be asked for, and what is above it names it."""
    found = replace(recipe_for(), reuse_cost=reuse_cost)
    assert found.highest_speedup == pytest.approx(8 / (2 + 6 * reuse_cost))
    config = found.at(found.highest_speedup)
    assert isinstance(config, SkipCacheConfig)
    assert sum(config.schedule.plan(found.statistics.times)) == 2
    with pytest.raises(ConfigError, match=rf"out of reach.* {found.highest_speedup:.2f}, at a"):
        found.at(found.highest_speedup + 0.01)


def test_the_highest_speedup_is_taken_without_a_warning():
    """What is in reach at the steps that were calibrated is applied and run there without a word,
    whatever it would be at others.
    """
    times = tuple(1 - i / 26 for i in range(26))
    known = replace(recipe_for().statistics.at(times), effects=np.full(26, -1 / 26))
    found = replace(recipe_for(), statistics=known, reuse_cost=0.0, points=())
    assert found.highest_speedup == 13
    pipe = apply_skip_cache(build("dit"), recipe=found, speedup=13)
    sample(pipe, 26)
    assert cache_stats(pipe).refreshed == 2


def test_predicted_errors():
    """None at a speedup of 1, more at the highest than at 2, and known for other steps as well."""
    found = recipe_for()
    assert found.predicted_error(1) == 0
    assert 0 < found.predicted_error(2.0) < found.predicted_error(found.highest_speedup)
    assert found.predicted_error(2.0, steps=21) > 0
    with pytest.raises(ConfigError, match="at least three"):
        found.predicted_error(2.0, steps=2)


def test_measured_points_are_run():
    """The plan that a point was measured with is the one that is run at its steps, and a further
    plan takes its place.
    """
    found = recipe_for()
    times = found.statistics.times
    assert np.flatnonzero(found.at(1.9).schedule.plan(times)).tolist() == [0, 2, 3, 6]
    other = found.with_plan((0, 1, 2, 7))
    assert np.flatnonzero(other.at(1.9).schedule.plan(times)).tolist() == [0, 1, 2, 7]
    assert np.flatnonzero(found.at(1.9).schedule.plan(times)).tolist() == [0, 2, 3, 6]


def test_plans_that_cannot_be():
    """Step 0 refreshes, and the first step of another transformer; none is past the last."""
    found = recipe_for()
    two = replace(found, statistics=replace(found.statistics, switches=(0.45,)))
    assert two.with_plan((0, 2, 5)).plans == {3: (0, 2, 5)}
    for recipe, steps in ((found, (1, 3)), (found, (0, 8)), (found, (-1, 0)), (two, (0, 4, 6))):
        with pytest.raises(ConfigError, match="must be among them"):
            recipe.with_plan(steps)


# Applied


def test_applied_from_object_and_from_folder_alike(folder):
    """The object, the folder as a path and as text, and the configuration sample the same."""
    samples = []
    for options in (
        {"recipe": recipe_for()},
        {"recipe": folder},
        {"recipe": str(folder), "speedup": 2},
        {"config": recipe_for().at(2.0)},
    ):
        pipe = apply_skip_cache(build("dit"), **options)
        samples.append(sample(pipe, 8))
        assert cache_stats(pipe).refreshed == 3  # of 8 steps, for reuse steps take time as well
    assert all(torch.equal(samples[0], other) for other in samples[1:])


@pytest.mark.parametrize(
    "option",
    [
        {"interval": 2},
        {"window": (1.0, 0.0)},
        {"front_layers": 0},
        {"back_layers": 0},
        {"estimator": "hold"},
        {"preset": "skip-dit/latte-t2v"},
        {"branches": "some/where"},
        {"config": SkipCacheConfig()},
    ],
    ids=str,
)
@pytest.mark.parametrize("asked", [{"recipe": recipe_for()}, {"speedup": 2.0}], ids=["r", "s"])
def test_no_other_option_beside_a_recipe(option, asked):
    """A recipe or a speedup beside another option is refused, and the pipeline is as it was."""
    pipe = build("dit")
    before = surroundings(pipe)
    with pytest.raises(ConfigError, match="no other option than adapter"):
        apply_skip_cache(pipe, **asked, **option)
    assert surroundings(pipe) == before


@pytest.mark.parametrize("recipe", [3, ["a"], {"a": 1}, SkipCacheConfig()])
def test_what_is_no_recipe(recipe):
    """Neither a recipe nor where to find one: refused by name."""
    with pytest.raises(RecipeError, match="folder or a hub id"):
        apply_skip_cache(build("dit"), recipe=recipe)


def test_the_recipe_beside_the_weights(tmp_path):
    """A model loaded from a folder that holds its recipe uses it where a speedup is named, and only
    there; with other weights, or none beside it, the speedup is had without a recipe.
    """
    transformer_of("dit").save_pretrained(tmp_path)
    recipe_for().save_pretrained(tmp_path)
    own = DiTTransformer2DModel.from_pretrained(tmp_path)
    with_recipe = sample(apply_skip_cache(build("dit"), recipe=tmp_path, speedup=1.5), 8)
    without = sample(apply_skip_cache(build("dit"), speedup=1.5), 8)
    assert not torch.equal(with_recipe, without)
    assert torch.equal(
        sample(apply_skip_cache(build("dit", transformer=own), speedup=1.5), 8), with_recipe
    )
    default = apply_skip_cache(build("dit"), interval=2)
    assert torch.equal(
        sample(apply_skip_cache(build("dit", transformer=own), interval=2)), sample(default)
    )
    assert torch.equal(
        sample(apply_skip_cache(build("dit"), speedup=1)), reference("dit", estimator=None)
    )
    recipe_for(seed=1).save_pretrained(tmp_path)  # of other weights: no warning either
    assert torch.equal(
        sample(apply_skip_cache(build("dit", transformer=own), speedup=1.5), 8), without
    )
    (tmp_path / "recipe.safetensors").write_bytes(b"spoilt")
    with pytest.raises(RecipeFileError):
        apply_skip_cache(build("dit", transformer=own), speedup=1.5)
