"""What the closed-form fit is worth on the demo model."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from skipcache import api
from skipcache.branches.fit import fit_skip_branches
from skipcache.evaluation.metrics import psnr
from skipcache.evaluation.timing import format_table

ESTIMATORS = ("hold", "residual", "taylor(1)", "taylor(2)")
CASES = ((50, (3, 4, 5, 6)), (20, (2, 3)))
BUCKETS = 5


def call_of(steps: int) -> dict[str, Any]:
    """Ten classes at guidance 2."""
    return {
        "class_labels": list(range(10)),
        "guidance_scale": 2.0,
        "num_inference_steps": steps,
        "output_type": "pt",
    }


def demo_fit(pipeline: Any) -> Any:
    """The fit that comes with the demo model: 100 samples of 50 steps, the last ten held out."""
    return fit_skip_branches(pipeline, [call_of(50)] * 10, time_buckets=BUCKETS, seed=10_000)


def fits(seeds: int = 8) -> str:
    """Fits the demo model, and compares the fit with every estimator.

    Two tables: squared error of the deep feature on held-out trajectories, relative to that of
    ``hold``; and PSNR to the uncached pictures, dB, mean and standard deviation over seeds.
    """
    from skipcache.demo import load_pipeline

    pipeline = load_pipeline()
    begun = time.perf_counter()
    fit = demo_fit(pipeline)
    title = f"Fitted in {time.perf_counter() - begun:.0f} s with {torch.get_num_threads()} threads."
    cells = sorted(fit.cells, key=lambda cell: (cell.refreshes, cell.bucket, cell.distance))
    errors = [
        [
            f"{cell.distance:.2f}",
            f"{1 - (cell.bucket + 1) / BUCKETS:.1f} to {1 - cell.bucket / BUCKETS:.1f}",
            str(cell.refreshes),
            f"{cell.error_before:.2f}",
            f"{cell.error_after:.2f}",
        ]
        for cell in cells
    ]
    columns = ["distance", "time", "refreshes", "taylor(2)", "fitted"]

    def sample(seed: int, steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        images: torch.Tensor = pipeline(**call_of(steps), generator=generator).images
        return images

    rows = []
    for steps, intervals in CASES:
        uncached = [sample(seed, steps) for seed in range(seeds)]
        for interval in intervals:
            row = [str(steps), str(interval)]
            for name in (*ESTIMATORS, "fitted"):
                what = {"branches": fit} if name == "fitted" else {"estimator": name}
                with api.skip_cache(pipeline, interval=interval, **what):
                    values = [psnr(sample(s, steps), uncached[s]) for s in range(seeds)]
                row.append(f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}")
            rows.append(row)
    quality = format_table(["steps", "interval", *ESTIMATORS, "fitted"], rows)
    return "\n\n".join([title, format_table(columns, errors), quality])
