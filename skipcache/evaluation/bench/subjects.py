"""What is sampled: a pipeline, what it is asked for, and who judges the samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from skipcache.errors import ConfigError, TargetError
from skipcache.targets import transformers_of

DEFAULT_PROMPTS = (
    "a red bicycle leaning on a white wall",
    "a bowl of lemons on a wooden table",
    "a lighthouse on a cliff at dusk",
    "a grey cat asleep on a blue sofa",
    "a street market in the rain, umbrellas",
    "a steam train crossing a stone bridge",
    "an old library with tall shelves",
    "a fox in fresh snow",
)


@dataclass(frozen=True)
class Features:
    """What Fréchet distances are taken between.

    Attributes:
        extract: pictures [N, C, H, W], or clips [N, F, C, H, W], in 0..1 to [N, D].
        real_sum: [D], the sum over real pictures.
        real_cov_sum: [D, D], the sum of their outer products.
        real_count: how many they were.
    """

    extract: Callable[[torch.Tensor], torch.Tensor]
    real_sum: torch.Tensor
    real_cov_sum: torch.Tensor
    real_count: int


@dataclass(frozen=True)
class Subject:
    """A pipeline and what it is asked for.

    Attributes:
        name: of the demo task, folder or hub id.
        pipeline: the pipeline.
        argument: the keyword that says what a sample shows: ``"class_labels"`` or ``"prompt"``.
        asked: what sample i shows is ``asked[i % len(asked)]``.
        captions: of these, in words.
        call: the other keywords of the call, ``num_inference_steps`` among them.
        batch_size: samples a call.
        features: for Fréchet distances; None: none are taken.
        is_right: pictures and their indices to a bool each, whether they show what was asked for.
        clip_folder: a CLIP model for the CLIP score; None: none is taken.
    """

    name: str
    pipeline: Any
    argument: str
    asked: Sequence[Any]
    captions: Sequence[str]
    call: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    features: Features | None = None
    is_right: Callable[[torch.Tensor, Sequence[int]], torch.Tensor] | None = None
    clip_folder: str | None = None

    @property
    def steps(self) -> int:
        """Denoising steps of the uncached run."""
        return int(self.call["num_inference_steps"])

    def batches(self, samples: int) -> list[range]:
        """Indices of the samples of each call."""
        starts = range(0, samples, self.batch_size)
        return [range(start, min(samples, start + self.batch_size)) for start in starts]

    def call_of(self, batch: range, seed: int) -> dict[str, Any]:
        """Keywords of the call for these samples; noise is drawn from the seed and the batch."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + batch.start)
        asked = [self.asked[i % len(self.asked)] for i in batch]
        return {**self.call, self.argument: asked, "generator": generator}


def load_subject(
    name: str,
    *,
    steps: int | None = None,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    call: Mapping[str, Any] | None = None,
    reference: str | None = None,
    features: Callable[[torch.Tensor], torch.Tensor] | None = None,
    clip_folder: str | None = None,
    device: str | None = None,
) -> Subject:
    """A demo task by its name (``"demo"`` is class-to-image), or a pipeline by folder or hub id.

    Args:
        name: which.
        steps: denoising steps; default 50, or the pipeline's own default.
        prompts: for pipelines that take prompts; default: eight of ours.
        labels: for those that take class labels; default 0 to 7.
        guidance_scale: default: the pipeline's own.
        batch_size: samples a call; default 8, for the demo its own.
        call: further keywords of the call (height, width, num_frames, ...).
        reference: folder of real pictures for Fréchet distances, with ``features``.
        features: pictures to [N, D].
        clip_folder: folder of a CLIP model.
        device: to move the pipeline to; default: a GPU if there is one.

    Raises:
        ConfigError: no such demo, steps below 1, or a pipeline that takes neither prompts nor
            labels.
        TargetError: it has no transformer.
        OSError: no such folder or hub id.
    """
    if steps is not None and steps < 1:
        raise ConfigError(f"steps is {steps!r}. At least one is needed.")
    demo = _demo_task(name)
    if demo is not None:
        subject = _demo_subject(demo, steps, guidance_scale, batch_size)
        asked = labels if subject.argument == "class_labels" else prompts
        if asked is not None:
            captions = [str(item) for item in asked]
            subject = replace(subject, asked=asked, captions=captions, is_right=None)
    else:
        subject = _pipeline_subject(name, steps, prompts, labels, guidance_scale, batch_size)
    given: dict[str, Any] = {"call": {**subject.call, **(call or {})}, "clip_folder": clip_folder}
    if reference is not None:
        if features is None:
            raise ConfigError("a reference set needs features: a function of pictures.")
        given["features"] = reference_features(Path(reference), features)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    subject.pipeline.to(device)
    return replace(subject, **given)


