"""Every caption of a drawn item, and how items are drawn as a caption says."""

from itertools import product
from pathlib import Path

import neighbours  # noqa: F401
import torch

# isort: split
from render import place_items

import data
from skipcache.demo.captions import PLACES, UNSAID, picture_caption

ATTRIBUTES = ("label", "size", "place", "brightness", "orientation")

_SCALE = torch.tensor([0.5, 0.95])
_SHIFT = torch.tensor([[0.0, 0.0], [-0.5, 0.0], [0.5, 0.0], [0.0, -0.5], [0.0, 0.5]])
_PEAK = torch.tensor([0.4, 1.0])


def all_captions() -> tuple[list[str], dict[tuple[int, ...], int]]:
    """Every caption, the empty one (for guidance) first, and where each choice of parts stands."""
    captions, index = [""], {}
    sized = [(UNSAID, UNSAID), (1, UNSAID)] + [(0, place) for place in range(-1, len(PLACES))]
    for label, (size, place), brightness, orientation in product(
        range(len(data.CLASS_NAMES)), sized, range(-1, 2), range(-1, 2)
    ):
        index[label, size, place, brightness, orientation] = len(captions)
        captions.append(picture_caption(label, size, place, brightness, orientation))
    return captions, index


def draw(items: torch.Tensor, attributes: torch.Tensor) -> torch.Tensor:
    """Draws items uint8 [N, 1, 32, 32] as attributes int64 [N, 5] say; pictures in 0..1."""
    _, size, place, brightness, orientation = attributes.unbind(1)
    items = items.float() / 255
    items = items / items.amax((1, 2, 3), keepdim=True).clamp_min(0.2)
    drawn = place_items(items, _SCALE[size], _SHIFT[place], upside_down=orientation == 1)
    return drawn * _PEAK[brightness][:, None, None, None]


def draw_pictures(
    split: str, folder: Path, count: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [N, 1, 32, 32] in 0..1 and their attributes, int64 [N, 5]."""
    items, labels = data.load(split, folder)
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randperm(len(items), generator=generator)[:count]
    attributes = draw_attributes(labels[pick], generator)
    parts = zip(items[pick].split(1000), attributes.split(1000), strict=True)
    return torch.cat([draw(item, part) for item, part in parts]), attributes


def draw_attributes(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Attributes int64 [N, 5] at random for items of these labels.

    Large items stand in the middle.
    """
    count = len(labels)
    size, brightness, orientation = torch.randint(0, 2, (3, count), generator=generator)
    place = torch.randint(0, len(PLACES), (count,), generator=generator)
    place = torch.where(size == 0, place, 0)
    return torch.stack([labels, size, place, brightness, orientation], 1)


def leave_unsaid(
    attributes: torch.Tensor, share: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Hides a random share of what is not the class; a large item's place is never said."""
    said = attributes.clone()
    hidden = torch.rand(said.shape, generator=generator) < share
    hidden[:, 0] = False
    hidden[:, 2] |= (said[:, 1] == 1) | hidden[:, 1]
    said[hidden] = UNSAID
    return said
