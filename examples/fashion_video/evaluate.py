"""How good the clips are, uncached and cached: item and motion accuracy, Fréchet distance, speed.

    python examples/fashion_video/evaluate.py --task class-to-video
    python examples/fashion_video/evaluate.py --task text-to-video

For class-to-video it prints the paper's table: the plain model and the Skip-DiT of the same budget,
each against its own uncached clips. The judge is a small classifier trained here on rendered clips
of training items; distances are to clips of test items, and grow with fewer samples, so that the
training clips, as many as are sampled, are what to compare with.
"""

import argparse
from pathlib import Path
from typing import Any

import neighbours  # noqa: F401
import torch
from diffusers import AutoencoderKL

# isort: split
from encode_clips import decode, encode
from motions import FRAMES, MOTIONS, label_of, render_clips

import data
from compare import Method, sample_in_turns, table
from judge import train_classifier
from skipcache.demo import TASKS, load_pipeline
from skipcache.demo.captions import clip_caption, spread_clips

CALL = {
    "class-to-video": {},
    "text-to-video": {"height": 32, "width": 32, "video_length": FRAMES, "clean_caption": False},
}


def draw_clips(
    split: str, folder: Path, count: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips [N, F, 32, 32] in 0..1 of random items and motions, and which: int64 [N, 2]."""
    items, labels = data.load(split, folder)
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(len(items), (count,), generator=generator)
    motions = torch.randint(len(MOTIONS), (count,), generator=generator)
    parts = zip(pick.split(1000), motions.split(1000), strict=True)
    clips = torch.cat([render_clips(items[part], moved, generator)[:, 0] for part, moved in parts])
    return clips, torch.stack([labels[pick], motions], 1)


def plan_calls(
    task: str, count: int, batch_size: int, options: dict[str, Any]
) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Calls of the pipeline for all items and motions in turn, and what each clip should show."""
    shown = torch.tensor(spread_clips(count))
    calls = []
    for part in shown.split(batch_size):
        if task == "class-to-video":
            subject = {"class_labels": label_of(*part.T).tolist()}
        else:
            subject = {"prompt": [clip_caption(item, motion) for item, motion in part.tolist()]}
        calls.append({**subject, **CALL[task], **options})
    return calls, shown


def plan_methods(task: str, intervals: list[int], has_default: bool) -> dict[str, Method]:
    """The rows, with the pipelines they sample."""
    pipeline = load_pipeline(task=task)
    if task == "text-to-video":
        methods = {"uncached": Method(pipeline, None, "uncached")}
        for interval in intervals:
            given = {"interval": interval}
            methods[f"interval {interval}"] = Method(pipeline, given, "uncached")
            given = {"interval": interval, "preset": "skip-dit/latte-t2v"}
            methods[f"interval {interval}, hold"] = Method(pipeline, given, "uncached")
        return methods
    methods = {}
    skip_pipeline = load_pipeline(task=task, has_branches=True)
    for name, pipe in (("plain", pipeline), ("Skip-DiT", skip_pipeline)):
        baseline = f"{name}, uncached"
        methods[baseline] = Method(pipe, None, baseline)
        for interval in intervals:
            given = {"interval": interval, "preset": "skip-dit/latte-c2v"}
            methods[f"{name}, N = {interval}"] = Method(pipe, given, baseline)
    if has_default:
        for interval in intervals:
            given = {"interval": interval}
            name = f"plain, N = {interval}, taylor(2)"
            methods[name] = Method(pipeline, given, "plain, uncached")
    return methods


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=CALL, default="class-to-video")
    parser.add_argument("--data", type=Path, default=data.DEFAULT_FOLDER)
    parser.add_argument("--samples", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=8, help="clips sampled at a time")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, help="default: that of the demo")
    parser.add_argument("--intervals", type=int, nargs="+", help="default: 2 to 6, or 2 to 4")
    parser.add_argument(
        "--with-default", action="store_true", help="the plain model by skipcache's default too"
    )
    parser.add_argument("--clips", type=int, default=16000, help="that the judge learns from")
    parser.add_argument("--real", type=int, default=4000, help="test clips to compare with")
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()

    train, train_labels = draw_clips("train", args.data, args.clips)
    test, test_labels = draw_clips("t10k", args.data, args.real)
    answers = (len(data.CLASS_NAMES), len(MOTIONS))
    model = train_classifier(train, train_labels, answers, args.epochs)

    intervals = args.intervals or ([2, 3, 4, 5, 6] if args.task == "class-to-video" else [2, 3, 4])
    methods = plan_methods(args.task, intervals, args.with_default)
    vae: AutoencoderKL = next(iter(methods.values())).pipeline.vae
    few, few_labels = train[: args.samples], train_labels[: args.samples]
    decoded = decode(vae, encode(vae, few[:, None]))[:, 0]
    guidance = args.guidance_scale or TASKS[args.task].guidance_scale
    options = {"num_inference_steps": args.steps, "guidance_scale": guidance}
    calls, wanted = plan_calls(args.task, args.samples, args.batch_size, options)
    samples = sample_in_turns(methods, calls)
    print(f"\n{args.samples} samples, {args.steps} DDIM steps, guidance {guidance:g}\n")
    references = {
        "test clips": (test, test_labels),
        f"training clips, {len(few)}": (few, few_labels),
        "their reconstructions": (decoded, few_labels),
    }
    print(
        table(
            methods,
            samples,
            references,
            model=model,
            labels=wanted,
            real=test,
            questions=("item", "motion"),
        )
    )


if __name__ == "__main__":
    main()
