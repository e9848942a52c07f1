"""Files of recipes: ``recipe.json`` says what it is, ``recipe.safetensors`` holds the statistics.

What is read is checked before anything is built. Nothing is ever unpickled.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipcache.branches.files import (
    check_keys,
    find_folder,
    push_folder,
    read_base_model,
    read_json,
    read_tensors,
    replaced_files,
)
from skipcache.errors import BranchFileError, ConfigError, RecipeFileError
from skipcache.recipes.recipe import Measured, Point, Recipe, RecipeRecord
from skipcache.recipes.search import REACH
from skipcache.recipes.statistics import OutputStatistics

RECIPE_FILE = "recipe.json"
STATISTICS_FILE = "recipe.safetensors"
FORMAT_VERSION = 1

_REQUIRED = (
    "format_version",
    "base_model",
    "scheduler",
    "layers",
    "reuse_cost",
    "power",
    "steps",
    "points",
)
_OPTIONAL = ("skipcache_version", "guidance_scale", "sample_shape", "made_by", "switches")


def write_recipe(recipe: Recipe, folder: Path) -> Path:
    """See ``Recipe.save_pretrained``."""
    from safetensors import SafetensorError
    from safetensors.torch import save

    found = recipe.statistics
    text = {
        "format_version": FORMAT_VERSION,
        "skipcache_version": importlib.metadata.version("skipcache"),
        **asdict(recipe.record),
        "steps": recipe.steps,
        "power": found.power,
        "reuse_cost": recipe.reuse_cost,
        "switches": list(found.switches),
        "points": [asdict(point) for point in recipe.points],
    }
    arrays = {
        "times": np.array(found.times),
        "covariance": found.covariance,
        "effects": found.effects,
        "gains": found.gains,
        "misses": found.misses,
    }
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    try:
        with replaced_files(folder, (STATISTICS_FILE, RECIPE_FILE)) as parts:
            (parts / STATISTICS_FILE).write_bytes(save(tensors))
            described = json.dumps(text, indent=2, allow_nan=False) + "\n"
            (parts / RECIPE_FILE).write_text(described, encoding="utf-8")
    except (OSError, ValueError, SafetensorError) as error:
        raise RecipeFileError(f"{folder} cannot be written: {error}") from error
    return folder


def read_recipe(
    source: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> Recipe:
    """See ``Recipe.from_pretrained``."""
    with _as_recipe_errors():
        folder = find_folder(
            source,
            revision=revision,
            local_files_only=local_files_only,
            names=(RECIPE_FILE, STATISTICS_FILE),
        )
        path = folder / RECIPE_FILE
        text = read_json(path, FORMAT_VERSION)
        version = text.get("format_version")
        if type(version) is not int or version < 1:
            raise RecipeFileError(f"{path}: format_version is {version!r}, not {FORMAT_VERSION}.")
        check_keys(path, text, required=_REQUIRED, optional=_OPTIONAL)
        base = read_base_model(path, text["base_model"])
        steps = text["steps"]
        if base is None or type(steps) is not int or not 2 <= steps <= 100_000:
            raise RecipeFileError(f"{path}: base_model or steps ({steps!r}) cannot be.")
        shapes = {
            "times": (steps,),
            "covariance": (steps, steps),
            "effects": (steps,),
            "gains": (steps,),
            "misses": (2, steps),
        }
        stored = read_tensors(folder / STATISTICS_FILE, shapes)
    arrays = {name: tensor.double().numpy() for name, tensor in stored.items()}
    try:
        statistics = OutputStatistics(
            tuple(arrays["times"].tolist()),
            arrays["covariance"],
            arrays["effects"],
            arrays["gains"],
            float(text["power"]),
            tuple(_finite(switch) for switch in text.get("switches", ())),
            arrays["misses"],
        )
        reuse_cost = float(text["reuse_cost"])
        if not 0 <= reuse_cost < 1:
            raise ValueError(f"reuse_cost is {reuse_cost!r}")
        guidance = text.get("guidance_scale")
        record = RecipeRecord(
            base,
            {"name": None, "prediction_type": None, **text["scheduler"]},
            None if guidance is None else _finite(guidance),
            tuple(int(size) for size in text.get("sample_shape", ())),
            int(text["layers"]),
            str(text.get("made_by", "")),
        )
        points = tuple(_point(point, steps) for point in text["points"])
    except (ConfigError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise RecipeFileError(f"{path} describes no recipe: {error}") from error
    return Recipe(statistics, reuse_cost, points, record)


def push_recipe(recipe: Recipe, repo_id: str, private: bool | None) -> str:
    """See ``Recipe.push_to_hub``."""
    with _as_recipe_errors():
        return push_folder(recipe.save_pretrained, repo_id, private, "Upload a recipe")


def _point(text: dict[str, Any], steps: int) -> Point:
    refreshes = tuple(int(step) for step in text["refresh_steps"])
    is_rising = list(refreshes) == sorted(set(refreshes))
    longest = max((b - a for a, b in pairwise((*refreshes, steps))), default=steps)
    if not is_rising or refreshes[:1] != (0,) or refreshes[-1] >= steps or longest > REACH + 1:
        raise ValueError(f"refresh_steps {refreshes!r}")
    measured = Measured(
        _finite(text["measured"]["decibels"]),
        _finite(text["measured"]["deviation"]),
        int(text["measured"]["samples"]),
    )
    return Point(
        _finite(text["speedup"]),
        refreshes,
        _finite(text["predicted_error"]),
        measured,
        _finite(text["expected_speedup"]),
    )


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value!r} is not finite")
    return number


@contextmanager
def _as_recipe_errors() -> Iterator[None]:
    try:
        yield
    except BranchFileError as error:
        raise RecipeFileError(str(error)) from error