def _demo_task(name: str) -> str | None:
    from skipcache.demo.model import DEFAULT_TASK, MODELS

    if name == "demo":
        return DEFAULT_TASK
    return name if name in MODELS else None


def _demo_subject(
    task: str, steps: int | None, guidance_scale: float | None, batch_size: int | None
) -> Subject:
    from skipcache.demo import captions as said
    from skipcache.demo.judge import judge_of
    from skipcache.demo.model import CLASS_NAMES, MOTIONS, load_pipeline
    from skipcache.demo.tasks import task_named

    shown = task_named(task)
    argument = "class_labels" if "class_labels" in shown.call else "prompt"
    rest = {name: value for name, value in shown.call.items() if name != argument}
    asked: list[Any]
    wanted: Sequence[Sequence[int]]
    if task == "class-to-image":
        asked, captions = list(range(len(CLASS_NAMES))), list(CLASS_NAMES)
        wanted = [[label] for label in asked]
    elif task == "text-to-image":
        wanted = said.spread_pictures(400)
        asked = captions = [said.picture_caption(*parts) for parts in wanted]
    else:
        wanted = said.spread_clips(80)
        asked = captions = [said.clip_caption(*parts) for parts in wanted]
        if task == "class-to-video":
            asked = [item * len(MOTIONS) + motion for item, motion in wanted]
            captions = [f"{CLASS_NAMES[item]} {MOTIONS[motion]}" for item, motion in wanted]
    judge = judge_of(task)

    def is_right(pictures: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
        due = torch.tensor([wanted[i % len(wanted)] for i in indices])
        return (judge.answers(pictures) == due).all(1)

    guidance = shown.guidance_scale if guidance_scale is None else guidance_scale
    return Subject(
        name=task,
        pipeline=load_pipeline(task=task),
        argument=argument,
        asked=asked,
        captions=captions,
        call={**rest, "num_inference_steps": steps or 50, "guidance_scale": guidance},
        batch_size=batch_size or (20 if task == "class-to-image" else 4),
        features=Features(judge.features, judge.features_sum, judge.features_cov_sum, judge.count),
        is_right=is_right,
    )


def _pipeline_subject(
    name: str,
    steps: int | None,
    prompts: Sequence[str] | None,
    labels: Sequence[int] | None,
    guidance_scale: float | None,
    batch_size: int | None,
) -> Subject:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(name)
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(disable=True)
    if not transformers_of(pipeline):
        raise TargetError(f"{name!r} has no transformer.")
    parameters = inspect.signature(pipeline.__call__).parameters
    asked: Sequence[Any]
    if "class_labels" in parameters:
        argument, asked = "class_labels", list(labels or range(8))
    elif "prompt" in parameters:
        argument, asked = "prompt", list(prompts or DEFAULT_PROMPTS)
    else:
        raise ConfigError(f"{type(pipeline).__name__} takes neither prompts nor class labels.")
    default = parameters["num_inference_steps"].default
    call: dict[str, Any] = {"num_inference_steps": steps or default}
    if guidance_scale is not None:
        call["guidance_scale"] = guidance_scale
    captions = [str(item) for item in asked]
    return Subject(name, pipeline, argument, asked, captions, call, batch_size or 1)


def reference_features(
    folder: Path, extract: Callable[[torch.Tensor], torch.Tensor], batch_size: int = 64
) -> Features:
    """Of every PNG and JPEG in a folder, all of one size.

    Raises:
        ConfigError: there are fewer than two.
    """
    import numpy
    from PIL import Image

    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if len(paths) < 2:
        raise ConfigError(f"{folder} holds {len(paths)} pictures; a distance needs two or more.")
    parts = []
    for start in range(0, len(paths), batch_size):
        chunk = paths[start : start + batch_size]
        arrays = [numpy.asarray(Image.open(path).convert("RGB")) for path in chunk]
        pictures = torch.from_numpy(numpy.stack(arrays)).permute(0, 3, 1, 2).float() / 255
        parts.append(extract(pictures).double().cpu())
    found = torch.cat(parts)
    return Features(extract, found.sum(0), found.T @ found, len(found))
