"""What a caption can say of a drawn item, how it says it, and how it is drawn.

Every picture has a class, a size (a small item also has a place), a brightness and an orientation.
A caption names the class and any of the others; what it leaves unsaid may be either.
"""

from itertools import product

import neighbours  # noqa: F401
import torch

# isort: split
from render import place_items

from data import CLASS_NAMES

SIZES = ("small", "large")
PLACES = ("in the middle", "on the left", "on the right", "at the top", "at the bottom")
BRIGHTNESSES = ("dark", "bright")
ORIENTATIONS = ("upright", "upside-down")
ATTRIBUTES = ("label", "size", "place", "brightness", "orientation")
UNSAID = -1

_SCALE = torch.tensor([0.5, 0.95])
_SHIFT = torch.tensor([[0.0, 0.0], [-0.5, 0.0], [0.5, 0.0], [0.0, -0.5], [0.0, 0.5]])
_PEAK = torch.tensor([0.4, 1.0])


def compose(label: int, size: int, place: int, brightness: int, orientation: int) -> str:
    """One caption, such as ``a small dark bag on the left``; ``UNSAID`` leaves a part out."""
    words = [
        names[index]
        for names, index in ((SIZES, size), (BRIGHTNESSES, brightness), (ORIENTATIONS, orientation))
        if index != UNSAID
    ]
    words.append(CLASS_NAMES[label].lower())
    article = "an" if words[0][0] in "aeiou" else "a"
    ending = f" {PLACES[place]}" if place != UNSAID else ""
    return f"{article} {' '.join(words)}{ending}"


def all_captions() -> tuple[list[str], dict[tuple[int, ...], int]]:
    """Every caption, the empty one (for guidance) first, and where each choice of parts stands."""
    captions, index = [""], {}
    sized = [(UNSAID, UNSAID), (1, UNSAID)] + [(0, place) for place in range(-1, len(PLACES))]
    for label, (size, place), brightness, orientation in product(
        range(len(CLASS_NAMES)), sized, range(-1, 2), range(-1, 2)
    ):
        index[label, size, place, brightness, orientation] = len(captions)
        captions.append(compose(label, size, place, brightness, orientation))
    return captions, index


def draw(items: torch.Tensor, attributes: torch.Tensor) -> torch.Tensor:
    """Draws items uint8 [N, 1, 32, 32] as attributes int64 [N, 5] say; pictures in 0..1."""
    _, size, place, brightness, orientation = attributes.unbind(1)
    items = items.float() / 255
    items = items / items.amax((1, 2, 3), keepdim=True).clamp_min(0.2)
    drawn = place_items(items, _SCALE[size], _SHIFT[place], upside_down=orientation == 1)
    return drawn * _PEAK[brightness][:, None, None, None]


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
