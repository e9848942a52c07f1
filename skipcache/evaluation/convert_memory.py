"""What converting a checkpoint of the size of DiT-XL/2 with skip branches takes in memory.

Each step runs in a process of its own, so that its peak is its own. Also a script:
``python -m skipcache.evaluation.convert_memory write FILE`` and ``... convert FILE FOLDER DTYPE``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from skipcache.branches.build import WEIGHTS_NAME
from skipcache.branches.files import WEIGHTS_FILE
from skipcache.branches.official import convert_skip_dit
from skipcache.evaluation.timing import format_table

PATCH, CHANNELS = 2, 4
MIB = 2**20


def convert_memory() -> str:
    """Peak memory of converting a checkpoint of DiT-XL/2 size with skip branches (random weights)
    against the size of what is written.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint.pt"
        _run("write", str(checkpoint))
        for dtype in ("float32", "bfloat16"):
            out = Path(folder) / dtype
            idle, peak = map(int, _run("convert", str(checkpoint), str(out), dtype).split())
            written = sum((out / name).stat().st_size for name in (WEIGHTS_NAME, WEIGHTS_FILE))
            rows.append(
                [
                    dtype,
                    f"{checkpoint.stat().st_size / MIB:.0f} MiB",
                    f"{written / MIB:.0f} MiB",
                    f"{idle / MIB:.0f} MiB",
                    f"{peak / MIB:.0f} MiB",
                    f"{peak / written:.2f}",
                ]
            )
    columns = ["weights", "checkpoint", "written", "before", "peak", "peak / written"]
    return format_table(columns, rows)


def write_checkpoint(
    path: Path, *, width: int = 1152, depth: int = 28, classes: int = 1000, side: int = 16
) -> None:
    """Random weights with the names and shapes of ``DiT-XL-2-skip.pt``, in fp32, as training saves
    them: averaged weights under ``ema``.

    Args:
        path: of the file.
        width: of the stream, C.
        depth: layers, L.
        classes: number of classes.
        side: patches along a side of the picture.
    """
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (width, CHANNELS, PATCH, PATCH),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.linear": (PATCH**2 * 2 * CHANNELS, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    for i in range(depth // 2):
        shapes |= {
            f"skip_norms.{i}": (2 * width,),
            f"skip_linears.{i}.linear": (width, 2 * width),
        }
    positions = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt")
    weights = {
        "pos_embed": positions.float().unsqueeze(0),
        "y_embedder.embedding_table.weight": torch.randn(classes + 1, width),
    }
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = torch.randn(shape)
        weights[f"{name}.bias"] = torch.randn(shape[0])
    torch.save({"ema": weights}, path)


def _run(*arguments: str) -> str:
    command = [sys.executable, "-m", "skipcache.evaluation.convert_memory", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _peak_bytes() -> int:
    import resource  # not on Windows, where the other benchmarks run

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _main(step: str, source: str, out: str = "", dtype: str = "") -> None:
    if step == "write":
        write_checkpoint(Path(source))
        return
    import diffusers.models  # noqa: F401 (so that importing it counts as before)

    before = _peak_bytes()
    convert_skip_dit(source, out, dtype=dtype)
    print(before, _peak_bytes())


if __name__ == "__main__":
    _main(*sys.argv[1:])
