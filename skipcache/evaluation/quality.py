"""How near the cached pictures of the demo model come to the uncached ones, by estimator."""

from __future__ import annotations

import statistics

import torch

from skipcache import api
from skipcache.evaluation.metrics import psnr
from skipcache.evaluation.timing import format_table

ESTIMATORS = ("hold", "residual", "taylor(1)", "taylor(2)", "taylor(3)")


def estimators(
    seeds: int = 8, steps: tuple[int, ...] = (50, 20), intervals: tuple[int, ...] = (2, 3, 4)
) -> str:
    """PSNR to the uncached pictures, dB, mean and standard deviation over seeds of ten classes."""
    from skipcache.demo import load_pipeline

    pipeline = load_pipeline()

    def sample(seed: int, count: int) -> torch.Tensor:
        output = pipeline(
            list(range(10)),
            guidance_scale=2.0,
            num_inference_steps=count,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        )
        images: torch.Tensor = output.images
        return images

    rows = []
    for count in steps:
        uncached = [sample(seed, count) for seed in range(seeds)]
        for interval in intervals:
            row = [str(count), str(interval)]
            for name in ESTIMATORS:
                with api.skip_cache(pipeline, interval=interval, estimator=name):
                    values = [psnr(sample(s, count), uncached[s]) for s in range(seeds)]
                    stats = api.cache_stats(pipeline)
                row.append(f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}")
            row.insert(2, f"{1 / stats.compute_fraction:.2f}")
            rows.append(row)
    return format_table(["steps", "interval", "layers saved, x", *ESTIMATORS], rows)
