"""What the demo samples for each task, by which methods, and what of it is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from skipcache.demo.model import CLASS_NAMES, MOTIONS, demo_model

UNCACHED = "uncached"
SETTINGS: dict[str, dict[str, Any]] = {
    "interval 2 (default)": {},
    "interval 3": {"interval": 3},
    "interval 4": {"interval": 4},
    "interval 2, hold": {"estimator": "hold"},
    "interval 3, hold": {"interval": 3, "estimator": "hold"},
    "recipe, 2x": {"speedup": 2.0},
    "recipe, 3x": {"speedup": 3.0},
}
PICTURED = (UNCACHED, "interval 2 (default)", "interval 3, hold")


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        options: those of ``skip_cache``; None for no cache.
        baseline: name of the uncached method that it is compared with.
        has_branches: whether it samples the model with skip branches.
    """

    options: Mapping[str, Any] | None
    baseline: str = UNCACHED
    has_branches: bool = False


def _methods(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Method]:
    return {UNCACHED: Method(None)} | {name: Method(given) for name, given in settings.items()}


@dataclass(frozen=True)
class Task:
    """What is sampled.

    Attributes:
        captions: what each sample shows.
        call: keywords of the pipeline's call for all of them at once.
        methods: the rows of the table, by name.
        pictured: the methods that are drawn; each cached one after its baseline.
        guidance_scale: that the samples look best with.
        repeats: runs that are measured, so that all take about a minute on two cores.
        picture: name of the file.
    """

    captions: tuple[str, ...]
    call: Mapping[str, Any]
    methods: Mapping[str, Method] = field(default_factory=lambda: _methods(SETTINGS))
    pictured: tuple[str, ...] = PICTURED
    guidance_scale: float = 2.0
    repeats: int = 3
    picture: str = "skipcache_demo.gif"


def _paper_methods() -> dict[str, Method]:
    """A plain model and a Skip-DiT of the same budget, each against its own uncached samples.

    By ``hold`` both use the settings that the paper's code has for class-to-video Latte; the
    Skip-DiT has no other, as they are its default.
    """
    plain, skip = "plain, uncached", "Skip-DiT, uncached"
    intervals = (2, 3, 4, 6)
    methods = {plain: Method(None, plain)}
    for interval in intervals:
        methods[f"plain, interval {interval}"] = Method({"interval": interval}, plain)
    for interval in intervals:
        options = {"interval": interval, "preset": "skip-dit/latte-c2v"}
        methods[f"plain, interval {interval}, hold"] = Method(options, plain)
    methods[skip] = Method(None, skip, has_branches=True)
    for interval in intervals:
        options = {"interval": interval}
        methods[f"Skip-DiT, interval {interval}, hold"] = Method(options, skip, has_branches=True)
    return methods


_CLIPS = ((9, 0), (8, 5), (0, 4), (1, 6))  # item and motion
_CLIP_NAMES = tuple(f"{CLASS_NAMES[item]} {MOTIONS[motion]}" for item, motion in _CLIPS)
_MOVING = (
    "an ankle boot moving left",
    "a bag rotating",
    "a t-shirt bouncing",
    "a trouser growing",
)
_DRAWN = (
    "a small dark bag on the left",
    "a large bright ankle boot",
    "a small bright upside-down shirt",
    "a large dark trouser",
    "a small bright sneaker at the top",
    "a large bright upside-down dress",
    "a small dark coat at the bottom",
    "a bright sandal",
)

TASKS: dict[str, Task] = {
    "class-to-image": Task(
        CLASS_NAMES,
        {"class_labels": list(range(len(CLASS_NAMES)))},
        repeats=5,
        picture="skipcache_demo.png",
    ),
    "class-to-video": Task(
        _CLIP_NAMES,
        {"class_labels": [item * len(MOTIONS) + motion for item, motion in _CLIPS]},
        _paper_methods(),
        (
            "plain, uncached",
            "plain, interval 4, hold",
            "Skip-DiT, uncached",
            "Skip-DiT, interval 4, hold",
        ),
        repeats=2,
    ),
    "text-to-image": Task(
        _DRAWN,
        {"prompt": list(_DRAWN), "use_resolution_binning": False},
        # This model was born with skips: its default is the paper's preset, which holds.
        _methods(SETTINGS | {"interval 2, taylor(2)": {"estimator": "taylor(2)"}}),
        guidance_scale=3.0,
        picture="skipcache_demo.png",
    ),
    "text-to-video": Task(
        _MOVING,
        {
            "prompt": list(_MOVING),
            "height": 32,
            "width": 32,
            "video_length": 8,
            "clean_caption": False,
        },
        guidance_scale=3.0,
    ),
}
"""The tasks, by the names of ``load_pipeline``."""


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none.
    """
    demo_model(name)
    return TASKS[name]
