"""What rivals need around them: word of each call, a pipeline put back as it was, and silence."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from skipcache.evaluation.bench.methods import Unavailable

_NAMES = ("transformer", "transformer_2")


def transformers_in(pipeline: Any) -> list[nn.Module]:
    """Its transformers; Wan 2.2 has two."""
    found = (getattr(pipeline, name, None) for name in _NAMES)
    return [transformer for transformer in found if isinstance(transformer, nn.Module)]


def transformer_of(pipeline: Any) -> Any:
    """Its transformer.

    Raises:
        Unavailable: it has none.
    """
    found = transformers_in(pipeline)
    if not found:
        raise Unavailable(f"{type(pipeline).__name__} has no transformer.")
    return found[0]


@contextmanager
def restored(pipeline: Any) -> Iterator[None]:
    """Whatever is changed on the pipeline's class and in its transformers is undone afterwards.

    The pipeline is given a class of its own for the time, as cache-dit replaces ``__call__`` of the
    class, and so of all its pipelines. Its own attributes stay as they are.
    """
    kind = type(pipeline)
    modules = [m for transformer in transformers_in(pipeline) for m in transformer.modules()]
    saved = [(m, type(m), dict(vars(m)), dict(m._modules)) for m in modules]
    namespace = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    pipeline.__class__ = type(kind.__name__, (kind,), namespace)
    try:
        yield
    finally:
        pipeline.__class__ = kind
        for module, its_class, attributes, children in saved:
            module.__class__ = its_class
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)


@contextmanager
def quiet(package: str) -> Iterator[None]:
    """Only errors are logged by that package, which must have been imported."""
    names = [package, *(n for n in logging.root.manager.loggerDict if n.startswith(f"{package}."))]
    loggers = [logging.getLogger(name) for name in names]
    # The handlers, too: a module that is imported later makes a logger for them.
    speakers: list[logging.Logger | logging.Handler] = [*loggers]
    speakers += {handler for logger in loggers for handler in logger.handlers}
    levels = [speaker.level for speaker in speakers]
    try:
        for speaker in speakers:
            speaker.setLevel(logging.ERROR)
        yield
    finally:
        for speaker, level in zip(speakers, levels, strict=True):
            speaker.setLevel(level)


def give_cache_mixin(transformer: nn.Module) -> None:
    """Adds diffusers' ``CacheMixin`` to the class of this one transformer, where it lacks it."""
    from diffusers.models.cache_utils import CacheMixin

    kind = type(transformer)
    if not issubclass(kind, CacheMixin):
        namespace = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        transformer.__class__ = type(kind.__name__, (kind, CacheMixin), namespace)


class Calls:
    """Watches the calls of a transformer, and tells diffusers' caches what they ask for.

    Args:
        pipeline: which calls it.
        transformer: one with diffusers' ``CacheMixin``.
    """

    def __init__(self, pipeline: Any, transformer: Any) -> None:
        self._pipeline = pipeline
        self._transformer = transformer
        self._named_context = transformer.cache_context
        self._forward = inspect.signature(type(transformer).forward)
        self._named_depth = 0
        self._given: Any = None
        self._timestep: float | None = None
        self._pass = 0
        self._open = ExitStack()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Hooks on the transformer, for the time of the context."""
        transformer = self._transformer
        transformer.cache_context = self._name
        before = transformer.register_forward_pre_hook(self._before, with_kwargs=True)
        after = transformer.register_forward_hook(self._after, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            del transformer.cache_context

    def current_timestep(self) -> float:
        """The pipeline's; where it has none, what the transformer was called with."""
        own = getattr(self._pipeline, "current_timestep", None)
        if own is not None:
            return float(own)
        if self._timestep is None:
            self._timestep = self._read_timestep()
        return self._timestep

    def _read_timestep(self) -> float:
        if self._given is None:
            raise RuntimeError("the current timestep was asked for, and no call has told any.")
        return float(torch.as_tensor(self._given).reshape(-1)[0])

    @contextmanager
    def _name(self, name: str, **where: Any) -> Iterator[None]:
        """The pipeline names a context of its own."""
        with self._named_context(name, **where):
            self._named_depth += 1
            try:
                yield
            finally:
                self._named_depth -= 1

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        last, self._timestep = self._timestep, None
        self._given = self._forward.bind_partial(module, *args, **kwargs).arguments.get("timestep")
        if self._named_depth:
            return
        if self._given is not None:
            self._timestep = self._read_timestep()
        is_again = self._timestep is not None and self._timestep == last
        self._pass = self._pass + 1 if is_again else 0
        self._open.enter_context(self._named_context(f"pass {self._pass}"))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._open.close()
