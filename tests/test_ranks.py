"""Ranks that run one transformer together decide alike: two real processes, on the CPU."""

from __future__ import annotations

import datetime
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh

from pipelines import transformer_of
from recipes import recipe_for
from skipcache import ProbeSchedule, apply_skip_cache, cache_stats, skip_cache_run
from skipcache.recipes.recipe import Recipe
from skipcache.runtime.ranks import agreed, shared_along

fully_shard: Any
try:
    from torch.distributed.fsdp import fully_shard
except ImportError:
    fully_shard = None

RANKS = 2
STEPS = 8
PATIENCE = datetime.timedelta(seconds=60)  # with a collective that the other rank never joins
TIMES = [1.0 - step / STEPS for step in range(STEPS)]
MOVES = (0.02, 0.5)  # by how much the inputs of each rank move from step to step


def test_alone():
    """Without other processes, and without a transformer, values are what they are."""
    assert shared_along(nn.Linear(2, 2)) == shared_along(None) == []
    assert agreed([0.25, 2.0], []) == [0.25, 2.0]


@torch.no_grad()
def run_of(rank: int, model: nn.Module) -> tuple[str, list[torch.Tensor]]:
    """The plan and the outputs of a run of that rank's inputs; the plan is none uncached."""
    draw = torch.Generator().manual_seed(rank)
    state = torch.randn(1, 4, 8, 8, generator=draw)
    timesteps = [1000 * value for value in TIMES]
    is_cached = bool(model._forward_pre_hooks) and hasattr(model, "is_cached")
    outputs = []
    with skip_cache_run(model, timesteps=timesteps) if is_cached else nullcontext():
        for _ in timesteps:
            state = state + MOVES[rank] * torch.randn(state.shape, generator=draw)
            label = torch.tensor([1])
            # Its timestep stays, so that nothing else moves.
            output = model(state, timestep=torch.tensor([500.0]), class_labels=label)
            outputs.append(output.sample)
        return (cache_stats(model).plan if is_cached else ""), outputs


def cached(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    apply_skip_cache(model, **options)
    model.is_cached = True
    return model


def sharded(model: nn.Module) -> nn.Module:
    for block in model.transformer_blocks[1:]:  # the model calls a part of the first one itself
        fully_shard(block)
    return fully_shard(model)


def options_of(name: str) -> dict[str, Any]:
    """What to apply: two schedules whose refreshes depend on what is sampled."""
    if name == "probe":
        schedule = ProbeSchedule(threshold=0.3, max_consecutive=6)
        return {"schedule": schedule, "estimator": "hold"}
    return {"config": recipe().at(2.5, adaptive="batch")}


def recipe() -> Recipe:
    """Of outputs that hardly move, at the steps of the run."""
    found, draw = recipe_for(), np.random.default_rng(0)
    outputs = 10 * draw.normal(size=60) + np.outer(TIMES, draw.normal(size=60))
    known = replace(found.statistics, times=tuple(TIMES), covariance=outputs @ outputs.T / 60)
    return replace(found, statistics=known, points=())


def work(rank: int, folder: str) -> None:
    """All that a rank does; what it found is left in the folder."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=PATIENCE
    )
    found: dict[str, Any] = {}
    values = (0.25, 0.5) if rank else (0.75, -1.0)
    layer = fully_shard(nn.Linear(4, 4))
    found["agreed"] = [agreed([value], shared_along(layer))[0] for value in values]
    copies = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("replicate", "shard"))
    layer = fully_shard(nn.Linear(4, 4), mesh=copies)
    found["copies"] = [agreed([value], shared_along(layer))[0] for value in values]
    if rank == 1:  # alone: a collective would wait for the other rank
        plain = nn.Linear(4, 4)
        found["unsharded"] = [agreed([value], shared_along(plain))[0] for value in values]
        found["none"] = shared_along(None)
    _, plain = run_of(rank, transformer_of("dit"))
    for name in ("probe", "recipe"):
        options = options_of(name)
        alone, _ = run_of(rank, cached(transformer_of("dit"), options))
        plan, outputs = run_of(rank, cached(sharded(transformer_of("dit")), options))
        found[name] = {"alone": alone, "plan": plan, "plain": plain, "outputs": outputs}
    try:
        apply_skip_cache(sharded(transformer_of("dit")), recipe=recipe())
        found["refused"] = None
    except Exception as error:
        found["refused"] = f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank left."""
    if fully_shard is None or not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo, or no fully_shard")
    folder: Path = tmp_path_factory.mktemp("ranks")
    started = multiprocessing.spawn(work, (str(folder),), nprocs=RANKS, join=False)
    assert started is not None
    try:
        deadline = time.monotonic() + 4 * PATIENCE.total_seconds()
        while not started.join(timeout=1):  # it raises what a rank raised
            assert time.monotonic() < deadline, "the ranks wait for each other"
    finally:
        for process in started.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_the_largest_value_of_the_ranks(found):
    """Ranks that share weights both get the larger of what they found, time after time."""
    assert [one["agreed"] for one in found] == [[0.75, 0.5]] * 2


def test_a_rank_with_weights_of_its_own(found):
    """In the same group, a rank whose transformer is whole keeps its value, and asks nobody: the
    other one never answered.
    """
    assert found[1]["unsharded"] == [0.25, 0.5]
    assert found[1]["none"] == []


def test_ranks_with_a_copy_each(found):
    """Where the weights are copied from rank to rank and not shared (HSDP), each keeps its own
    value: the other one samples something else, and may have another number of steps.
    """
    assert [one["copies"] for one in found] == [[0.75, -1.0], [0.25, 0.5]]


@pytest.mark.parametrize("name", ["probe", "recipe"])
def test_ranks_refresh_together(found, name):
    """Two ranks that would refresh at other steps each alone do so at the same ones where they
    share weights, as often as the one that needs most; refreshes say what the model says.
    """
    alone = [one[name]["alone"] for one in found]
    plans = [one[name]["plan"] for one in found]
    assert alone[0] != alone[1]
    assert plans[0] == plans[1]
    assert "r" in plans[0]
    assert plans[0].count("F") >= max(plan.count("F") for plan in alone)
    for one in found:
        pairs = zip(plans[0], one[name]["outputs"], one[name]["plain"], strict=True)
        for letter, output, plain in pairs:
            is_same = torch.allclose(output, plain, atol=1e-5, rtol=1e-5)
            assert is_same == (letter == "F")


def test_a_recipe_for_a_sharded_model(found):
    """A recipe is recognised as that model's own where its weights are shared out."""
    assert [one["refused"] for one in found] == [None] * RANKS
