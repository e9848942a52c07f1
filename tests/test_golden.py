"""Runs of the reference implementation of arXiv:2411.17616, where its outputs are at hand."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanDiT2DModel
from safetensors import safe_open

from pipelines import backbone_of
from skipcache import IntervalSchedule, apply_skip_cache, cache_stats, skip_cache_run

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "t2i.safetensors"

pytestmark = pytest.mark.skipif(
    not GOLDEN.exists(), reason="the stored runs of the reference implementation are not here"
)


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as stored:
        metadata = {key: json.loads(value) for key, value in stored.metadata().items()}
        return metadata, {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118


@pytest.mark.parametrize("told_by", ["timesteps", "value"])
@pytest.mark.parametrize("kind", ["skip", "cache"])
@torch.no_grad()
def test_hunyuan_dit_equals_the_reference(golden, kind, told_by):
    """HunyuanDiT, uncached and with Skip-Cache in its window: all 50 outputs within 1e-4."""
    metadata, stored = golden
    config = metadata["config"]
    model = HunyuanDiT2DModel(**config).eval()
    model.load_state_dict(
        {key[8:]: tensor for key, tensor in stored.items() if key.startswith("weights/")}
    )
    inputs = {key[7:]: tensor for key, tensor in stored.items() if key.startswith("inputs/")}
    x = inputs.pop("x")
    rotary = (inputs.pop("image_rotary_cos"), inputs.pop("image_rotary_sin"))
    timesteps = stored[f"runs/{kind}/timesteps"]
    rule = metadata["cache"]
    if kind == "cache":
        schedule = IntervalSchedule(rule["interval"], rule["start"] / 1000, rule["stop"] / 1000)
        apply_skip_cache(
            model,
            adapter=backbone_of("hunyuan_dit", config["num_layers"]),
            schedule=schedule,
            front_layers=rule["branch"],
            back_layers=rule["branch"],
        )

    def outputs():
        for t in timesteps:
            yield model(
                x * (0.5 + t / 1000),
                t.float().expand(len(x)),
                image_rotary_emb=rotary,
                return_dict=False,
                **inputs,
            )[0]

    if kind == "cache" and told_by == "timesteps":
        with skip_cache_run(model, timesteps=timesteps):
            found = torch.stack(list(outputs()))
    else:
        found = torch.stack(list(outputs()))
    assert (found - stored[f"runs/{kind}/outputs"]).abs().max() < 1e-4
    if kind == "cache":
        assert cache_stats(model).reused > 10
