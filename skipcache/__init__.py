"""skipcache: diffusion transformers that sample faster, with one line.

>>> from skipcache import apply_skip_cache
>>> apply_skip_cache(pipe)  # doctest: +SKIP
"""

from skipcache.api import (
    apply_skip_cache,
    cache_stats,
    is_skip_cached,
    remove_skip_cache,
    skip_cache,
    skip_cache_run,
)
from skipcache.backbone import Backbone, BlockList, Timestep, Zipped
from skipcache.config import SkipCacheConfig
from skipcache.errors import SkipCacheError, SkipCacheWarning
from skipcache.estimators import Estimator, Hold, Refresh, Residual, Taylor
from skipcache.hookspecs import hookimpl
from skipcache.plugins import register_adapter, unregister_adapter
from skipcache.schedules import IntervalSchedule, MaskSchedule, ProbeSchedule, Progress, Schedule

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "BlockList",
    "Estimator",
    "Hold",
    "IntervalSchedule",
    "MaskSchedule",
    "ProbeSchedule",
    "Progress",
    "Refresh",
    "Residual",
    "Schedule",
    "SkipCacheConfig",
    "SkipCacheError",
    "SkipCacheWarning",
    "Taylor",
    "Timestep",
    "Zipped",
    "apply_skip_cache",
    "cache_stats",
    "hookimpl",
    "is_skip_cached",
    "register_adapter",
    "remove_skip_cache",
    "skip_cache",
    "skip_cache_run",
    "unregister_adapter",
]
