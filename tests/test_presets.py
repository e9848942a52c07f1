"""Presets: named settings, and which one a model gets."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from diffusers import DiTTransformer2DModel

from pipelines import build, sample, transformer_of
from skipcache import (
    Backbone,
    BlockList,
    IntervalSchedule,
    SkipBranches,
    SkipCacheConfig,
    add_skip_branches,
    apply_skip_cache,
    cache_stats,
    remove_skip_branches,
    skip_cache,
)
from skipcache.errors import AdapterError, ConfigError
from skipcache.latte_class import LatteClassTransformer3DModel
from skipcache.presets import PRESETS
from skipcache.runtime.controller import controller_of

PAPER = {
    "skip-dit/dit-xl": ((1.0, 0.02), 4, 4),
    "skip-dit/hunyuan": ((0.7, 0.05), 1, 1),
    "skip-dit/latte-c2v": ((0.9, 0.049), 1, 1),
    "skip-dit/latte-t2v": ((0.7, 0.05), 1, 1),
}
DEPTH = 10
MODELS = {
    "skip-dit/dit-xl": lambda depth: transformer_of("dit", depth),
    "skip-dit/hunyuan": lambda depth: transformer_of("hunyuan_dit", depth),
    "skip-dit/latte-t2v": lambda depth: transformer_of("latte", depth),
    "skip-dit/latte-c2v": lambda depth: LatteClassTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=depth, sample_size=8, video_length=2
    ),
}


def with_branches(name: str, depth: int = DEPTH, form: str = "replace") -> torch.nn.Module:
    """The preset's model with skip branches at work: its own, or new ones."""
    model = MODELS[name](depth)
    if name != "skip-dit/hunyuan":
        add_skip_branches(model, SkipBranches(16, depth, form=form))
    return model


def settings(model: torch.nn.Module) -> tuple:
    """What is in use: window, front layers, back layers, interval and estimator."""
    found = controller_of(model)
    schedule = found.schedule
    window = (schedule.start, schedule.stop)
    return (window, found.front_layers, found.back_layers, schedule.interval, str(found.estimator))


