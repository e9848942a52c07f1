"""The benchmarks of the core: what applying costs, how near the ideal a run gets, what is stored,
what waits.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from skipcache import api
from skipcache.estimators import Estimator, Hold, Residual, Taylor
from skipcache.evaluation import models
from skipcache.evaluation.timing import DenoisingTimer, format_table, in_turns, now, speedups
from skipcache.schedules import IntervalSchedule

CPU = torch.device("cpu")


@torch.no_grad()
def run_steps(transformer: nn.Module, inputs: dict[str, Any], steps: int) -> float:
    """Calls the transformer ``steps`` times as a sampler would; returns seconds."""
    batch = inputs["hidden_states"].shape[0]
    device = inputs["hidden_states"].device
    timesteps = [
        torch.full((batch,), 1000.0 - 1000 * i // steps, device=device) for i in range(steps)
    ]
    started = now(device)
    for timestep in timesteps:
        transformer(**inputs, timestep=timestep)
    return now(device) - started


def _run_cached(
    transformer: nn.Module, inputs: dict[str, Any], steps: int, **options: Any
) -> float:
    with api.skip_cache(transformer, **options):
        timesteps = [1000.0 - 1000 * i // steps for i in range(steps)]
        with api.skip_cache_run(transformer, timesteps=timesteps):
            return run_steps(transformer, inputs, steps)


def overhead(repeats: int = 15, steps: int = 100) -> str:
    """What a cache costs that never reuses, on a tiny DiT and on the demo model."""
    from skipcache.demo import load_pipeline

    tiny = models.tiny_dit()
    inputs = models.sample_inputs(tiny)
    always = IntervalSchedule(interval=1)
    seconds = in_turns(
        {
            "uncached": lambda: run_steps(tiny, inputs, steps),
            "applied": lambda: _run_cached(tiny, inputs, steps, schedule=always),
        },
        repeats,
    )
    per_forward = {
        name: 1e6 * statistics.median(values) / steps for name, values in seconds.items()
    }

    pipeline = load_pipeline()

    def sample() -> float:
        with DenoisingTimer(pipeline) as timer:
            pipeline(
                list(range(10)), num_inference_steps=20, generator=torch.Generator().manual_seed(0)
            )
        return timer.seconds

    def sample_applied() -> float:
        with api.skip_cache(pipeline, schedule=always):
            return sample()

    demo = in_turns({"uncached": sample, "applied": sample_applied}, max(5, repeats // 3))
    ratio = statistics.median(demo["applied"]) / statistics.median(demo["uncached"])
    return format_table(
        ["model", "uncached", "applied, refreshing always", "difference"],
        [
            [
                "tiny DiT, 12 layers",
                f"{per_forward['uncached']:.0f} us a forward",
                f"{per_forward['applied']:.0f} us a forward",
                f"{per_forward['applied'] - per_forward['uncached']:.0f} us a forward",
            ],
            [
                "demo model, 20 steps",
                f"{statistics.median(demo['uncached']):.3f} s",
                f"{statistics.median(demo['applied']):.3f} s",
                f"{100 * (ratio - 1):+.1f} %",
            ],
        ],
    )


def speedup(repeats: int = 3, steps: int = 8, batch: int = 2) -> str:
    """Speedup of a DiT-XL/2-sized transformer against the ideal for the layers run."""
    transformer = models.dit_xl_2()
    inputs = models.sample_inputs(transformer, batch)
    if torch.cuda.is_available():
        transformer = transformer.to("cuda")
        inputs = {name: tensor.to("cuda") for name, tensor in inputs.items()}
    depth = len(transformer.transformer_blocks)
    variants: dict[str, Callable[[], float]] = {
        "uncached": partial(run_steps, transformer, inputs, steps)
    }
    ideals = {}
    for schedule in (IntervalSchedule(2), IntervalSchedule(4)):
        name = f"interval {schedule.interval}"
        variants[name] = partial(
            _run_cached, transformer, inputs, steps, schedule=schedule, estimator="hold"
        )
        plan = schedule.plan([1.0 - i / steps for i in range(steps)])
        ideals[name] = depth * steps / sum(depth if refresh else 2 for refresh in plan)
    seconds = in_turns(variants, repeats)
    measured = speedups(seconds, "uncached")
    rows = [["uncached", f"{statistics.median(seconds['uncached']):.2f}", "1.00", "1.00", ""]]
    rows += [
        [
            name,
            f"{statistics.median(seconds[name]):.2f}",
            f"{measured[name]:.3f}",
            f"{ideal:.3f}",
            f"{measured[name] / ideal:.3f}",
        ]
        for name, ideal in ideals.items()
    ]
    return format_table(
        [
            "DiT-XL/2 size, 256 tokens",
            f"s for {steps} steps",
            "speedup (wall-clock)",
            "ideal (layers)",
            "of ideal",
        ],
        rows,
    )


def memory(steps: int = 12) -> str:
    """Bytes cached a stream, measured, against what each estimator is stated to keep."""
    transformer = models.tiny_dit()
    inputs = models.sample_inputs(transformer)
    width = transformer.inner_dim
    tokens = (transformer.config["sample_size"] // 2) ** 2
    feature_bytes = inputs["hidden_states"].shape[0] * tokens * width * 4
    stated: dict[str, tuple[Estimator, int]] = {
        "hold": (Hold(), 1),
        "residual": (Residual(), 2),
        "taylor(1)": (Taylor(1), 2),
        "taylor(2)": (Taylor(2), 3),
        "taylor(3)": (Taylor(3), 4),
    }
    rows = []
    for name, (estimator, features) in stated.items():
        with api.skip_cache(transformer, schedule=IntervalSchedule(2), estimator=estimator):
            with api.skip_cache_run(transformer):
                run_steps(transformer, inputs, steps)
            held = api.cache_stats(transformer).cache_bytes
        rows.append([name, str(features), str(features * feature_bytes), str(held)])
    return format_table(["estimator", "features stated", "bytes stated", "bytes measured"], rows)


def count_syncs(steps: int = 12) -> dict[str, int]:
    """Host syncs (``aten::item``, ``aten::_local_scalar_dense``) in a profile of a DDIM pipeline
    run, by variant.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    pipeline = DiTPipeline(models.tiny_dit(), AutoencoderKL(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def count() -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            pipeline([1], num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
        names = ("aten::item", "aten::_local_scalar_dense")
        return sum(event.count for event in profile.key_averages() if event.key in names)

    counts = {"uncached": count()}
    for estimator in ("hold", "residual", "taylor"):
        with api.skip_cache(pipeline, interval=2, estimator=estimator):
            counts[f"interval 2, {estimator}"] = count()
    return counts


def syncs() -> str:
    """Host syncs of a pipeline run, uncached and cached."""
    counts = count_syncs()
    return format_table(
        ["12 DDIM steps", "host syncs in the profile", "more than uncached"],
        [[name, str(count), str(count - counts["uncached"])] for name, count in counts.items()],
    )
