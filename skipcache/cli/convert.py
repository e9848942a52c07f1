"""``skipcache convert``."""

from __future__ import annotations

import argparse
from typing import Any

from skipcache.branches.official import DTYPES, convert_skip_dit


def add_to(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        "convert",
        help="turn a released Skip-DiT or DiT checkpoint into a folder of diffusers",
        description="Writes the transformer as diffusers does, and its skip branches beside it. "
        "Sizes are read off the tensors; the options say what they cannot.",
    )
    parser.add_argument("source", metavar="IN", help="a .pt or safetensors file")
    parser.add_argument("out", metavar="OUT", help="the folder; it must not exist, or be empty")
    parser.add_argument(
        "--num-attention-heads", type=int, help="default: 16, as in every released model"
    )
    parser.add_argument(
        "--sample-size", type=int, help="of text-to-video latents; default: the file's, or 64"
    )
    parser.add_argument(
        "--video-length", type=int, help="frames of a video; default: the file's, or 16"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: the file's")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Converts the file and says what it wrote."""
    folder = convert_skip_dit(
        arguments.source,
        arguments.out,
        num_attention_heads=arguments.num_attention_heads,
        sample_size=arguments.sample_size,
        video_length=arguments.video_length,
        dtype=arguments.dtype,
        progress=True,
    )
    print(f"Wrote {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}.")
    print(f"Use it: skipcache.load_skip_dit({str(folder)!r})")
    return 0
