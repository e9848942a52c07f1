"""How good the demo model's samples are, uncached and cached: class accuracy and Fréchet distance.

    python examples/fashion_dit/evaluate.py --pipeline skipcache/demo/fashion_dit --out runs/quality

The judge is a small convolutional classifier trained here on the same training pictures; the
Fréchet distance (torchmetrics) is between its 64 penultimate features of the samples and of the 10
000 test pictures, so it compares with other figures of this script only. Reference points: training
pictures, and the autoencoder's reconstructions.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiTPipeline
from PIL import Image
from tqdm import tqdm

import data
from judge import Classifier, judge, train_classifier
from skipcache import cache_stats, skip_cache

METHODS = {
    "uncached": None,
    "interval 2": {},
    "interval 3": {"interval": 3},
    "interval 2, hold": {"estimator": "hold"},
}


def score(
    model: Classifier, pictures: torch.Tensor, labels: torch.Tensor, real: torch.Tensor
) -> str:
    return " | ".join(judge(model, pictures, labels[:, None], real).cells())


@torch.no_grad()
def sample(
    pipeline: DiTPipeline, count: int, steps: int, guidance: float
) -> tuple[torch.Tensor, torch.Tensor]:
    pictures, labels = [], []
    for start in tqdm(range(0, count, 100)):
        label = [i % len(data.CLASS_NAMES) for i in range(start, min(count, start + 100))]
        generator = torch.Generator().manual_seed(start)
        output = pipeline(
            label,
            guidance_scale=guidance,
            num_inference_steps=steps,
            generator=generator,
            output_type="pt",
        )
        pictures.append(output.images)
        labels += label
    return torch.cat(pictures), torch.tensor(labels)


def save_grid(pictures: torch.Tensor, path: Path, rows: int = 10, columns: int = 10) -> None:
    """The first rows x columns pictures, three times enlarged."""
    cells = pictures[: rows * columns, 0].reshape(rows, columns, 32, 32).transpose(1, 2)
    sheet = (cells.reshape(rows * 32, columns * 32) * 255).round().to(torch.uint8).numpy()
    image = Image.fromarray(sheet)
    image.resize((image.width * 3, image.height * 3), Image.Resampling.BICUBIC).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=data.DEFAULT_FOLDER)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    train, train_labels = data.load("train", args.data)
    test, test_labels = data.load("t10k", args.data)
    train, test = train.float() / 255, test.float() / 255
    model = train_classifier(train, train_labels[:, None], [len(data.CLASS_NAMES)], args.epochs)
    pipeline = DiTPipeline.from_pretrained(args.pipeline, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    rows = [f"| test pictures | {score(model, test, test_labels, test)} | |"]
    few, few_labels = train[: args.samples], train_labels[: args.samples]
    rows.append(f"| training pictures, {len(few)} | {score(model, few, few_labels, test)} | |")
    with torch.no_grad():
        decoded = torch.cat(
            [pipeline.vae(batch * 2 - 1).sample / 2 + 0.5 for batch in few.split(250)]
        ).clamp(0, 1)
    rows.append(f"| their reconstructions | {score(model, decoded, few_labels, test)} | |")
    for name, options in METHODS.items():
        if options is None:
            pictures, labels = sample(pipeline, args.samples, args.steps, args.guidance_scale)
            save_grid(pictures, args.out / "samples.png")
            layers = ""
        else:
            with skip_cache(pipeline, **options):
                pictures, labels = sample(pipeline, args.samples, args.steps, args.guidance_scale)
                layers = f"{100 * cache_stats(pipeline).compute_fraction:.0f} %"
        rows.append(f"| samples, {name} | {score(model, pictures, labels, test)} | {layers} |")
    print(f"\n{args.samples} samples, {args.steps} DDIM steps, guidance {args.guidance_scale:g}\n")
    print(
        "| pictures | class accuracy, % | Fréchet distance | layers run |\n"
        "| --- | --- | --- | --- |"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
