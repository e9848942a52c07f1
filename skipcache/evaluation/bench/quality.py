"""How far samples are from the uncached ones, and from real pictures."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from skipcache.evaluation.bench.results import Frechet, Spread
from skipcache.evaluation.bench.subjects import Features
from skipcache.evaluation.metrics import psnr

IDENTICAL_DB = 200.0  # stands for an infinite PSNR in a file
BOOTSTRAPS = 100


def spread_of(values: Sequence[float]) -> Spread:
    """Values with their mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(tuple(values), statistics.fmean(values), deviation)


def psnr_of(pictures: torch.Tensor, reference: torch.Tensor) -> Spread:
    """A value a sample, computed in float and at most 200 dB, from [N, ...] in 0..1."""
    pairs = zip(pictures, reference, strict=True)
    return spread_of([min(psnr(a.float(), b.float()), IDENTICAL_DB) for a, b in pairs])


def ssim_of(pictures: torch.Tensor, reference: torch.Tensor) -> Spread:
    """Structural similarity a sample, of pictures [N, C, H, W] or the frames of clips
    [N, F, C, H, W].
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = []
    for one, other in zip(pictures.float(), reference.float(), strict=True):
        frames, due = (x if x.dim() == 4 else x[None] for x in (one, other))
        found: Any = structural_similarity_index_measure(frames, due, data_range=1.0)
        values.append(float(found))
    return spread_of(values)


def lpips_of(pictures: torch.Tensor, reference: torch.Tensor) -> Spread | None:
    """Learned perceptual distance a sample; None where torchvision or the weights are missing."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    values = []
    for one, other in zip(pictures.float(), reference.float(), strict=True):
        frames, due = (x if x.dim() == 4 else x[None] for x in (one, other))
        frames, due = (x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x for x in (frames, due))
        try:
            values.append(
                float(learned_perceptual_image_patch_similarity(frames, due, normalize=True))
            )
        except (OSError, RuntimeError):  # no weights on the disk, no network
            return None
    return spread_of(values)


def latent_error_of(latents: torch.Tensor, reference: torch.Tensor) -> Spread:
    """||latents - reference|| / ||reference|| a sample, of [N, ...]."""
    flat, due = (x.double().flatten(1) for x in (latents, reference))
    errors = (flat - due).norm(dim=1) / due.norm(dim=1)
    return spread_of(errors.tolist())


def clip_score_of(pictures: torch.Tensor, captions: Sequence[str], folder: str) -> float:
    """Mean CLIP score of pictures and their captions, by a model in a folder."""
    from torchmetrics.multimodal.clip_score import CLIPScore

    path: Any = folder
    metric: Any = CLIPScore(model_name_or_path=path)
    frames = pictures if pictures.dim() == 4 else pictures[:, pictures.shape[1] // 2]
    frames = frames.expand(-1, 3, -1, -1) if frames.shape[1] == 1 else frames
    metric.update((frames.clamp(0, 1) * 255).round().to(torch.uint8), list(captions))
    return float(metric.compute())


def frechet_distance(features: torch.Tensor, real: Features) -> float:
    """Between features [N, D], float64, and those of the real pictures (torchmetrics)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    extractor = torch.nn.Identity()
    extractor.num_features = features.shape[1]  # type: ignore[assignment]
    metric: Any = FrechetInceptionDistance(feature=extractor, input_img_size=(1, 8, 8))
    metric.update(features, real=False)
    metric.update(features[:1], real=True)  # its sums are known:
    metric.real_features_sum = real.real_sum
    metric.real_features_cov_sum = real.real_cov_sum
    metric.real_features_num_samples = torch.tensor(real.real_count)
    return float(metric.compute())


def bootstrap_distances(features: torch.Tensor, real: Features) -> torch.Tensor:
    """Distances of samples drawn with replacement, by the same indices whatever the features are:
    [BOOTSTRAPS].
    """
    generator = torch.Generator().manual_seed(0)
    count = len(features)
    picks = (torch.randint(count, (count,), generator=generator) for _ in range(BOOTSTRAPS))
    return torch.tensor([frechet_distance(features[pick], real) for pick in picks]).double()


def frechet_of(
    features: torch.Tensor, baseline: float, baseline_bootstraps: torch.Tensor, real: Features
) -> Frechet:
    """The distance, and its drift from the baseline's with a 95 % interval.

    The interval is a bootstrap over samples, of both sets at once, since sample i of both began at
    the same noise. It is centred on the drift: drawing with replacement raises distances by itself.

    Args:
        features: [N, D] of the method's samples, float64.
        baseline: the distance of the uncached ones.
        baseline_bootstraps: their ``bootstrap_distances``.
        real: of the reference set.
    """
    value = frechet_distance(features, real)
    drifts = bootstrap_distances(features, real) - baseline_bootstraps
    ends = (drifts - drifts.mean()).quantile(torch.tensor([0.025, 0.975]).double())
    drift = value - baseline
    return Frechet(value, drift, drift + float(ends[0]), drift + float(ends[1]), len(features))
