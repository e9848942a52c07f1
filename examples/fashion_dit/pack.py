"""Packs the trained parts as an ordinary diffusers ``DiTPipeline`` folder in half precision.

    python examples/fashion_dit/pack.py --out runs/fashion_dit --to skipcache/demo/fashion_dit

While ``train_dit.py`` still runs, its last checkpoint's moving average can be packed:
``--from-checkpoint``.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from diffusers.training_utils import EMAModel

import data
from pipeline_folder import write_pipeline
from train_dit import build_scheduler, build_transformer

TEXT = """\
A class-conditional latent diffusion transformer (18 layers, width 160, 16 tokens of 4 x 8 x 8
latents) and its autoencoder, trained by the skipcache project on the 60 000 training pictures of
Fashion-MNIST (Zalando, MIT licence) with the recipe in `examples/fashion_dit`. It exists to show
and test caching; sample quality is in `docs/results/demo-model.md`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the training runs")
    parser.add_argument("--to", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--from-checkpoint", action="store_true")
    args = parser.parse_args()

    if args.from_checkpoint:
        transformer = build_transformer()
        state = torch.load(args.out / "dit_checkpoint.pt", weights_only=True)
        ema = EMAModel(transformer.parameters())
        ema.load_state_dict(state["ema"])
        ema.copy_to(transformer.parameters())
        print(f"checkpoint of step {state['step']}, {state['seconds'] / 60:.1f} min")
    else:
        transformer = DiTTransformer2DModel.from_pretrained(args.out / "transformer")
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            table = block.norm1.emb.class_embedder.embedding_table.weight
            table[len(data.CLASS_NAMES) : data.NULL_CLASS] = 0.0  # labels that no picture has
    pipeline = DiTPipeline(
        transformer=transformer.half(),
        vae=AutoencoderKL.from_pretrained(args.out / "vae").half(),
        scheduler=build_scheduler(),
        id2label=dict(enumerate(data.CLASS_NAMES)),
    )
    write_pipeline(pipeline, args.to, task="text-to-image", title="Fashion-MNIST DiT", text=TEXT)


if __name__ == "__main__":
    main()
