"""Pictures of a benchmark as data URIs. A clip becomes a film strip: a PNG with all its frames."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipcache.errors import ConfigError

PNG = b"\x89PNG\r\n\x1a\n"
GIF = (b"GIF87a", b"GIF89a")
SMALL = 160  # pixels; what is narrower is enlarged without smoothing
DEFAULT_FRAME_MS = 125


@dataclass(frozen=True)
class Picture:
    """A picture, or a film strip of frames in reading order.

    Attributes:
        uri: the PNG as a data URI.
        width: in pixels, of one frame.
        height: likewise.
        frames: how many; 1 of a still picture.
        columns: of the strip.
        frame_ms: how long a frame is shown.
    """

    uri: str
    width: int
    height: int
    frames: int = 1
    columns: int = 1
    frame_ms: int = DEFAULT_FRAME_MS

    @property
    def rows(self) -> int:
        """Of the strip."""
        return math.ceil(self.frames / self.columns)

    @property
    def is_small(self) -> bool:
        """Whether its pixels are to be seen as squares."""
        return self.width < SMALL


def load_picture(folder: Path, name: str) -> Picture:
    """Reads a PNG as it is, and a GIF as a film strip.

    Two GIFs side by side drift apart, and cannot be stopped. Frames of a strip can be shown in
    step. A GIF holds a frame that lasts twice as long once; the strip holds it twice.

    Raises:
        ConfigError: it is missing, lies outside the folder, or is neither a PNG nor a GIF.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"the picture {name!r} lies outside the results in {folder}.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the picture {path}, which the results name, cannot be read: {error.strerror}. Keep "
            "the results file and its pictures together, or run skipcache bench again."
        ) from None
    is_clip = data.startswith(GIF)
    if not is_clip and not data.startswith(PNG):
        raise ConfigError(f"the picture {path} is neither a PNG nor a GIF.")
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return _film_strip(image) if is_clip else Picture(_uri(data), *image.size)
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"the picture {path} is damaged: {error}") from error


def _film_strip(image: Any) -> Picture:
    from PIL import Image, ImageSequence

    timed = [
        (frame.convert("RGB"), int(frame.info.get("duration") or DEFAULT_FRAME_MS))
        for frame in ImageSequence.Iterator(image)
    ]
    frame_ms = min(duration for _, duration in timed)
    frames = [frame for frame, ms in timed for _ in range(round(ms / frame_ms))]
    width, height = image.size
    columns = math.ceil(math.sqrt(len(frames)))
    strip = Image.new("RGB", (width * columns, height * math.ceil(len(frames) / columns)))
    for i, frame in enumerate(frames):
        strip.paste(frame, (i % columns * width, i // columns * height))
    file = io.BytesIO()
    strip.save(file, "PNG", optimize=True)
    return Picture(_uri(file.getvalue()), width, height, len(frames), columns, frame_ms)


def _uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
