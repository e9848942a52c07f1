"""What ran in a run, layer by call, as a drawing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """A drawing of unit squares: layers down, transformer calls across.

    Attributes:
        calls: how wide it is.
        layers: how high.
        path: SVG path data that covers the squares of the layers that ran.
        ran: how many these are.
    """

    calls: int
    layers: int
    path: str
    ran: int


def plan_of(ran: Sequence[str]) -> Plan | None:
    """Draws ``Cell.ran``; None where there is none. A layer that a call lacks counts as not run."""
    layers = max(map(len, ran), default=0)
    if not layers:
        return None
    pieces, left = [], 0
    for layers_ran, calls in itertools.groupby(ran):  # equal neighbours are one rectangle
        width = len(list(calls))
        top = 0
        for letter, run in itertools.groupby(layers_ran):
            height = len(list(run))
            if letter == "1":
                pieces.append(f"M{left} {top}h{width}v{height}h-{width}z")
            top += height
        left += width
    return Plan(len(ran), layers, "".join(pieces), sum(call.count("1") for call in ran))
