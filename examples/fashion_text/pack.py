"""Packs the trained text-to-image model as a ``HunyuanDiTPipeline`` folder in half precision.

    python examples/fashion_text/pack.py --out runs/text

Takes the moving average of the last checkpoint, also while the training still runs.
"""

import argparse
from pathlib import Path

import neighbours  # noqa: F401
from diffusers import AutoencoderKL, HunyuanDiTPipeline

# isort: split
from compact_text import CompactText, expand_padding
from train_hunyuan import build_text, build_transformer
from training import load_average

from pipeline_folder import write_pipeline
from train_dit import build_scheduler

TEXT = """\
A HunyuanDiT (12 layers of width 128, 16 tokens, 5 long skips) that reads a small BERT and a small
T5 encoder, trained by the skipcache project for {step} steps of batch 128 on drawn Fashion-MNIST
items (Zalando, MIT licence) with the recipe in `examples/fashion_text`. It exists to show and test
caching; sample quality is in `docs/results/demo-text.md`.

Captions are such as "a small dark bag on the left", in the words of the recipe only. Call it with
`use_resolution_binning=False`: the pictures are 32 x 32."""


def build_pipeline(runs: Path) -> tuple[HunyuanDiTPipeline, int]:
    """The pipeline in half precision, and the steps it was trained for."""
    bert_tokenizer, bert, t5_tokenizer, t5 = build_text()
    transformer = build_transformer()
    CompactText(transformer)
    progress = load_average(transformer, runs / "hunyuan_checkpoint.pt")
    expand_padding(transformer)
    pipeline = HunyuanDiTPipeline(
        vae=AutoencoderKL.from_pretrained(runs / "vae").half(),
        text_encoder=bert.half(),
        tokenizer=bert_tokenizer,
        transformer=transformer.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5.half(),
        tokenizer_2=t5_tokenizer,
    )
    return pipeline, progress["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the training runs")
    parser.add_argument("--to", type=Path, default=Path("skipcache/demo/fashion_t2i"))
    args = parser.parse_args()

    pipeline, step = build_pipeline(args.out)
    print(f"checkpoint of step {step}")
    write_pipeline(
        pipeline,
        args.to,
        task="text-to-image",
        title="Fashion-MNIST HunyuanDiT",
        text=TEXT.format(step=step),
    )


if __name__ == "__main__":
    main()
