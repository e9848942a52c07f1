"""Prints the tables of docs/models/index.md: ``python docs/models_table.py``, with ``--write`` into
the page.

They come from the installed adapters, asked about the tiny transformers of the tests.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from skipcache import Backbone, Zipped
from skipcache.plugins import default_registry

PAGE = Path(__file__).parent / "models" / "index.md"
TESTS = Path(__file__).parents[1] / "tests"
BLOCK = re.compile(r"(?<=<!-- models-table -->\n).*?(?=<!-- /models-table -->)", re.DOTALL)

# Adapters that have a page of their own.
PAGES = {"dit_xl": "dit.md", "hunyuan_dit": "hunyuan-dit.md", "latte": "latte.md"}

# What the backbones do not say.
REMARKS = {
    "PriorTransformer": "of a combined pipeline: `apply_skip_cache(pipe.prior_pipe)`",
    "T5FilmDecoder": "of a pipeline: `apply_skip_cache(pipe.decoder)`",
    "SkyReelsV2Transformer3DModel": (
        "`SkyReelsV2DiffusionForcingPipeline` steps copies of its scheduler, so the time it gives "
        "has to tell the steps: its first eight calls run whole (four steps, with guidance), and "
        "`cache_stats` counts the others"
    ),
    "WanVACETransformer3DModel": "its hints are added between the blocks, up to the last",
    "ZImageTransformer2DModel": "`siglip_refiner` runs too, where the model has one",
}


def tables() -> str:
    """Both tables, each under the sentence that counts its rows."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    from tiny import TINY

    rows, refused, adapters = [], [], set()
    for adapter in default_registry().adapters():
        if not adapter.origin.startswith("skipcache "):
            continue  # somebody else's, which happens to be installed
        for claim in adapter.claims:
            if not claim.startswith("diffusers."):
                continue
            name, _, condition = claim.removeprefix("diffusers.").partition(" ")
            transformer = TINY[name].make()
            backbone = default_registry().backbone_of(transformer, adapter.name)
            remarks = [condition.strip("()"), *_remarks(transformer, backbone)]
            remarks += [REMARKS[name]] if name in REMARKS else []
            adapters.add(adapter.name)
            rows.append(
                [
                    _linked(adapter.name),
                    f"`{name}`",
                    _lists(backbone),
                    ", ".join(f"`{path}`" for path in backbone.always_run),
                    "; ".join(remark for remark in remarks if remark),
                ]
            )
        for name, reason in adapter.refusals.items():
            refused.append([f"`{name}`", f"`{adapter.name}`", reason])
    count = len(adapters)
    return (
        f"{len(rows)} classes are claimed, by {count} adapters, and pass the kit (see below):\n\n"
        + _table(["adapter", "class", "what is cached", "always runs", "remark"], rows)
        + f"\n{len(refused)} classes are refused. Who applies a cache to one of them reads why:\n\n"
        + _table(["class", "adapter that refuses it", "why"], refused)
    )


def _linked(adapter: str) -> str:
    return f"[`{adapter}`]({PAGES[adapter]})" if adapter in PAGES else f"`{adapter}`"


def _lists(backbone: Backbone) -> str:
    """The lists in the order of execution, zipped ones in one layer."""
    return ", then ".join(
        " in turns with ".join(f"`{item.path}`" for item in entry.lists)
        if isinstance(entry, Zipped)
        else f"`{entry.path}`"
        for entry in backbone.lists
    )


def _remarks(transformer: nn.Module, backbone: Backbone) -> list[str]:
    """What else a backbone says that shows in use."""
    remarks = []
    parameters = inspect.signature(type(transformer).forward).parameters
    if backbone.native_skips:
        remarks.append("long skips of its own: the back is no larger than the front")
    for size in backbone.input_sizes:
        remarks.append(f"refuses another number of {size.what.partition(',')[0]} than its own")
    for spec in backbone.interleaved:
        remarks.append(f"`{spec.path}` is left out with the layers around it")
    calls = [call for call in backbone.whole_calls if call.argument in parameters]
    if calls:
        given = " or ".join(
            f"`{call.argument}{'' if call.item is None else f'[{call.item!r}]'}={call.value!r}`"
            for call in calls
        )
        remarks.append(f"calls with {given} run whole and are no step")
    if any(entry.breaks for entry in backbone.lists if not isinstance(entry, Zipped)):
        remarks.append("its decoder begins anew, and `residual` cannot reach across")
    return remarks


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    padded = [[f" {cell} " if cell else " " for cell in cells] for cells in lines]
    return "".join(f"|{'|'.join(cells)}|\n" for cells in padded)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables, or writes them into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/models/index.md")
    if parser.parse_args(argv).write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(BLOCK.sub(lambda _: tables(), page), encoding="utf-8")
    else:
        print(tables(), end="")


if __name__ == "__main__":
    main()
