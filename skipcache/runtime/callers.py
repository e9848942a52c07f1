"""Whose loop a forward is in.

Two pipelines may share a transformer, one may run inside the other's loop, and a run may be given
up half-way; timesteps alone cannot tell their calls apart. The call stack can: the innermost
``__call__`` of an object with a scheduler is the pipeline at work, and its frame is the run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Caller:
    """A pipeline in the middle of a call. ``frame`` identifies the call while it lasts."""

    pipeline: Any
    frame: int

    @property
    def token(self) -> tuple[int, int]:
        """Tells this call from every other one under way."""
        return id(self.pipeline), self.frame


def calling_pipeline() -> Caller | None:
    """The pipeline that is calling, directly or through its own functions; None for others."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            is_module = isinstance(owner, nn.Module)
            if not is_module and has_timesteps(getattr(owner, "scheduler", None)):
                return Caller(owner, id(frame))
        frame = frame.f_back  # type: ignore[assignment]
    return None


def has_timesteps(scheduler: Any) -> bool:
    """Whether this is a scheduler whose steps can be followed."""
    return all(hasattr(scheduler, name) for name in ("timesteps", "step", "__dict__"))
