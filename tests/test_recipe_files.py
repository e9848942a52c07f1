"""Files of recipes: what is written comes back, and what is broken is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import build, surroundings
from recipes import STEPS, recipe_for
from skipcache import apply_skip_cache
from skipcache.errors import RecipeFileError
from skipcache.errors import SkipCacheWarning as AnyWarning
from skipcache.recipes.recipe import Recipe

TEXT, ARRAYS = "recipe.json", "recipe.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of good files."""
    return recipe_for().save_pretrained(tmp_path / "good")


def rewrite(folder: Path, **changes: Any) -> None:
    """Replaces values of the description; None takes the key out."""
    text = {**json.loads((folder / TEXT).read_text()), **changes}
    kept = {key: value for key, value in text.items() if value is not None}
    (folder / TEXT).write_text(json.dumps(kept))


def refused(folder: Path, says: str) -> None:
    """Reading and applying are refused, and nothing is applied."""
    pipe = build("dit")
    before = surroundings(pipe)
    with pytest.raises(RecipeFileError, match=says) as caught:
        Recipe.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    with pytest.raises(RecipeFileError):
        apply_skip_cache(pipe, recipe=folder)
    assert surroundings(pipe) == before


# Round trip


@pytest.mark.parametrize("guidance_scale", [None, 1.5])
def test_round_trip(guidance_scale, tmp_path):
    """What is written comes back bit for bit, and a second save replaces it."""
    made = recipe_for()
    made = replace(made, record=replace(made.record, guidance_scale=guidance_scale))
    path = made.save_pretrained(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder"
    assert {file.name for file in path.iterdir()} == {TEXT, ARRAYS}
    found = Recipe.from_pretrained(str(path))
    assert found.statistics.times == made.statistics.times
    assert found.statistics.power == made.statistics.power
    for name in ("covariance", "effects", "gains"):
        ours, theirs = (getattr(recipe.statistics, name) for recipe in (made, found))
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
    assert (found.reuse_cost, found.points, found.record) == (0.01, made.points, made.record)
    assert found.predicted_error(1.7) == made.predicted_error(1.7)
    replace(made, reuse_cost=0.25).save_pretrained(path)
    assert Recipe.from_pretrained(path).reuse_cost == 0.25


def test_a_folder_that_cannot_be_written(tmp_path):
    """A file where the folder should be, and a value that is no number; nothing is written."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeFileError, match="cannot be written"):
        recipe_for().save_pretrained(tmp_path / "file")
    path = recipe_for().save_pretrained(tmp_path / "good")
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(RecipeFileError, match="cannot be written"):
        replace(recipe_for(), reuse_cost=math.nan).save_pretrained(path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


# Broken files


def test_a_folder_that_is_not_there(tmp_path):
    """A missing folder is named, also where it cannot be a hub id; and so are missing files."""
    for missing in (tmp_path / "none", str(tmp_path / "none")):
        with pytest.raises(RecipeFileError, match="no folder"):
            Recipe.from_pretrained(missing)
    with pytest.raises(RecipeFileError, match=r"recipe\.json cannot be read"):
        Recipe.from_pretrained(tmp_path)


def test_arrays_that_cannot_be_read(folder):
    """Truncated, overwritten and missing arrays are refused."""
    content = (folder / ARRAYS).read_bytes()
    for spoilt in (content[:-7], content[:20], b"", b"\xff" * 4096):
        (folder / ARRAYS).write_bytes(spoilt)
        refused(folder, "cannot be read")
    (folder / ARRAYS).unlink()
    refused(folder, "cannot be read")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gains": torch.ones(STEPS - 1)}, r"'gains' has shape \(7,\), and \(8,\)"),
        ({"covariance": torch.ones(STEPS)}, "'covariance' has shape"),
        ({"effects": torch.full((STEPS,), math.nan)}, "'effects' is not made of finite"),
        ({"covariance": torch.full((STEPS, STEPS), math.inf)}, "'covariance' is not made of"),
        ({"times": torch.arange(STEPS)}, "'times' is not made of finite floating-point"),
        ({"times": None}, r"missing \['times'\]"),
        ({"more": torch.ones(1)}, r"extra \['more'\]"),
    ],
)
def test_arrays_that_cannot_be(change, says, folder):
    """Other shapes, values that are not finite, missing and further arrays are refused by name."""
    tensors = {**load_file(folder / ARRAYS), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / ARRAYS)
    refused(folder, says)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, "\ud800", "{'a': 1}"])
def test_descriptions_that_are_no_json_objects(text, folder):
    """Whatever is no JSON object is refused."""
    (folder / TEXT).write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(folder, "cannot be read|not an object")


def test_missing_keys_are_listed(folder):
    """All of them, in one message."""
    rewrite(folder, reuse_cost=None, points=None, scheduler=None)
    refused(folder, "lacks points, reuse_cost, scheduler")


def test_an_unknown_key_is_left_aside(folder):
    """What a later skipcache has added is warned of, and the rest is read."""
    rewrite(folder, colour="blue")
    with pytest.warns(AnyWarning, match="colour not known"):
        assert Recipe.from_pretrained(folder).reuse_cost == 0.01


POINT = {
    "speedup": 2.0,
    "refresh_steps": [0, 2, 3, 6],
    "predicted_error": 0.02,
    "measured": {"decibels": 25.0, "deviation": 0.1, "samples": 4},
    "expected_speedup": 1.9,
}
BAD = [
    ({"format_version": 2}, "format version 2.*Upgrade"),
    *(({"format_version": v}, "format_version is") for v in (0, "1", True, 1.0)),
    *(({"steps": v}, "steps") for v in (1, -8, "8", 8.0, True, 10**9)),
    ({"steps": 9}, "has shape"),
    *(({"base_model": v}, "base_model is malformed") for v in ("DiT", {}, {"name": "DiT"})),
    *(
        ({"power": v}, "describes no recipe")
        for v in (0, -1, math.nan, math.inf, "x", [1], 10**400)
    ),
    *(({"reuse_cost": v}, "describes no recipe") for v in (1, -0.1, math.nan, "x", {})),
    *(({"scheduler": v}, "describes no recipe") for v in ("DDIM", ["name"], 3)),
    *(({"guidance_scale": v}, "describes no recipe") for v in ("x", [], math.nan)),
    *(({"sample_shape": v}, "describes no recipe") for v in (3, ["x"], [[1]], [math.inf])),
    *(({"points": v}, "describes no recipe") for v in (3, "x", [3], [{}], {"a": 1}, [[]])),
    *(
        ({"points": [{**POINT, "refresh_steps": v}]}, "describes no recipe")
        for v in ([], [1, 2], [0, 0], [0, 3, 2], [-1, 0], [0, 8], ["x"], [[0]], 0, [0, math.inf])
    ),
    *(
        ({"points": [{**POINT, key: math.nan}]}, "describes no recipe")
        for key in ("speedup", "predicted_error", "expected_speedup", "measured")
    ),
    ({"points": [{**POINT, "measured": {**POINT["measured"], "decibels": math.inf}}]}, "finite"),
]


@pytest.mark.parametrize(("change", "says"), BAD)
def test_descriptions_that_cannot_be(change, says, folder):
    """Hand-made values that no recipe has are refused by name, whatever they are."""
    rewrite(folder, **change)
    refused(folder, says)
