"""Trains the judges that come with skipcache: of items, of captioned pictures and of clips.

    python examples/fashion_video/train_judges.py

Each is a small classifier with the features of real pictures that were held out, on which
``skipcache bench`` measures accuracy and Fréchet distances.
"""

import argparse
from pathlib import Path

import neighbours  # noqa: F401
import torch
from safetensors.torch import save_file

# isort: split
from captions import draw_pictures

import data
from evaluate import draw_clips
from judge import train_classifier
from skipcache.demo.captions import CLASS_NAMES, MOTIONS, PICTURE_ANSWERS
from skipcache.demo.judge import FOLDER, JUDGES, Classifier


@torch.no_grad()
def save(model: Classifier, real: torch.Tensor, path: Path) -> None:
    """Writes the weights and the sums of the features of real pictures [N, C, 32, 32]."""
    features = torch.cat([model(batch) for batch in real.split(500)]).double()
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors |= {"features_sum": features.sum(0), "features_cov_sum": features.T @ features}
    save_file({**tensors, "count": torch.tensor(len(real))}, path)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB, {len(real)} real pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=data.DEFAULT_FOLDER)
    parser.add_argument("--out", type=Path, default=FOLDER)
    judges = sorted(set(JUDGES.values()))
    parser.add_argument("--only", nargs="+", choices=judges, default=judges)
    parser.add_argument("--pictures", type=int, default=60000, help="that the judges learn from")
    parser.add_argument("--clips", type=int, default=16000, help="that the judge learns from")
    parser.add_argument("--real", type=int, default=10000, help="held-out ones, for the distances")
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()

    if "class-to-image" in args.only:
        train, labels = data.load("train", args.data)
        test, _ = data.load("t10k", args.data)
        pictures, labels = train[: args.pictures].float() / 255, labels[: args.pictures, None]
        model = train_classifier(pictures, labels, [len(CLASS_NAMES)], args.epochs)
        save(model, test[: args.real].float() / 255, args.out / "class-to-image.safetensors")
    if "text-to-image" in args.only:
        pictures, labels = draw_pictures("train", args.data, args.pictures)
        answers = [*map(len, PICTURE_ANSWERS)]
        model = train_classifier(pictures, labels, answers, args.epochs)
        real, _ = draw_pictures("t10k", args.data, args.real)
        save(model, real, args.out / "text-to-image.safetensors")
    if "video" in args.only:
        clips, labels = draw_clips("train", args.data, args.clips)
        answers = [len(CLASS_NAMES), len(MOTIONS)]
        model = train_classifier(clips, labels, answers, args.epochs + 2)
        real, _ = draw_clips("t10k", args.data, args.real)
        save(model, real, args.out / "video.safetensors")


if __name__ == "__main__":
    main()
