"""Judges of the demo's samples: small classifiers, and the features of real pictures by them.

A distance between features of one judge compares with other distances by the same judge only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from skipcache.errors import ConfigError

FOLDER = Path(__file__).parent / "judges"
NUM_FEATURES = 64
JUDGES = {
    "class-to-image": "class-to-image",
    "class-to-video": "video",
    "text-to-image": "text-to-image",
    "text-to-video": "video",
}
"""Name of the judge of each task."""


class Classifier(nn.Module):
    """Pictures [B, C, 32, 32] in 0..1 to 64 features, with a linear head for each question.

    A clip is a picture with a channel for each frame.
    """

    num_features = NUM_FEATURES

    def __init__(self, answers: Sequence[int], channels: int = 1) -> None:
        """``answers[q]`` is the number of answers to question q."""
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(NUM_FEATURES, count) for count in answers)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """The features [B, 64]."""
        features: torch.Tensor = self.body(pictures)
        return features


@dataclass(frozen=True)
class Judge:
    """A trained classifier, and the sums of the features of real pictures.

    Attributes:
        classifier: in eval mode, on the CPU.
        features_sum: [64], float64.
        features_cov_sum: [64, 64], the sum of outer products, float64.
        count: number of the real pictures.
    """

    classifier: Classifier
    features_sum: torch.Tensor
    features_cov_sum: torch.Tensor
    count: int

    @torch.no_grad()
    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Of pictures [N, 1, 32, 32], or clips [N, F, 1, 32, 32], in 0..1: [N, 64], float64."""
        flat = pictures.float().flatten(1, -3)
        return torch.cat([self.classifier(part) for part in flat.split(250)]).double()

    @torch.no_grad()
    def answers(self, pictures: torch.Tensor) -> torch.Tensor:
        """What it reads in the pictures: int64 [N, number of questions]."""
        features = self.features(pictures).float()
        return torch.stack([head(features).argmax(1) for head in self.classifier.heads], 1)


def judge_of(task: str) -> Judge:
    """The judge of a task's samples.

    Raises:
        ConfigError: it was not trained.
    """
    path = FOLDER / f"{JUDGES[task]}.safetensors"
    if not path.is_file():
        raise ConfigError(f"the judge for {task} is not at {path}. Train it: {RECIPE}")
    from safetensors.torch import load_file

    tensors = load_file(path)
    heads = sorted(name for name in tensors if name.startswith("heads.") and name.endswith("bias"))
    channels = tensors["body.0.weight"].shape[1]
    classifier = Classifier([len(tensors[name]) for name in heads], channels)
    sums = [tensors.pop(name) for name in ("features_sum", "features_cov_sum", "count")]
    classifier.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return Judge(classifier.eval(), sums[0].double(), sums[1].double(), int(sums[2]))


RECIPE = "python examples/fashion_video/train_judges.py"
