"""The judge of samples: training of a small classifier, and the Fréchet distance of its features.

The distance (torchmetrics) compares with other figures of the same classifier only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from skipcache.demo.judge import Classifier

UNKNOWN = -1  # of a label: the answer does not count


def train_classifier(
    pictures: torch.Tensor, labels: torch.Tensor, answers: Sequence[int], epochs: int
) -> Classifier:
    """Trains on pictures [N, C, 32, 32] with labels [N, Q], of ``answers[q]`` kinds each."""
    torch.manual_seed(0)
    model = Classifier(answers, pictures.shape[1]).to(memory_format=torch.channels_last)
    loader = DataLoader(TensorDataset(pictures, labels), batch_size=128, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 4e-3, total_steps=epochs * len(loader)
    )
    for batch, label in tqdm([*loader] * epochs, desc="classifier"):
        features = model(batch)
        loss = sum(
            F.cross_entropy(head(features), label[:, question], ignore_index=UNKNOWN)
            for question, head in enumerate(model.heads)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@dataclass(frozen=True)
class Verdict:
    """Share of right answers to each question, and the Fréchet distance to real pictures."""

    accuracies: list[float]
    distance: float

    def cells(self) -> list[str]:
        """For a row of a table: percent each, then the distance."""
        return [*(f"{100 * share:.1f}" for share in self.accuracies), f"{self.distance:.4f}"]


@torch.no_grad()
def judge(
    model: Classifier, pictures: torch.Tensor, labels: torch.Tensor, real: torch.Tensor
) -> Verdict:
    """Judges pictures [N, C, 32, 32] that should show labels [N, Q] beside real ones."""
    accuracies = []
    for question, head in enumerate(model.heads):
        found = torch.cat([head(model(batch)).argmax(1) for batch in pictures.split(500)])
        asked = labels[:, question] != UNKNOWN
        accuracies.append(float((found == labels[:, question])[asked].float().mean()))
    size = tuple(pictures.shape[1:])
    distance = FrechetInceptionDistance(feature=model, normalize=False, input_img_size=size)
    for batch in real.split(500):
        distance.update(batch, real=True)
    for batch in pictures.split(500):
        distance.update(batch, real=False)
    return Verdict(accuracies, float(distance.compute()))
