"""What ``torch.compile`` is to leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def outside_graphs(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Keeps the function out of compiled graphs: it runs in Python each time it is called."""
    return cast("Callable[Parameters, Result]", torch.compiler.disable(function))
