"""Files of skip-branch weights: ``skip_branches.safetensors``, ``skip_branches.json`` and a model
card.

What is read is checked before anything is built: JSON keys, tensor names, shapes and dtypes
against one another, then every value. Nothing is ever unpickled.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from skipcache.branches.fingerprint import SAMPLES, Fingerprint, fingerprint_of
from skipcache.branches.module import SkipBranches
from skipcache.errors import BranchError, BranchFileError, BranchWarning
from skipcache.targets import transformers_of

WEIGHTS_FILE = "skip_branches.safetensors"
RECORD_FILE = "skip_branches.json"
CARD_FILE = "README.md"
FORMAT_VERSION = 1

_REQUIRED = ("format_version", "kind", "settings")
_OPTIONAL = ("base_model", "made_by", "quality", "skipcache_version")


@dataclass(frozen=True)
class BaseModel:
    """The transformer that weights belong to.

    Attributes:
        name: of its class.
        fingerprint: of its weights.
    """

    name: str
    fingerprint: Fingerprint


@dataclass(frozen=True)
class BranchRecord:
    """What ``skip_branches.json`` says.

    Attributes:
        kind: ``"branches"`` (skip branches) or ``"fitted"`` (a closed-form fit).
        settings: what the weights are built by; depends on the kind.
        base_model: None where it was not given.
        made_by: how they were made, one sentence for people.
        quality: measured figures, by name.
    """

    kind: str
    settings: dict[str, Any]
    base_model: BaseModel | None = None
    made_by: str | None = None
    quality: dict[str, Any] = field(default_factory=dict)


def base_model_of(transformer: nn.Module) -> BaseModel:
    """Class and fingerprint of a transformer, also of a compiled one.

    Raises:
        TargetError: it is none.
    """
    [own] = transformers_of(transformer).values()
    # FSDP2 puts a class of its own in front of the model's.
    kinds = (k for k in type(own).__mro__ if not k.__module__.startswith("torch.distributed"))
    return BaseModel(next(kinds).__name__, fingerprint_of(own))


def is_made_for(expected: BaseModel | None, transformer: nn.Module) -> bool:
    """Whether that is the transformer's class and these are its very weights."""
    if expected is None:
        return False
    found = base_model_of(transformer)
    return expected.name == found.name and not expected.fingerprint.difference(found.fingerprint)


def folder_of(transformer: nn.Module) -> Path | None:
    """The folder that the transformer was loaded from, as far as it says."""
    config = getattr(transformer, "config", None)
    source = config.get("_name_or_path") if isinstance(config, Mapping) else None
    return Path(source) if source else None


def check_base_model(record: BranchRecord, transformer: nn.Module) -> None:
    """Refuses a model of another class, and warns of one with other weights.

    Raises:
        BranchFileError: the class differs.
    """
    expected = record.base_model
    if expected is None:
        return
    found = base_model_of(transformer)
    if expected.name != found.name:
        raise BranchFileError(
            f"these weights are for a {expected.name!r}, and this is a {found.name!r}. Load the "
            "ones made for this model."
        )
    difference = expected.fingerprint.difference(found.fingerprint)
    if difference is not None:
        warnings.warn(
            f"these weights were made for another {expected.name!r}: {difference}. Quality may "
            "suffer; make or fit them for this model.",
            BranchWarning,
            stacklevel=2,
        )


# Skip branches


def save_branches(
    branches: SkipBranches,
    folder: Path,
    *,
    base_model: nn.Module | None,
    made_by: str | None,
    quality: dict[str, Any] | None,
) -> Path:
    """Writes skip branches; see ``SkipBranches.save_pretrained``."""
    earlier = branches.record or BranchRecord("branches", {})
    record = BranchRecord(
        "branches",
        {
            "form": branches.form,
            "rank": branches.rank,
            "pairs": [list(pair) for pair in branches.pairs],
            "dim": branches.dim,
            "depth": branches.depth,
            "tensor": branches.tensor,
        },
        earlier.base_model if base_model is None else base_model_of(base_model),
        earlier.made_by if made_by is None else made_by,
        dict(earlier.quality if quality is None else quality),
    )
    return write_folder(folder, record, branches.state_dict())


