"""What the captions of the demo's text models can say, and how they say it.

Every picture has a class, a size (a small item also has a place), a brightness and an orientation;
every clip a class and a motion. A caption names the class and any of the others; what it leaves
unsaid may be either.
"""

from __future__ import annotations

from skipcache.demo.model import CLASS_NAMES, MOTIONS

SIZES = ("small", "large")
PLACES = ("in the middle", "on the left", "on the right", "at the top", "at the bottom")
BRIGHTNESSES = ("dark", "bright")
ORIENTATIONS = ("upright", "upside-down")
PICTURE_ANSWERS = (CLASS_NAMES, SIZES, PLACES, BRIGHTNESSES, ORIENTATIONS)
"""What each part of a picture can be, in the order of the arguments of ``picture_caption``."""
UNSAID = -1


def picture_caption(label: int, size: int, place: int, brightness: int, orientation: int) -> str:
    """One caption, such as ``a small dark bag on the left``; ``UNSAID`` leaves a part out."""
    words = [
        names[index]
        for names, index in ((SIZES, size), (BRIGHTNESSES, brightness), (ORIENTATIONS, orientation))
        if index != UNSAID
    ]
    words.append(CLASS_NAMES[label].lower())
    return f"{_article(words[0])} {' '.join(words)}" + (
        "" if place == UNSAID else f" {PLACES[place]}"
    )


def clip_caption(item: int, motion: int) -> str:
    """``an ankle boot moving left``; for ``UNSAID`` the class alone."""
    name = CLASS_NAMES[item].lower()
    return f"{_article(name)} {name}" + ("" if motion == UNSAID else f" {MOTIONS[motion]}")


def spread_pictures(count: int) -> list[tuple[int, int, int, int, int]]:
    """Parts of ``count`` pictures, the first few already of all kinds; half of them are large.

    The parts are those of the training pictures, with the same shares: large items stand in the
    middle, small ones anywhere. A caption of all parts says so of both; the captions of the
    training leave the place of large items unsaid.
    """
    kinds = len(CLASS_NAMES) * len(BRIGHTNESSES) * len(ORIENTATIONS) * len(SIZES) * len(PLACES)
    found = []
    for i in range(count):
        rest, label = divmod(i * 37 % kinds, len(CLASS_NAMES))  # a stride prime to their number
        rest, size = divmod(rest, len(SIZES))
        rest, place = divmod(rest, len(PLACES))
        orientation, brightness = divmod(rest, len(BRIGHTNESSES))
        found.append((label, size, 0 if SIZES[size] == "large" else place, brightness, orientation))
    return found


def spread_clips(count: int) -> list[tuple[int, int]]:
    """Item and motion of ``count`` clips, the first few already of all kinds."""
    kinds = len(CLASS_NAMES) * len(MOTIONS)
    return [divmod(i * 37 % kinds, len(MOTIONS)) for i in range(count)]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
