"""Fashion-MNIST from its IDX files, as tensors ready for training.

The files come with Debian's package ``dataset-fashion-mnist`` (``apt-get install
dataset-fashion-mnist``), or from https://github.com/zalandoresearch/fashion-mnist (MIT licence), in
any folder of the same four files.
"""

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASS_NAMES = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
NULL_CLASS = 1000  # DiTPipeline hard-wires this index for the unconditional pass
IMAGE_SIZE = 32


def read_idx(path: Path) -> np.ndarray:
    """Reads one gzipped IDX file of unsigned bytes, checking its header against its length."""
    raw = gzip.decompress(path.read_bytes())
    zeros, kind, rank = struct.unpack_from(">HBB", raw)
    if zeros != 0 or kind != 8:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    shape = struct.unpack_from(f">{rank}I", raw, 4)
    values = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} promises shape {shape} and holds {values.size} bytes")
    return values.reshape(shape)


def load(split: str, folder: Path = DEFAULT_FOLDER) -> tuple[torch.Tensor, torch.Tensor]:
    """Loads ``train`` (60 000 items) or ``t10k`` (10 000).

    Returns:
        Images uint8 [N, 1, 32, 32] (the 28 x 28 originals, padded with black) and labels int64 [N].
    """
    images = torch.from_numpy(read_idx(folder / f"{split}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(read_idx(folder / f"{split}-labels-idx1-ubyte.gz").copy())
    return F.pad(images[:, None], (2, 2, 2, 2)), labels.long()


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 1, H, W] to fp32 in -1..1, the range the autoencoder works in."""
    return images.float() / 127.5 - 1.0
