"""Every error and warning of skipcache, and the nearest-name hint that many of them carry."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SkipCacheError(Exception):
    """Base of every error raised by skipcache."""


class ConfigError(SkipCacheError, ValueError):
    """A setting has a value that it cannot have, or two settings contradict each other."""


class UnknownOptionError(SkipCacheError, TypeError):
    """An option of that name does not exist."""


class TargetError(SkipCacheError, TypeError):
    """The target is neither a pipeline with a transformer nor a transformer."""


class AdapterError(SkipCacheError):
    """An adapter failed, answered nonsense, or describes another model than the one at hand."""


class NoAdapterError(AdapterError):
    """No adapter claims the model."""


class NotAppliedError(SkipCacheError, RuntimeError):
    """The call needs a cache to be applied, and none is."""


class BranchError(SkipCacheError, ValueError):
    """Skip branches cannot be what they were asked to be, or do not fit the model."""


class BranchFileError(BranchError):
    """A file of weights is broken, unsafe, of an unknown kind or for another model."""


class RecipeError(SkipCacheError, ValueError):
    """A recipe is for another model, or for outputs of another type."""


class RecipeFileError(RecipeError):
    """A file of a recipe or of a calibration is broken, of another version or not there."""


class SkipCacheWarning(UserWarning):
    """Base of every warning given by skipcache."""


class PluginWarning(SkipCacheWarning):
    """An installed adapter could not be loaded and is left out."""


class NotCachingWarning(SkipCacheWarning):
    """A cache is applied, and for the stated reason nothing is reused."""


class BranchWarning(SkipCacheWarning):
    """Skip branches were loaded, and something about their files is worth knowing."""


class RecipeWarning(SkipCacheWarning):
    """A recipe was made for other weights or another scheduler."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Names the allowed values, the nearest one first: for the end of an error."""
    names = sorted(allowed)
    listed = ", ".join(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}? Allowed: {listed}." if near else f"Allowed: {listed}."
