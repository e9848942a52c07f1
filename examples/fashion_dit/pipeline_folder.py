"""Writes a trained pipeline as an ordinary diffusers folder, as all recipes do."""

import json
from pathlib import Path

from diffusers import DiffusionPipeline

CARD = """---
license: apache-2.0
pipeline_tag: {task}
library_name: diffusers
---
# {title}

{text}
"""


def write_pipeline(
    pipeline: DiffusionPipeline, folder: Path, *, task: str, title: str, text: str
) -> None:
    """Saves the pipeline in the dtype it has, with a model card; prints how large it is."""
    pipeline.save_pretrained(folder)
    branches = getattr(pipeline.transformer, "skip_branches", None)
    if branches is not None:
        branches.save_pretrained(
            folder / "transformer",
            base_model=pipeline.transformer,
            made_by="trained together with their model, from scratch",
        )
    for config in folder.glob("*/config.json"):
        kept = json.loads(config.read_text())
        kept.pop("_name_or_path", None)  # where it was trained says nothing
        config.write_text(json.dumps(kept, indent=2) + "\n")
    (folder / "README.md").write_text(CARD.format(task=task, title=title, text=text))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")
