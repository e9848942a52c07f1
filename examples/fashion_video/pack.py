"""Packs a trained video model as an ordinary diffusers pipeline folder in half precision.

    python examples/fashion_video/pack.py --out runs/video --kind c2v
    python examples/fashion_video/pack.py --out runs/video --kind c2v-skip
    python examples/fashion_video/pack.py --out runs/video --kind t2v

Takes the moving average of the last checkpoint, also while the training still runs.
"""

import argparse
from pathlib import Path

import neighbours  # noqa: F401
from diffusers import AutoencoderKL, DiffusionPipeline, LattePipeline
from torch import nn

# isort: split
import train_c2v
import train_t2v
from training import load_average

from pipeline_folder import write_pipeline
from skipcache.latte_class import LatteClassPipeline
from train_dit import build_scheduler

DEMO = Path("skipcache/demo")
FOLDERS = {
    "c2v": DEMO / "fashion_c2v",
    "c2v-skip": DEMO / "fashion_c2v_skip",
    "t2v": DEMO / "fashion_t2v",
}

TRAINED = """\
{model} (8 spatial and 8 temporal blocks of width 96, 8 frames of 16 tokens), trained by the
skipcache project for {step} steps of batch 32 on clips of moving Fashion-MNIST items (Zalando, MIT
licence) with the recipe in `examples/fashion_video`. It exists to show and test caching; sample
quality is in `docs/results/demo-videos.md`.

{use}"""

CLASS_USE = """\
diffusers has no class for it: load it with
`skipcache.latte_class.LatteClassPipeline.from_pretrained`. Its labels are ten items times eight
motions: `item * 8 + motion`."""
BRANCHES_USE = """
Its skip branches lie beside its transformer, which was trained with them: attach them by
`skipcache.add_skip_branches(pipe, "fashion_c2v_skip/transformer")`."""


def build_pipeline(kind: str, runs: Path, vae: AutoencoderKL) -> tuple[DiffusionPipeline, int]:
    """The pipeline in half precision, and the steps it was trained for."""
    parts = {"vae": vae.half(), "scheduler": build_scheduler()}
    if kind == "t2v":
        tokenizer, text_encoder = train_t2v.build_text()
        transformer = train_t2v.build_transformer()
        trained = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder})
        progress = load_average(trained, runs / "t2v_checkpoint.pt")
        pipeline = LattePipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder.half(),
            transformer=transformer.half(),
            **parts,
        )
        return pipeline, progress["step"]
    has_branches = kind == "c2v-skip"
    transformer = train_c2v.build_transformer(has_branches=has_branches)
    name = "skip" if has_branches else "plain"
    progress = load_average(transformer, runs / f"c2v_{name}_checkpoint.pt")
    return LatteClassPipeline(transformer=transformer.half(), **parts), progress["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the training runs")
    parser.add_argument("--kind", choices=FOLDERS, required=True)
    parser.add_argument("--to", type=Path, help="pipeline folder to write; default: the demo's")
    parser.add_argument("--vae", type=Path, default=DEMO / "fashion_dit" / "vae")
    args = parser.parse_args()

    vae = AutoencoderKL.from_pretrained(args.vae)
    pipeline, step = build_pipeline(args.kind, args.out, vae)
    model, title, use = {
        "c2v": ("A class-conditional Latte", "Fashion-MNIST clips by class", CLASS_USE),
        "c2v-skip": (
            "A class-conditional Latte with long skip branches (arXiv:2411.17616)",
            "Fashion-MNIST clips by class, Skip-DiT",
            f"{CLASS_USE}\n{BRANCHES_USE}",
        ),
        "t2v": (
            "A text-to-video Latte and its T5 encoder",
            "Fashion-MNIST clips by caption",
            'Captions are such as "an ankle boot moving left", in the words of the recipe only.\n'
            "Call it with `height=32, width=32, video_length=8`.",
        ),
    }[args.kind]
    print(f"checkpoint of step {step}")
    write_pipeline(
        pipeline,
        args.to or FOLDERS[args.kind],
        task="text-to-video",
        title=title,
        text=TRAINED.format(model=model, step=step, use=use),
    )


if __name__ == "__main__":
    main()
