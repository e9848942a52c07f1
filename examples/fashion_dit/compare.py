"""Samples by several methods in turns, and how far each is from its uncached samples."""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from judge import Classifier, judge
from skipcache import cache_stats, skip_cache
from skipcache.evaluation.timing import DenoisingTimer, format_table


@dataclass(frozen=True)
class Method:
    """A pipeline, options of ``skip_cache`` (None: no cache), and what it is compared with."""

    pipeline: DiffusionPipeline
    options: Mapping[str, Any] | None
    baseline: str


@dataclass
class Samples:
    """What one method made: pictures [N, F, H, W] in 0..1, and the seconds of each call."""

    pictures: torch.Tensor
    seconds: list[float] = field(default_factory=list)
    layers_run: str = "100 %"


def sample_in_turns(
    methods: Mapping[str, Method], calls: Sequence[Mapping[str, Any]]
) -> dict[str, Samples]:
    """Runs every call by each method, one method after the other, so that none has a quieter
    machine. The noise of a call is the same for all.
    """
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in methods}
    samples = {name: Samples(torch.empty(0)) for name in methods}
    with tqdm(total=len(calls) * len(methods), desc="sampling") as bar:
        for number, call in enumerate(calls):
            for name, method in methods.items():
                options, pipeline = method.options, method.pipeline
                caching = nullcontext() if options is None else skip_cache(pipeline, **options)
                with caching, DenoisingTimer(pipeline) as timer:
                    output = pipeline(
                        **call,
                        generator=torch.Generator().manual_seed(number),
                        output_type="pt",
                        return_dict=False,
                    )[0]
                    if options is not None:
                        share = cache_stats(pipeline).compute_fraction
                        samples[name].layers_run = f"{100 * share:.0f} %"
                parts[name].append(output.float().flatten(1, -3))
                samples[name].seconds.append(timer.seconds)
                bar.update()
    for name, pictures in parts.items():
        samples[name].pictures = torch.cat(pictures)
    return samples


def mean_psnr_db(pictures: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over samples of each one's PSNR to its reference, full scale 1."""
    error = (pictures.double() - reference.double()).square().flatten(1).mean(1)
    return float((-10 * error.clamp_min(1e-12).log10()).mean())


def table(
    methods: Mapping[str, Method],
    samples: Mapping[str, Samples],
    references: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    model: Classifier,
    labels: torch.Tensor,
    real: torch.Tensor,
    questions: Sequence[str],
) -> str:
    """Markdown: reference rows of pictures and labels first, then a row for each method."""
    rows = [
        [name, "", "", "", *judge(model, pictures, wanted, real).cells()]
        for name, (pictures, wanted) in references.items()
    ]
    for name, method in methods.items():
        found, base = samples[name], samples[method.baseline]
        # Each call beside the same call without the cache: the machine may change in between.
        pairs = zip(base.seconds, found.seconds, strict=True)
        is_cached = method.options is not None
        rows.append(
            [
                name,
                f"{statistics.median(before / after for before, after in pairs):.2f}x",
                found.layers_run,
                f"{mean_psnr_db(found.pictures, base.pictures):.1f}" if is_cached else "-",
                *judge(model, found.pictures, labels, real).cells(),
            ]
        )
    answers = [f"{question}, %" for question in questions]
    header = ["", "speedup", "layers run", "PSNR to uncached, dB", *answers, "Fréchet distance"]
    return format_table(header, rows)
