"""``skipcache smoothness``."""

from __future__ import annotations

import argparse
import copy
import json
import re
from pathlib import Path
from typing import Any

from skipcache.errors import ConfigError

DEMO = "demo"


def add_to(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "smoothness",
        help="measure how features change between steps, and under perturbed weights",
        description="Draws how much each layer changes from step to step, and the predicted noise "
        "under random perturbations of the weights. Writes PNG and CSV files.",
    )
    parser.add_argument(
        "pipe", metavar="PIPE", help="pipeline folder or hub id; 'demo': the model in skipcache"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("skipcache_smoothness"), help="folder for the files"
    )
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument(
        "--call", type=_keywords, metavar="JSON", help="what to call the pipeline with"
    )
    parser.add_argument(
        "--compare",
        metavar="OTHER",
        help="branches to add (folder or hub id), or the folder of a second pipeline",
    )
    parser.add_argument("--step", type=int, help="step of the surface's input; default the middle")
    parser.add_argument("--grid", type=int, default=15, help="points along each direction")
    parser.add_argument("--span", type=float, default=1.0, help="largest perturbation")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and the directions")
    parser.add_argument("--device", default="cpu", help="where to run, for example cuda")
    parser.set_defaults(run=run)


def _keywords(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object, like {{"prompt": "a fox"}}')
    return value


def run(arguments: argparse.Namespace) -> int:
    """Measures, and prints the names of the files."""
    from tqdm import tqdm

    from skipcache.evaluation.drawing import require_matplotlib
    from skipcache.evaluation.smoothness_plots import write_smoothness

    if arguments.steps < 2:
        raise ConfigError(f"--steps is {arguments.steps}. Neighbouring steps need 2 or more.")
    require_matplotlib()  # before anything is loaded
    pipe = _load(arguments.pipe, arguments.device)
    pipes = {Path(arguments.pipe).resolve().name: pipe}
    if arguments.compare is not None:
        pipes = {"before": pipe, "after": _second(pipe, arguments.compare, arguments.device)}
    call = {"num_inference_steps": arguments.steps, **_call(arguments, pipe)}
    with tqdm(total=len(pipes) * max(arguments.grid, 0) ** 2, desc="perturbing") as bar:
        files = write_smoothness(
            pipes,
            call,
            arguments.out,
            step=arguments.step,
            grid=arguments.grid,
            span=arguments.span,
            seed=arguments.seed,
            progress=bar.update,
        )
    for file in files:
        print(file)
    return 0


def _load(source: str, device: str) -> Any:
    """The pipeline of that name, folder or hub id.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
    """
    is_folder = Path(source).is_dir()
    if is_folder and not (Path(source) / "model_index.json").is_file():
        raise ConfigError(
            f"{source!r} is no pipeline folder: it has no model_index.json. Pass a folder written "
            "by save_pretrained of a diffusers pipeline."
        )
    if not is_folder and source != DEMO and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise ConfigError(
            f"there is no folder {source!r}, and it is no hub id such as "
            "'facebook/DiT-XL-2-256'. Pass one of the two, or 'demo'."
        )
    try:
        return _with_bar(_open(source, is_folder).to(device))
    except Exception as error:  # diffusers and torch raise many kinds
        raise ConfigError(
            f"the pipeline {source!r} cannot be loaded on {device!r}: {error}"
        ) from error


def _open(source: str, is_folder: bool) -> Any:
    if source == DEMO and not is_folder:
        from skipcache.demo import load_pipeline

        return load_pipeline()
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(source, local_files_only=is_folder)


def _with_bar(pipe: Any) -> Any:
    pipe.set_progress_bar_config(desc="sampling", leave=False)
    return pipe


def _second(pipe: Any, other: str, device: str) -> Any:
    """Another pipeline, or the same one with a transformer of its own that carries the branches."""
    if other == DEMO or (Path(other) / "model_index.json").is_file():
        return _load(other, device)
    from skipcache import add_skip_branches

    parts = {
        name: copy.deepcopy(part) if name.startswith("transformer") else part
        for name, part in pipe.components.items()
    }
    return add_skip_branches(_with_bar(type(pipe)(**parts)), other)


def _call(arguments: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    if arguments.call is not None:
        return dict(arguments.call)
    if type(pipe).__name__ != "DiTPipeline":
        raise ConfigError(
            f"{type(pipe).__name__!r} needs to be told what to sample. Pass --call with the "
            'keywords of one call as JSON: --call \'{"prompt": "a fox"}\'.'
        )
    return {"class_labels": list(range(10)), "guidance_scale": 2.0}
