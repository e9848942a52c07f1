"""Draws the pictures of the documentation from real runs: ``python docs/figures.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from skipcache import IntervalSchedule, apply_skip_cache, cache_stats, skip_cache_run
from skipcache.evaluation.models import sample_inputs, tiny_dit

ASSETS = Path(__file__).parent / "assets"
FRONT, BACK = 2, 2
SCHEDULE = IntervalSchedule(interval=3, start=0.9, stop=0.1)


@dataclass(frozen=True)
class DepthTime:
    """Which layers ran at each step of one run.

    Attributes:
        plan: one letter a step, F = refresh, r = reuse.
        times: normalised time of each step, 1 = noise.
        ran: by step, by layer, as seen by hooks on the blocks.
    """

    plan: str
    times: tuple[float, ...]
    ran: tuple[tuple[bool, ...], ...]


@torch.no_grad()
def record(layers: int = 12, steps: int = 24) -> DepthTime:
    """Samples a tiny DiT with a cache, and notes every block that runs."""
    transformer = tiny_dit(layers)
    inputs = sample_inputs(transformer)
    seen: list[set[int]] = []
    for layer, block in enumerate(transformer.transformer_blocks):
        block.register_forward_hook(lambda *_, layer=layer: seen[-1].add(layer))
    apply_skip_cache(
        transformer, schedule=SCHEDULE, front_layers=FRONT, back_layers=BACK, estimator="hold"
    )
    timesteps = [1000.0 * (1 - step / steps) for step in range(steps)]
    with skip_cache_run(transformer, timesteps=timesteps):
        for timestep in timesteps:
            seen.append(set())
            transformer(**inputs, timestep=torch.full((2,), timestep))
    ran = tuple(tuple(layer in step for layer in range(layers)) for step in seen)
    return DepthTime(cache_stats(transformer).plan, tuple(t / 1000 for t in timesteps), ran)


def draw(run: DepthTime, folder: Path) -> None:
    """Writes depth-time.png: a strip of cells, steps across, layers upwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch, Rectangle

    steps, layers = len(run.ran), len(run.ran[0])
    colours = {"F": "#3f51b5", "r": "#ff9800"}
    left_out = "#eceff1"
    with plt.rc_context({"font.size": 9}):
        figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
        for step, kind in enumerate(run.plan):
            for layer, has_run in enumerate(run.ran[step]):
                colour = colours[kind] if has_run else left_out
                axes.add_patch(Rectangle((step + 0.06, layer + 0.06), 0.88, 0.88, facecolor=colour))
        for y, name in ((FRONT, "deep span begins"), (layers - BACK, "resume layer")):
            axes.axhline(y, color="#37474f", linewidth=0.8, linestyle="--")
            axes.text(steps + 0.15, y, name, va="center")
        for bound in (SCHEDULE.start, SCHEDULE.stop):
            first_inside = next(i for i, time in enumerate(run.times) if time < bound)
            axes.axvline(first_inside, color="#37474f", linewidth=0.8, linestyle=":")
            axes.text(first_inside, layers + 0.15, f"t = {bound}", ha="center", va="bottom")
        axes.set(xlim=(0, steps), ylim=(0, layers), ylabel="layer (depth)")
        axes.set_xlabel("step (time runs from noise, left, to clean, right)")
        axes.set_xticks(
            [i + 0.5 for i in range(steps)], [f"{i}\n{k}" for i, k in enumerate(run.plan)]
        )
        axes.set_yticks([i + 0.5 for i in range(layers)], [str(i) for i in range(layers)])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.legend(
            handles=[
                Patch(color=colours["F"], label="ran, refresh step (F)"),
                Patch(color=colours["r"], label="ran, reuse step (r)"),
                Patch(color=left_out, label="left out"),
            ],
            loc="outside upper center",
            ncols=3,
            frameon=False,
        )
        figure.savefig(folder / "depth-time.png", dpi=150, metadata={"Software": None})
        plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Draws every picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder; default docs/assets")
    folder = parser.parse_args(argv).out
    folder.mkdir(parents=True, exist_ok=True)
    draw(record(), folder)


if __name__ == "__main__":
    main()
