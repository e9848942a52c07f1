"""What is compared: a way to make a pipeline faster, at one setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from skipcache import api


class Unavailable(Exception):
    """A method cannot run on this model, or its package is not installed; says why."""


def _nothing(pipeline: Any, steps: int) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Method:
    """A method at one setting.

    Attributes:
        family: as in ``Cell``.
        name: of the method, ``Cell.method``.
        setting: as in ``Cell``.
        options: exactly what it is given, as in ``Cell``; JSON values.
        applied: given a pipeline and the number of steps, a context in which the pipeline samples
            by this method. Raises ``Unavailable`` on entering where it cannot; whatever else it
            raises, then or while sampling, is reported as its failure.
        call: arguments of the pipeline's call that it changes (fewer steps).
        spoils_pipeline: whether the pipeline may not be as before after the context, so that it
            has to be given a copy.
    """

    family: str
    name: str
    setting: str
    options: Mapping[str, Any] = field(default_factory=dict)
    applied: Callable[[Any, int], AbstractContextManager[Any]] = _nothing
    call: Mapping[str, Any] = field(default_factory=dict)
    spoils_pipeline: bool = False


UNCACHED = Method("uncached", "uncached", "")


def skip_cache_method(setting: str, name: str = "skipcache", **options: Any) -> Method:
    """One of our own settings: options of ``apply_skip_cache`` that JSON can hold."""

    def applied(pipeline: Any, steps: int) -> AbstractContextManager[Any]:
        return api.skip_cache(pipeline, **options)

    return Method("skipcache", name, setting, options, applied)


def fewer_steps_method(steps: int) -> Method:
    """No cache, and fewer denoising steps: what every cache has to beat."""
    call = {"num_inference_steps": steps}
    return Method("fewer steps", "fewer steps", f"{steps} steps", call, call=call)
