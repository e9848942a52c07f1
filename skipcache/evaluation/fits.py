"""What the closed-form fit is worth on the demo model."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from skipcache import api
from skipcache.branches.fit import fit_skip_branches
from skipcache.branches.fitted import FittedBranches
from skipcache.evaluation.metrics import psnr
from skipcache.evaluation.timing import format_table

ESTIMATORS = ("hold", "residual", "taylor(1)", "taylor(2)")
CASES = ((50, (2, 3, 4, 5, 6)), (20, (2, 3)))
CALLS, LABELS, BUCKETS = 16, 20, 50
RANK, FULL_RANK_ABOVE = 24, 0.7
FIRST_SEED = 10_000  # of the calls fitted on; those compared have seeds from 0


def call_of(steps: int, labels: int = 10, guidance: float = 2.0) -> dict[str, Any]:
    """The ten classes in turns."""
    return {
        "class_labels": [label % 10 for label in range(labels)],
        "guidance_scale": guidance,
        "num_inference_steps": steps,
    }


def sample_classes(
    pipeline: Any, seed: int, steps: int, labels: int = 10, guidance: float = 2.0
) -> torch.Tensor:
    """Pictures [B, C, H, W] in 0..1 of that call."""
    generator = torch.Generator().manual_seed(seed)
    call = call_of(steps, labels, guidance)
    images: torch.Tensor = pipeline(**call, generator=generator, output_type="pt").images
    return images


def demo_fit(pipeline: Any) -> FittedBranches:
    """The fit that comes with the demo model: 320 samples of 50 steps, 20 of them held out."""
    return fit_skip_branches(
        pipeline,
        [{**call_of(50, LABELS), "output_type": "latent"}] * CALLS,
        time_buckets=BUCKETS,
        rank=RANK,
        full_rank_above=FULL_RANK_ABOVE,
        seed=FIRST_SEED,
    )


def error_table(fit: FittedBranches) -> str:
    """Squared error of the deep feature on held-out trajectories by distance in steps of fifty,
    relative to that of ``hold``, mean over time.
    """
    rows = []
    for distance in range(1, 6):
        cells = [cell for cell in fit.cells if abs(50 * cell.distance - distance) < 0.1]
        before, after = (
            statistics.mean(getattr(cell, name) for cell in cells)
            for name in ("error_before", "error_after")
        )
        worst = max(cell.error_after / cell.error_before for cell in cells)
        rows.append([str(distance), "1.00", f"{before:.2f}", f"{after:.2f}", f"{worst:.2f}"])
    columns = ["distance, steps of 50", "hold", "residual", "fitted", "worst fitted / residual"]
    return format_table(columns, rows)


def fits(seeds: int = 4) -> str:
    """Fits the demo model, and compares the fit with every estimator.

    Two tables: the error of the deep feature, and PSNR to the uncached pictures in dB, mean over
    the pictures and standard deviation over seeds of ten classes.
    """
    from skipcache.demo import load_pipeline

    pipeline = load_pipeline()
    begun = time.perf_counter()
    fit = demo_fit(pipeline)
    seconds = time.perf_counter() - begun

    rows = []
    for steps, intervals in CASES:
        uncached = [sample_classes(pipeline, seed, steps) for seed in range(seeds)]
        for interval in intervals:
            row = [str(steps), str(interval)]
            for name in (*ESTIMATORS, "fitted"):
                what = {"branches": fit} if name == "fitted" else {"estimator": name}
                with api.skip_cache(pipeline, interval=interval, **what):
                    found = [sample_classes(pipeline, seed, steps) for seed in range(seeds)]
                    values = list(map(_mean_psnr, found, uncached))
                row.append(f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}")
            rows.append(row)
    quality = format_table(["steps", "interval", *ESTIMATORS, "fitted"], rows)
    title = f"Fitted in {seconds:.0f} s with {torch.get_num_threads()} threads."
    return "\n\n".join([title, error_table(fit), quality])


def _mean_psnr(images: torch.Tensor, references: torch.Tensor) -> float:
    pairs = zip(images, references, strict=True)
    return statistics.mean(psnr(image, reference) for image, reference in pairs)