def load_branches(
    source: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> SkipBranches:
    """Reads skip branches; see ``SkipBranches.from_pretrained``."""
    folder = find_folder(source, revision=revision, local_files_only=local_files_only)
    record = read_record(folder, "branches")
    names = {"form", "rank", "pairs", "dim", "depth", "tensor"}
    check_keys(
        folder / RECORD_FILE, record.settings, required=names - {"tensor"}, optional={"tensor"}
    )
    settings = {name: value for name, value in record.settings.items() if name in names}
    shape = {name: settings.pop(name) for name in ("dim", "depth", "pairs")}
    try:
        with torch.device("meta"):
            branches = SkipBranches(**shape, **settings)
    except (BranchError, TypeError, RuntimeError, OverflowError) as error:
        raise BranchFileError(f"{folder / RECORD_FILE} describes no branches: {error}") from error
    expected = {name: tensor.shape for name, tensor in branches.state_dict().items()}
    branches.load_state_dict(read_tensors(folder / WEIGHTS_FILE, expected), assign=True)
    branches.requires_grad_(True)
    branches.record = record
    return branches


# The folder


def write_folder(folder: Path, record: BranchRecord, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Writes the three files; one that is there already is replaced whole or not at all.

    Raises:
        BranchFileError: a weight is not finite or not at hand, what is to be noted cannot be
            written down, or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise BranchFileError(
                f"{name!r} is offloaded, so its values are not at hand; nothing was written. Take "
                "the offloading off first."
            )
        if not _is_finite(tensor):
            raise BranchFileError(f"{name!r} has values that are not finite; nothing was written.")
    version = importlib.metadata.version("skipcache")
    text = {"format_version": FORMAT_VERSION, "skipcache_version": version, **asdict(record)}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        described = json.dumps(text, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise BranchFileError(
            f"quality is {record.quality!r}. It is made of names, numbers and text ({error}); "
            "nothing was written."
        ) from error
    try:
        with replaced_files(folder, (WEIGHTS_FILE, CARD_FILE, RECORD_FILE)) as parts:
            save_file(weights, parts / WEIGHTS_FILE, metadata={"format": "pt"})
            (parts / CARD_FILE).write_text(_card(record), encoding="utf-8")
            (parts / RECORD_FILE).write_text(described, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise BranchFileError(f"{folder} cannot be written: {error}") from error
    return folder


@contextmanager
def replaced_files(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A folder to write these files into; they then take the place of those in ``folder``, which is
    created if need be. After an error nothing has changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".skipcache-", dir=folder) as parts:
        yield Path(parts)
        for name in names:
            os.replace(Path(parts, name), folder / name)


def find_folder(
    source: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    names: Sequence[str] = (RECORD_FILE, WEIGHTS_FILE),
) -> Path:
    """The local folder of the files: the one named, or the hub cache's after a download.

    Raises:
        BranchFileError: there is no such folder, and no such repository can be had.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not isinstance(source, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise BranchFileError(
            f"there is no folder {str(source)!r}, and it is no hub id such as 'user/name' either."
        )
    from huggingface_hub import hf_hub_download

    try:
        paths = [
            hf_hub_download(source, name, revision=revision, local_files_only=local_files_only)
            for name in names
        ]
    except Exception as error:  # those of the transport differ between releases
        raise BranchFileError(
            f"there is no folder {source!r}, and from the hub it cannot be had: {error}"
        ) from error
    return Path(paths[0]).parent


def read_record(folder: Path, kind: str | None = None) -> BranchRecord:
    """Reads and checks ``skip_branches.json``.

    Raises:
        BranchFileError: it is missing, no such JSON, of a newer version or of another kind.
    """
    path = folder / RECORD_FILE
    text = read_json(path, FORMAT_VERSION)
    version = text.get("format_version")
    check_keys(path, text, required=_REQUIRED, optional=_OPTIONAL)
    if type(version) is not int or version != FORMAT_VERSION or type(text["settings"]) is not dict:
        raise BranchFileError(
            f"{path}: format_version is {version!r} and settings {text['settings']!r}. They are "
            f"{FORMAT_VERSION} and an object."
        )
    if kind is not None and text["kind"] != kind:
        advice = {
            "branches": "pass it to add_skip_branches",
            "fitted": "pass it to apply_skip_cache(..., branches=...)",
        }
        raise BranchFileError(
            f"{path} is of kind {text['kind']!r}, and {kind!r} is asked for here: "
            f"{advice.get(str(text['kind']), 'this skipcache does not know it')}."
        )
    made_by, quality = text.get("made_by"), text.get("quality") or {}
    if not isinstance(made_by, str | None) or not isinstance(quality, dict):
        raise BranchFileError(
            f"{path}: made_by is {made_by!r} and quality {quality!r}. They are text and an object."
        )
    return BranchRecord(
        text["kind"],
        text["settings"],
        read_base_model(path, text.get("base_model")),
        made_by,
        quality,
    )


def read_json(path: Path, newest: int) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        BranchFileError: it cannot be read, is no object, or is of a format version above
            ``newest``.
    """
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BranchFileError(f"{path} cannot be read: {error}") from error
    if not isinstance(text, dict):
        raise BranchFileError(f"{path} holds {type(text).__name__}, not an object.")
    version = text.get("format_version")
    if isinstance(version, int) and version > newest:
        raise BranchFileError(
            f"{path} has format version {version}, and this skipcache reads up to {newest}. "
            "Upgrade skipcache."
        )
    return text


def holds_branches(folder: Path) -> bool:
    """Whether the folder holds the files of skip branches, and not those of a fit.

    Raises:
        BranchFileError: as ``read_record``.
    """
    return (folder / RECORD_FILE).is_file() and read_record(folder).kind == "branches"


def read_base_model(path: Path, text: Any) -> BaseModel | None:
    """What a JSON file at ``path`` says of the model that it was made for.

    Raises:
        BranchFileError: it is malformed.
    """
    if text is None:
        return None
    try:
        prints = text["fingerprint"]
        samples = tuple(float(value) for value in prints["samples"])
        if len(samples) not in (0, SAMPLES) or not all(map(math.isfinite, samples)):
            raise ValueError(f"{len(samples)} samples")
        return BaseModel(str(text["name"]), Fingerprint(str(prints["structure"]), samples))
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise BranchFileError(f"{path}: base_model is malformed: {text!r}") from error


def check_keys(
    path: Path, found: Mapping[str, Any], *, required: Iterable[str], optional: Iterable[str]
) -> None:
    """Raises on a missing key and warns of one that is not known.

    Raises:
        BranchFileError: keys are missing.
    """
    missing = sorted(set(required) - found.keys())
    if missing:
        raise BranchFileError(f"{path} lacks {', '.join(missing)}.")
    unknown = sorted(found.keys() - {*required, *optional})
    if unknown:
        warnings.warn(
            f"{path}: {', '.join(unknown)} not known to this skipcache, and left aside.",
            BranchWarning,
            stacklevel=3,
        )


def read_tensors(path: Path, expected: Mapping[str, Iterable[int]]) -> dict[str, torch.Tensor]:
    """Reads a safetensors file that must hold exactly these tensors.

    Args:
        path: the file.
        expected: shape of each, by name.

    Raises:
        BranchFileError: it is missing, truncated or corrupt, has other names, shapes or dtypes, or
            values that are not finite.
    """
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with safe_open(path, framework="pt") as stored:
            names = set(stored.keys())
            if names != expected.keys():
                raise BranchFileError(
                    f"{path} does not hold what is described beside it: missing "
                    f"{sorted(expected.keys() - names)}, extra {sorted(names - expected.keys())}."
                )
            for name, shape in expected.items():
                found = tuple(stored.get_slice(name).get_shape())
                if found != tuple(shape):
                    raise BranchFileError(
                        f"{path}: {name!r} has shape {found}, and {tuple(shape)} is described "
                        "beside it."
                    )
            for name in expected:
                tensors[name] = stored.get_tensor(name)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BranchFileError(f"{path} cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not _is_finite(tensor):
            raise BranchFileError(
                f"{path}: {name!r} is not made of finite floating-point numbers ({tensor.dtype})."
            )
    return tensors


def _is_finite(tensor: torch.Tensor) -> bool:
    narrow = tensor.is_floating_point() and tensor.element_size() == 1  # fp8 knows no isfinite
    return bool(torch.isfinite(tensor.float() if narrow else tensor).all())


def push_folder(
    save: Callable[[str], Any],
    repo_id: str,
    private: bool | None,
    message: str = "Upload skip branches",
) -> str:
    """Uploads what ``save`` writes into a folder; the address of the commit.

    Raises:
        BranchFileError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        hub = HfApi()
        try:
            name = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
            done = hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
        except Exception as error:  # those of the transport differ between releases
            raise BranchFileError(f"{repo_id!r} could not be uploaded: {error}") from error
    return str(done.commit_url)


_USE = {
    "branches": "add_skip_branches(pipe, {here!r})\napply_skip_cache(pipe)",
    "fitted": "apply_skip_cache(pipe, branches={here!r})",
}


def _card(record: BranchRecord) -> str:
    base = record.base_model.name if record.base_model is not None else "a diffusion transformer"
    imports = "apply_skip_cache"
    if record.kind == "branches":
        imports = f"add_skip_branches, {imports}"
    rows = [
        f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in record.settings.items()
    ]
    quality = [f"| {_cell(key)} | {_cell(value)} |" for key, value in record.quality.items()]
    lines = [
        "---",
        "library_name: skipcache",
        "tags: [skipcache, skip-dit, diffusion]",
        "---",
        f"# Skip branches for {_cell(base)}",
        "",
        "Weights for [skipcache](https://arxiv.org/abs/2411.17616): long skip connections that let "
        "a diffusion transformer reuse deep features between denoising steps.",
        "",
        *([f"Made by: {_cell(record.made_by)}", ""] if record.made_by else []),
        "```python",
        f"from skipcache import {imports}",
        "",
        _USE.get(record.kind, "").format(here="path/or/hub-id"),
        "```",
        "",
        "| setting | value |",
        "|---|---|",
        *rows,
    ]
    if quality:
        lines += ["", "| measured | value |", "|---|---|", *quality]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