def test_presets_are_those_of_the_paper():
    """Each holds the window and layers of the released code and cites it, and none can be
    changed.
    """
    found = {n: (p.window, p.front_layers, p.back_layers) for n, p in PRESETS.items()}
    assert found == PAPER
    assert all("arXiv:2411.17616" in preset.source for preset in PRESETS.values())
    assert {preset.estimator for preset in PRESETS.values()} == {"hold"}
    with pytest.raises(TypeError, match="item assignment"):
        PRESETS["mine"] = PRESETS["skip-dit/dit-xl"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["skip-dit/dit-xl"].window = (1.0, 0.0)


@pytest.mark.parametrize("name", PAPER)
def test_a_model_with_branches_gets_its_own(name):
    """Nothing set but the interval: each model with skip branches has the paper's settings, and
    says whose they are.
    """
    model = with_branches(name)
    for interval in (None, 2, 6):
        apply_skip_cache(model, interval=interval)
        assert settings(model) == (*PAPER[name], interval or 2, "Hold()")
        assert cache_stats(model).preset == name


@pytest.mark.parametrize("name", [name for name in PAPER if name != "skip-dit/hunyuan"])
@pytest.mark.parametrize("form", [None, "residual"])
def test_a_plain_model_keeps_the_defaults(name, form):
    """Without branches, or with new ones that do nothing yet, no preset is picked."""
    model = MODELS[name](DEPTH) if form is None else with_branches(name, form=form)
    apply_skip_cache(model)
    assert settings(model) == ((0.98, 0.02), 1, 1, 2, "Taylor(order=2)")
    assert cache_stats(model).preset is None


@pytest.mark.parametrize(
    "option",
    [
        {"window": (0.6, 0.1)},
        {"front_layers": 2},
        {"back_layers": 1},
        {"estimator": "taylor"},
        {"schedule": IntervalSchedule(3, 0.5, 0.2)},
    ],
    ids=lambda option: next(iter(option)),
)
@pytest.mark.parametrize("given_as", ["option", "config"])
def test_a_setting_of_ones_own_keeps_the_models_preset_out(option, given_as):
    """Whoever says where, when or what gets the defaults for the rest, not half a preset."""
    model = with_branches("skip-dit/dit-xl")
    given = option if given_as == "option" else {"config": SkipCacheConfig(**option)}
    apply_skip_cache(model, **given)
    assert cache_stats(model).preset is None
    defaults = {"window": (0.98, 0.02), "front_layers": 1, "back_layers": 1, "estimator": "Hold()"}
    if "schedule" in option:
        option = {"window": (0.5, 0.2)}
    elif "estimator" in option:
        option = {"estimator": "Taylor(order=1)"}
    window, front, back, _, estimator = settings(model)
    found = {"window": window, "front_layers": front, "back_layers": back, "estimator": estimator}
    assert found == {**defaults, **option}


@pytest.mark.parametrize("given_as", ["option", "config", "both"])
def test_options_come_before_a_preset(given_as):
    """A preset named by the caller fills in what is not given, and only that, on any model."""
    model = MODELS["skip-dit/dit-xl"](DEPTH)
    window = {"window": (0.6, 0.1)}
    options = {"preset": "skip-dit/dit-xl", "interval": 4}
    if given_as == "option":
        apply_skip_cache(model, **options, **window)
    elif given_as == "config":
        apply_skip_cache(model, config=SkipCacheConfig(**options, **window))
    else:
        apply_skip_cache(model, config=SkipCacheConfig(**window), **options)
    assert settings(model) == ((0.6, 0.1), 4, 4, 4, "Hold()")
    assert cache_stats(model).preset == "skip-dit/dit-xl"
    with skip_cache(model, preset="skip-dit/latte-c2v", estimator="residual"):
        assert settings(model) == ((0.9, 0.049), 1, 1, 2, "Residual()")
        assert cache_stats(model).preset == "skip-dit/latte-c2v"
    assert cache_stats(model).preset == "skip-dit/dit-xl"
    with skip_cache(model, preset="skip-dit/dit-xl", schedule=IntervalSchedule(5)):
        assert settings(model) == ((1.0, 0.0), 4, 4, 5, "Hold()")


def test_a_named_preset_comes_before_the_models_own():
    """The caller's choice of a preset replaces the model's."""
    model = with_branches("skip-dit/dit-xl")
    apply_skip_cache(model, preset="skip-dit/hunyuan")
    assert settings(model) == ((0.7, 0.05), 1, 1, 2, "Hold()")


@pytest.mark.parametrize("depth", [3, 5, 8])
def test_a_shallow_model_keeps_something_to_skip(depth):
    """Where four and four layers are all that there are, one and one take their place."""
    model = with_branches("skip-dit/dit-xl", depth)
    apply_skip_cache(model)
    assert settings(model) == ((1.0, 0.02), 1, 1, 2, "Hold()")
    apply_skip_cache(model, preset="skip-dit/dit-xl", front_layers=depth - 2)
    assert settings(model)[1:3] == (depth - 2, 1)
    with pytest.raises(ConfigError, match="leave nothing to skip"):
        apply_skip_cache(model, preset="skip-dit/dit-xl", front_layers=depth - 1, back_layers=1)


def test_branches_that_come_and_go_bring_the_preset():
    """Branches attached under an applied cache bring the model's preset, and take it along."""
    model = MODELS["skip-dit/latte-t2v"](DEPTH)
    apply_skip_cache(model, interval=3)
    assert cache_stats(model).preset is None
    add_skip_branches(model, SkipBranches(16, DEPTH, form="replace"))
    assert settings(model) == ((0.7, 0.05), 1, 1, 3, "Hold()")
    remove_skip_branches(model)
    assert settings(model) == ((0.98, 0.02), 1, 1, 3, "Taylor(order=2)")


def test_a_configuration_is_not_changed():
    """Applying leaves the configuration that was given as it was; one serves several models."""
    config = SkipCacheConfig(interval=3)
    before = copy.deepcopy(config)
    for name in PAPER:
        model = with_branches(name)
        apply_skip_cache(model, config=config)
        assert settings(model) == (*PAPER[name], 3, "Hold()")
    assert config == before


def test_a_run_stays_in_the_window():
    """The preset is at work in a real pipeline: nothing is reused outside its window."""
    pipe = apply_skip_cache(build("hunyuan_dit"), interval=2)
    assert cache_stats(pipe).plan == ""
    sample(pipe, 20)
    # Times 0.95, 0.9, ..., 0: step 5 is the last at 0.7 or above, step 18 the first at 0.05.
    assert cache_stats(pipe).plan == "FFFFFF" + "FrFrFrFrFrFr" + "FF"
    assert cache_stats(pipe).preset == "skip-dit/hunyuan"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("skip-dit/latte-t2", "Did you mean 'skip-dit/latte-t2v'"),
        ("skipdit/dit_xl", "Did you mean 'skip-dit/dit-xl'"),
        ("zzz", "Allowed: skip-dit/dit-xl, skip-dit/hunyuan"),
        (3, "no preset is named 3"),
    ],
)
def test_a_misspelt_preset_names_the_nearest(name, says):
    """Refused when applied or configured, with nothing left on the model; an adapter's too."""
    model = transformer_of("dit")
    with pytest.raises(ConfigError, match=says):
        apply_skip_cache(model, preset=name)
    with pytest.raises(ConfigError, match=says):
        SkipCacheConfig(preset=name)
    with pytest.raises(AdapterError, match=f"Backbone 'mine'.*{says}"):
        Backbone("mine", (BlockList("blocks"),), preset=name)
    assert controller_of(model) is None


def test_a_subclass_of_anothers_has_its_preset():
    """A fine-tuned class is known by the one that it derives from, so its branches bring it too."""
    model = with_branches("skip-dit/dit-xl")
    model.__class__ = type("Tuned", (DiTTransformer2DModel,), {})
    apply_skip_cache(model)
    assert cache_stats(model).preset == "skip-dit/dit-xl"
