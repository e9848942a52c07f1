"""skipcache: diffusion transformers that sample faster, with one line.

>>> from skipcache import apply_skip_cache
>>> apply_skip_cache(pipe)  # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

from skipcache.api import (
    apply_skip_cache,
    cache_stats,
    is_skip_cached,
    remove_skip_cache,
    skip_cache,
    skip_cache_run,
)
from skipcache.backbone import Backbone, BlockList, InputSize, Timestep, WholeCall, Zipped, is_named
from skipcache.branches.retrofit import (
    add_skip_branches,
    freeze_backbone,
    remove_skip_branches,
)
from skipcache.config import SkipCacheConfig
from skipcache.errors import SkipCacheError, SkipCacheWarning
from skipcache.estimators import Estimator, Hold, Refresh, Residual, Taylor
from skipcache.hookspecs import hookimpl
from skipcache.plugins import register_adapter, unregister_adapter
from skipcache.schedules import IntervalSchedule, MaskSchedule, ProbeSchedule, Progress, Schedule

if TYPE_CHECKING:
    from skipcache.branches.fit import fit_skip_branches
    from skipcache.branches.fitted import FittedBranches
    from skipcache.branches.module import SkipBranch, SkipBranches
    from skipcache.branches.official import convert_skip_dit, load_skip_dit
    from skipcache.recipes.calibrate import calibrate
    from skipcache.recipes.recipe import Recipe

_MODULES = {  # imported when they are first asked for: they need torch
    "FittedBranches": "skipcache.branches.fitted",
    "Recipe": "skipcache.recipes.recipe",
    "SkipBranch": "skipcache.branches.module",
    "SkipBranches": "skipcache.branches.module",
    "calibrate": "skipcache.recipes.calibrate",
    "convert_skip_dit": "skipcache.branches.official",
    "fit_skip_branches": "skipcache.branches.fit",
    "load_skip_dit": "skipcache.branches.official",
}

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "BlockList",
    "Estimator",
    "FittedBranches",
    "Hold",
    "InputSize",
    "IntervalSchedule",
    "MaskSchedule",
    "ProbeSchedule",
    "Progress",
    "Recipe",
    "Refresh",
    "Residual",
    "Schedule",
    "SkipBranch",
    "SkipBranches",
    "SkipCacheConfig",
    "SkipCacheError",
    "SkipCacheWarning",
    "Taylor",
    "Timestep",
    "WholeCall",
    "Zipped",
    "add_skip_branches",
    "apply_skip_cache",
    "cache_stats",
    "calibrate",
    "convert_skip_dit",
    "fit_skip_branches",
    "freeze_backbone",
    "hookimpl",
    "is_named",
    "is_skip_cached",
    "load_skip_dit",
    "register_adapter",
    "remove_skip_branches",
    "remove_skip_cache",
    "skip_cache",
    "skip_cache_run",
    "unregister_adapter",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
