"""What a calibration that was stopped has measured, and goes on from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipelines import transformer_of
from skipcache.branches.files import base_model_of
from skipcache.errors import RecipeFileError
from skipcache.recipes.checkpoint import Checkpoint, described


def measure(name: str, calls: list[str]) -> dict[str, np.ndarray]:
    calls.append(name)
    return {"a": np.arange(6.0).reshape(2, 3).T, "b": np.array([len(name)])}


def test_a_calibration_goes_on(tmp_path):
    """What was measured is kept under its name, and not measured again by the next process."""
    path, calls = tmp_path / "new" / "kept.safetensors", []
    for _ in range(2):
        kept = Checkpoint(path, "one")
        for name in ("moments.1", "moments.10"):
            found = kept.measured(name, lambda name=name: measure(name, calls))
            assert np.array_equal(found["a"], np.arange(6.0).reshape(2, 3).T)
            assert found["b"].tolist() == [len(name)]
            assert found.keys() == {"a", "b"}
    assert calls == ["moments.1", "moments.10"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    """Measurements are kept in memory then."""
    monkeypatch.chdir(tmp_path)
    kept, calls = Checkpoint(None, "one"), []
    for _ in range(2):
        kept.measured("moments.1", lambda: measure("moments.1", calls))
    assert calls == ["moments.1"]
    assert list(tmp_path.iterdir()) == []


def test_files_of_no_use(tmp_path):
    """Those of another calibration, corrupt ones and folders are refused, and left as they are."""
    path = tmp_path / "kept"
    Checkpoint(path, "one").measured("m", lambda: measure("m", []))
    content = path.read_bytes()
    with pytest.raises(RecipeFileError, match="another calibration"):
        Checkpoint(path, "two")
    for spoilt in (content[:-3], b"", b"\xff" * 99):
        path.write_bytes(spoilt)
        with pytest.raises(RecipeFileError, match="cannot be read"):
            Checkpoint(path, "one")
        assert path.read_bytes() == spoilt
    save_file({"m/a": torch.ones(1)}, path)
    with pytest.raises(RecipeFileError, match="another calibration"):
        Checkpoint(path, "one")
    with pytest.raises(RecipeFileError, match="cannot be read"):
        Checkpoint(tmp_path, "one")
    with pytest.raises(RecipeFileError, match="cannot be written"):
        Checkpoint(path / "below", "one").measured("m", lambda: measure("m", []))


def test_a_calibration_in_words():
    """Model, calls and seed tell calibrations apart; objects are named by class, never by place."""
    base = base_model_of(transformer_of("dit"))
    call = {"class_labels": [1], "generator": torch.Generator()}
    words = described(base, [call], 0)
    assert words == described(base, [{**call, "generator": torch.Generator()}], 0)
    others = (
        described(base_model_of(transformer_of("dit", seed=1)), [call], 0),
        described(base, [{**call, "class_labels": [2]}], 0),
        described(base, [call, call], 0),
        described(base, [call], 1),
    )
    assert len({words, *others}) == 5


def test_pictures_and_arrays_count_by_their_content():
    """An image to start from, as Pillow or numpy has it, is what the samples depend on."""
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    images = [Image.fromarray(pixels), Image.fromarray(pixels + 1), pixels, pixels.astype("int8")]
    words = [described(None, [{"image": image}], 0) for image in images]
    assert len(set(words)) == 3  # of the same pixels, both kinds are the same
    assert described(None, [{"image": [Image.fromarray(pixels)]}], 0) == described(
        None, [{"image": [Image.fromarray(pixels.copy())]}], 0
    )
