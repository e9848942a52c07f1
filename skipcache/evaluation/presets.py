"""How near the ideal each preset of the paper gets on transformers of the width that it is for, and
what the relayouts of skipped layers cost.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from skipcache import api, plugins
from skipcache.backbone import Backbone, Zipped
from skipcache.branches.module import SkipBranches
from skipcache.branches.retrofit import add_skip_branches
from skipcache.evaluation import models
from skipcache.evaluation.benchmark import run_steps
from skipcache.evaluation.timing import format_table, in_turns, now, speedups
from skipcache.runtime.stats import CacheStats
from skipcache.schedules import MaskSchedule


def presets(repeats: int = 7, steps: int = 8) -> str:
    """Speedup of each preset at interval 2 against the ideal for the layers run."""
    rows = [
        row("Latte-1 width, 14 layers, 4 x 64 tokens", *models.latte_1(), repeats, steps),
        row("Latte-XL/2, 14 layers, 4 x 64 tokens", *models.latte_class(), repeats, steps),
        row("HunyuanDiT-g/2 width, 20 layers, 256 tokens", *models.hunyuan_g_2(), repeats, steps),
    ]
    columns = ["transformer", "preset", "plan", "uncached, s", "cached, s"]
    columns += ["speedup (wall-clock)", "ideal (layers)", "of ideal"]
    return format_table(columns, rows)


def sizes(repeats: int = 5, steps: int = 8) -> str:
    """Speedup at interval 2 on transformers of the width of Flux-dev and Wan-1.3B."""
    rows = [
        row("Flux-dev width, 3 + 6 layers, 256 + 64 tokens", *models.flux_dev(), repeats, steps),
        row("Wan-1.3B width, 15 layers, 4 x 64 tokens", *models.wan_1_3b(), repeats, steps),
    ]
    columns = ["transformer", "plan", "uncached, s", "cached, s"]
    columns += ["speedup (wall-clock)", "ideal (layers)", "of ideal"]
    return format_table(columns, [[cells[0], *cells[2:]] for cells in rows])


def row(
    name: str, transformer: nn.Module, inputs: dict[str, Any], repeats: int, steps: int
) -> list[str]:
    """One model under the preset that it gets by itself, if it has one. A model of a family with a
    preset and without skips is given branches, which run in every variant.
    """
    transformer, inputs = _placed(transformer, inputs)
    backbone = plugins.resolve_backbone(transformer, None)
    if backbone.preset is not None and not backbone.native_skips:
        assert backbone.hidden_size is not None
        depth = len(transformer.transformer_blocks)  # type: ignore[arg-type]
        add_skip_branches(transformer, SkipBranches(backbone.hidden_size, depth, form="replace"))
    found: list[CacheStats] = []

    def cached() -> float:
        with api.skip_cache(transformer, interval=2):
            noise = 1000.0 if backbone.timestep is None else backbone.timestep.noise
            times = [noise * (1 - i / steps) for i in range(steps)]
            with api.skip_cache_run(transformer, timesteps=times):
                seconds = run_steps(transformer, inputs, steps)
            found.append(api.cache_stats(transformer))
        return seconds

    uncached = partial(run_steps, transformer, inputs, steps)
    variants: dict[str, Callable[[], float]] = {"uncached": uncached, "cached": cached}
    seconds, stats = in_turns(variants, repeats), found[-1]
    measured, ideal = speedups(seconds, "uncached")["cached"], 1 / stats.compute_fraction
    medians = [f"{statistics.median(seconds[kind]):.2f}" for kind in variants]
    ratios = [f"{measured:.3f}", f"{ideal:.3f}", f"{measured / ideal:.3f}"]
    return [name, str(stats.preset), stats.plan, *medians, *ratios]


class PassingBlock(nn.Module):
    """Stands for a block where only what is around it is measured."""

    def forward(self, hidden_states: torch.Tensor, *conditions: Any) -> torch.Tensor:
        """[B, T, C], as it came."""
        return hidden_states


def relayouts(repeats: int = 5, reuses: int = 4, frames: int = 8, sample_size: int = 16) -> str:
    """What copying each skipped layer of Latte-1 into its two layouts costs a reuse step."""
    transformer, inputs = models.latte_1(2, frames, sample_size)
    # Two videos, as guidance has them: relayouts of a single one are views anyway.
    inputs = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
    transformer, inputs = _placed(transformer, inputs)
    depth = 28
    block_lists = (transformer.transformer_blocks, transformer.temporal_transformer_blocks)
    for blocks in block_lists:
        assert isinstance(blocks, nn.ModuleList)
        for _ in range(depth - 2):
            blocks.insert(1, PassingBlock())
    views = plugins.resolve_backbone(transformer, None)
    (pair,) = views.lists
    assert isinstance(pair, Zipped)
    lists = tuple(dataclasses.replace(spec, relayouts=False) for spec in pair.lists)
    copies = dataclasses.replace(views, lists=(Zipped(lists),))

    def median_ms(backbones: dict[str, Backbone]) -> dict[str, float]:
        runs = {
            name: partial(_reuse_seconds, transformer, inputs, reuses, backbone)
            for name, backbone in backbones.items()
        }
        return {k: 1e3 * statistics.median(v) for k, v in in_turns(runs, repeats).items()}

    step = median_ms({"views": views})["views"]
    # The copies drown in the noise of the two layers that run, so they are measured without those.
    for blocks in block_lists:
        assert isinstance(blocks, nn.ModuleList)
        blocks[0], blocks[depth - 1] = PassingBlock(), PassingBlock()
    bare = median_ms({"copied": copies, "views": views})
    tokens, cost = frames * (sample_size // 2) ** 2, bare["copied"] - bare["views"]
    return format_table(
        [f"Latte-1 width, 26 of {depth} layers skipped, 2 x {tokens} tokens", "ms"],
        [
            ["a reuse step, its skipped layers' relayouts as views", f"{step:.1f}"],
            ["copying them instead", f"{cost:.1f} more ({100 * cost / step:.1f} %)"],
        ],
    )


@torch.no_grad()
def _reuse_seconds(
    transformer: nn.Module, inputs: dict[str, Any], reuses: int, backbone: Backbone
) -> float:
    """The median of the reuse steps after one refresh."""
    batch, device = len(inputs["hidden_states"]), inputs["hidden_states"].device
    seconds = []
    times: Sequence[float] = [500.0 - i for i in range(reuses + 1)]
    schedule = MaskSchedule((0,), steps=len(times))
    with api.skip_cache(transformer, adapter=backbone, schedule=schedule, estimator="hold"):
        with api.skip_cache_run(transformer, timesteps=times):
            for time in times:
                started = now(device)
                transformer(**inputs, timestep=torch.full((batch,), time, device=device))
                seconds.append(now(device) - started)
        assert api.cache_stats(transformer).reused == reuses
    return statistics.median(seconds[1:])


def _placed(transformer: nn.Module, inputs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """On the GPU, if there is one."""
    if not torch.cuda.is_available():
        return transformer, inputs
    moved: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, tuple):
            moved[name] = tuple(tensor.to("cuda") for tensor in value)
        else:
            moved[name] = value.to("cuda") if isinstance(value, torch.Tensor) else value
    return transformer.to("cuda"), moved
