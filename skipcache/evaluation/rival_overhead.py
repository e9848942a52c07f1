"""What a cache costs by itself: microseconds a forward on a transformer with nothing to compute."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from skipcache.evaluation import models
from skipcache.evaluation.bench.diffusers_rivals import first_block_cache, taylor_seer
from skipcache.evaluation.bench.methods import UNCACHED, Method, Unavailable, skip_cache_method
from skipcache.evaluation.bench.rivals import db_cache
from skipcache.evaluation.timing import DenoisingTimer, format_table, in_turns

NEVER, ALWAYS = "never reusing", "always reusing"
LARGE = 1e6  # a threshold that nothing exceeds


def rival_overhead(repeats: int = 9, steps: int = 60) -> str:
    """Microseconds a step of a tiny 12-layer DiT, by caches that never and that always reuse."""
    rows = {"skipcache": (_ours(1), _ours(steps))}
    rows["diffusers FirstBlockCache"] = (first_block_cache(0.0), first_block_cache(LARGE))
    rows["diffusers TaylorSeerCache, sublayers"] = (
        taylor_seer(1, "sublayers"),
        taylor_seer(steps, "sublayers", first_steps=1),
    )
    for has, name in ((False, "DBCache"), (True, "DBCache, TaylorSeer")):
        rows[f"cache-dit {name}"] = (
            db_cache(1, 0.0, warmup_steps=1, has_taylor_seer=has),
            db_cache(1, LARGE, warmup_steps=1, has_taylor_seer=has),
        )
    variants: dict[str, Callable[[], float]] = {
        f"uncached, {layers} layers": partial(_seconds, layers, UNCACHED, steps)
        for layers in (12, 2, 1)
    }
    failures: dict[str, str] = {}
    for name, pair in rows.items():
        for kind, method in zip((NEVER, ALWAYS), pair, strict=True):
            try:
                _seconds(12, method, 4)
            except (Unavailable, RuntimeError, ValueError) as reason:
                failures[f"{name}, {kind}"] = str(reason).splitlines()[0][:60]
                continue
            variants[f"{name}, {kind}"] = partial(_seconds, 12, method, steps)
    seconds = in_turns(variants, repeats)
    micros = {name: 1e6 * statistics.median(values) / steps for name, values in seconds.items()}
    full = micros["uncached, 12 layers"]
    table = [
        [f"uncached, {n} layers", f"{micros[f'uncached, {n} layers']:.0f}", "-", "-"]
        for n in (12, 2, 1)
    ]
    for name in rows:
        cells = []
        for kind in (NEVER, ALWAYS):
            found = micros.get(f"{name}, {kind}")
            cells.append(failures[f"{name}, {kind}"] if found is None else f"{found:.0f}")
        never = micros.get(f"{name}, {NEVER}")
        table.append([name, *cells, "-" if never is None else f"{never - full:+.0f}"])
    header = ["cache", f"{NEVER}, us", f"{ALWAYS}, us", "cost of never reusing, us"]
    return format_table(header, table)


def _ours(interval: int) -> Method:
    options: dict[str, Any] = {"interval": interval, "window": (1.0, 0.0), "estimator": "hold"}
    return skip_cache_method(f"interval {interval}", **options)


@cache
def _pipeline(layers: int) -> Any:
    """A DiT pipeline of that depth around a transformer of width 16 on 16 tokens."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    pipeline = DiTPipeline(models.tiny_dit(layers), vae, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _seconds(layers: int, method: Method, steps: int) -> float:
    """Of one denoising loop."""
    pipeline = _pipeline(layers)
    if method.spoils_pipeline:
        pipeline = copy.deepcopy(pipeline)
    with warnings.catch_warnings(), method.applied(pipeline, steps):
        warnings.simplefilter("ignore")
        with DenoisingTimer(pipeline) as timer:
            pipeline(
                [1],
                num_inference_steps=steps,
                guidance_scale=1.0,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            )
    return timer.seconds
