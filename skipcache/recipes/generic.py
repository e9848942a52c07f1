"""A speedup for models without a recipe: what asks nothing of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from skipcache.config import SkipCacheConfig
from skipcache.errors import ConfigError
from skipcache.schedules import Progress, Schedule

HIGHEST_SPEEDUP = 4.0
BEND = 1.6  # docs/explanation/recipes.md


@dataclass(frozen=True)
class BentSchedule:
    """Refreshes one step in ``speedup``, but twice at least, more often early than late: at the
    steps n (j / m) ^ bend.

    Attributes:
        speedup: steps over refreshes, from 1.
        bend: 1 spaces evenly; above it, early steps are denser.
    """

    speedup: float
    bend: float = BEND

    needs_probe = False
    needs_times = False

    @property
    def preset(self) -> str:
        """Its name in ``cache_stats``."""
        return f"line/{self.speedup:g}x"

    def is_refresh(self, progress: Progress) -> bool:
        """For runs of unknown length: every so many steps."""
        return progress.since_refresh is None or progress.since_refresh >= math.ceil(self.speedup)

    def plan(self, times: Sequence[float]) -> tuple[bool, ...]:
        n = len(times)
        count = max(min(2, n), math.floor(n / self.speedup + 1e-9))
        steps: set[int] = set()
        for j in range(count):
            step = max(round(n * (j / count) ** self.bend), len(steps))
            steps.add(min(step, n - count + j))
        return tuple(step in steps for step in range(n))


def generic_config(speedup: float) -> SkipCacheConfig:
    """The configuration: the output of the transformer, extrapolated in a line.

    Raises:
        ConfigError: a speedup below 1 or above 4.
    """
    is_number = isinstance(speedup, (int, float)) and not isinstance(speedup, bool)
    if not is_number or not 1 <= speedup <= HIGHEST_SPEEDUP:
        raise ConfigError(
            f"speedup is {speedup!r}. Without a recipe it is a factor from 1 to "
            f"{HIGHEST_SPEEDUP:g}; calibrate one: skipcache calibrate."
        )
    return output_in_a_line(BentSchedule(float(speedup)))


def output_in_a_line(schedule: Schedule) -> SkipCacheConfig:
    """No layer runs at a reuse step, which takes the line through the last two outputs."""
    return SkipCacheConfig(front_layers=0, back_layers=0, schedule=schedule, estimator="taylor")
