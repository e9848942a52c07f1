"""How good the pictures of captions are, uncached and cached: accuracy, Fréchet distance, speed.

    python examples/fashion_text/evaluate.py

The judge is a small classifier of everything a caption can say, trained here on drawn training
items; distances are to drawn test items, and grow with fewer samples, so that the training
pictures, as many as are sampled, are what to compare with.
"""

import argparse
from pathlib import Path
from typing import Any

import neighbours  # noqa: F401
import torch

# isort: split
from captions import ATTRIBUTES, draw_attributes, draw_pictures, leave_unsaid

import data
from compare import Method, sample_in_turns, table
from judge import train_classifier
from skipcache.demo import TASKS, load_pipeline
from skipcache.demo.captions import PICTURE_ANSWERS, picture_caption

METHODS = {
    "uncached": None,
    "interval 2 (default)": {},
    "interval 3": {"interval": 3},
    "interval 4": {"interval": 4},
    "interval 2, taylor(2)": {"estimator": "taylor(2)"},
    "interval 3, taylor(2)": {"interval": 3, "estimator": "taylor(2)"},
}


def plan_calls(
    count: int, batch_size: int, options: dict[str, Any]
) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Calls of the pipeline, and what each picture should show as its caption says it."""
    generator = torch.Generator().manual_seed(1)
    classes = torch.arange(count) % len(data.CLASS_NAMES)
    said = leave_unsaid(draw_attributes(classes, generator), 0.0, generator)
    calls = [
        {
            "prompt": [picture_caption(*parts) for parts in batch.tolist()],
            "use_resolution_binning": False,
        }
        | options
        for batch in said.split(batch_size)
    ]
    return calls, said


@torch.no_grad()
def reconstruct(pipeline: Any, pictures: torch.Tensor) -> torch.Tensor:
    """The pictures through the autoencoder and back."""
    parts = [pipeline.vae(batch * 2 - 1).sample / 2 + 0.5 for batch in pictures.split(250)]
    return torch.cat(parts).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=data.DEFAULT_FOLDER)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=20, help="pictures sampled at a time")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, help="default: that of the demo")
    parser.add_argument("--pictures", type=int, default=60000, help="that the judge learns from")
    parser.add_argument("--real", type=int, default=10000, help="test pictures to compare with")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()

    train, train_labels = draw_pictures("train", args.data, args.pictures)
    test, test_labels = draw_pictures("t10k", args.data, args.real)
    model = train_classifier(train, train_labels, [*map(len, PICTURE_ANSWERS)], args.epochs)
    pipeline = load_pipeline(task="text-to-image")
    methods = {name: Method(pipeline, given, "uncached") for name, given in METHODS.items()}
    few, few_labels = train[: args.samples], train_labels[: args.samples]
    guidance = args.guidance_scale or TASKS["text-to-image"].guidance_scale
    options = {"num_inference_steps": args.steps, "guidance_scale": guidance}
    calls, said = plan_calls(args.samples, args.batch_size, options)
    samples = sample_in_turns(methods, calls)
    print(f"\n{args.samples} samples, {args.steps} DDIM steps, guidance {guidance:g}\n")
    references = {
        "test pictures": (test, test_labels),
        f"training pictures, {len(few)}": (few, few_labels),
        "their reconstructions": (reconstruct(pipeline, few), few_labels),
    }
    print(
        table(
            methods,
            samples,
            references,
            model=model,
            labels=said,
            real=test,
            questions=("class", *ATTRIBUTES[1:]),
        )
    )


if __name__ == "__main__":
    main()
