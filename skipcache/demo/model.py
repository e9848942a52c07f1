"""The demo model: a class-conditional latent DiT trained on Fashion-MNIST, as an ordinary
``DiTPipeline`` folder.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiTPipeline

MODEL_FOLDER = Path(__file__).parent / "fashion_dit"
"""A diffusers folder (fp16 safetensors): 18 layers of width 160 on 16 tokens, and its
AutoencoderKL.
"""

CLASS_NAMES = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
"""The ten classes, in the order of their labels."""


def load_pipeline(folder: Path = MODEL_FOLDER) -> DiTPipeline:
    """The demo pipeline in fp32 on the CPU, without a progress bar of its own. Nothing is
    downloaded.

    Args:
        folder: a ``DiTPipeline`` folder; by default the one in the wheel.
    """
    from diffusers import DiTPipeline
    from diffusers.utils import logging

    had_progress_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # diffusers passes its own parts an argument that it has deprecated
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            pipeline = DiTPipeline.from_pretrained(folder, local_files_only=True)
    finally:
        if had_progress_bar:
            logging.enable_progress_bar()
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, DiTPipeline)
    return pipeline
