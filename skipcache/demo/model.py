"""The demo models: small latent diffusion transformers trained on Fashion-MNIST, as ordinary
pipeline folders.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipcache.errors import ConfigError, SkipCacheError, did_you_mean

MODEL_FOLDER = Path(__file__).parent / "fashion_dit"
"""A diffusers folder (fp16 safetensors): 18 layers of width 160 on 16 tokens, and its
AutoencoderKL.
"""

CLASS_NAMES = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
"""The ten classes, in the order of their labels."""

MOTIONS = (
    "moving left", "moving right", "moving up", "moving down",
    "bouncing", "rotating", "growing", "shrinking",
)  # fmt: skip
"""The eight motions of clips; the label of a clip is ``8 * class + motion``."""

DEFAULT_TASK = "class-to-image"


@dataclass(frozen=True)
class DemoModel:
    """One of the folders.

    Attributes:
        folder: where it is.
        pipeline: module and class that load it.
        recipe: the script that packs it, with its arguments.
        needs_text: whether it has text encoders, which transformers loads.
    """

    folder: Path
    pipeline: tuple[str, str]
    recipe: str
    needs_text: bool = False


_DEMO = MODEL_FOLDER.parent
_VIDEO, _TEXT = "examples/fashion_video/pack.py --out runs/video", "examples/fashion_text/pack.py"
_LATTE_CLASS = ("skipcache.latte_class", "LatteClassPipeline")

MODELS = {
    "class-to-image": DemoModel(
        MODEL_FOLDER,
        ("diffusers", "DiTPipeline"),
        "examples/fashion_dit/pack.py --out runs/fashion_dit --to skipcache/demo/fashion_dit",
    ),
    "class-to-video": DemoModel(_DEMO / "fashion_c2v", _LATTE_CLASS, f"{_VIDEO} --kind c2v"),
    "text-to-image": DemoModel(
        _DEMO / "fashion_t2i",
        ("diffusers", "HunyuanDiTPipeline"),
        f"{_TEXT} --out runs/text",
        needs_text=True,
    ),
    "text-to-video": DemoModel(
        _DEMO / "fashion_t2v", ("diffusers", "LattePipeline"), f"{_VIDEO} --kind t2v", True
    ),
}
"""The model of each task."""

SKIP_MODEL = DemoModel(_DEMO / "fashion_c2v_skip", _LATTE_CLASS, f"{_VIDEO} --kind c2v-skip")
"""The class-to-video model that was trained with skip branches from the start."""


def load_pipeline(
    folder: Path | None = None, *, task: str = DEFAULT_TASK, has_branches: bool = False
) -> Any:
    """A demo pipeline in fp32 on the CPU, without a progress bar of its own. Nothing is downloaded.

    Args:
        folder: another folder of the same kind; by default the one in the wheel.
        task: ``"class-to-image"`` (a ``DiTPipeline``), ``"class-to-video"``
            (``LatteClassPipeline``), ``"text-to-image"`` (``HunyuanDiTPipeline``) or
            ``"text-to-video"`` (``LattePipeline``).
        has_branches: the class-to-video model that was trained as a Skip-DiT, its branches
            attached.

    Raises:
        ConfigError: there is no such task, or no such model with skip branches.
        SkipCacheError: the folder is not there, or transformers is missing, which text needs.
    """
    model = demo_model(task, has_branches=has_branches)
    found = model.folder if folder is None else Path(folder)
    if not (found / "model_index.json").is_file():
        raise SkipCacheError(
            f"the demo model for {task} is not at {found}. Train and pack it as the README beside "
            f"the script says: python {model.recipe}"
        )
    if model.needs_text and importlib.util.find_spec("transformers") is None:
        raise SkipCacheError(
            f"{task} needs transformers for its text encoders, which is not installed. Install it: "
            "pip install transformers, or skipcache with its extra 'text'."
        )
    import torch

    module, name = model.pipeline
    with _quiet(model):
        kind = getattr(importlib.import_module(module), name)
        pipeline = kind.from_pretrained(found, local_files_only=True, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    from skipcache.branches.files import holds_branches

    if holds_branches(found / "transformer"):
        from skipcache.branches.retrofit import add_skip_branches

        add_skip_branches(pipeline, found / "transformer")
    return pipeline


def demo_model(task: str, *, has_branches: bool = False) -> DemoModel:
    """The model of that task.

    Raises:
        ConfigError: there is none.
    """
    if task not in MODELS:
        raise ConfigError(f"there is no task {task!r}. {did_you_mean(str(task), MODELS)}")
    if has_branches and task != "class-to-video":
        raise ConfigError(
            f"no model for {task} was trained with added skip branches. Only class-to-video has "
            "one; leave has_branches out."
        )
    return SKIP_MODEL if has_branches else MODELS[task]


@contextmanager
def _quiet(model: DemoModel) -> Iterator[None]:
    """Without progress bars and remarks of the libraries while they load."""
    from diffusers.utils import logging

    loggers = [logging]
    if model.needs_text:
        from transformers.utils import logging as text_logging

        loggers.append(text_logging)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # diffusers passes its own parts an argument that it has deprecated
        warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
        for library in loggers:
            if library.is_progress_bar_enabled():
                library.disable_progress_bar()
                stack.callback(library.enable_progress_bar)
            stack.callback(library.set_verbosity, library.get_verbosity())
            library.set_verbosity_error()
        yield
