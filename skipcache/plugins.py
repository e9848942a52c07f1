"""Finds adapters: installed distributions (entry points), registered objects, and the one that
claims a model.
"""

from __future__ import annotations

import importlib.metadata
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pluggy

from skipcache import hookspecs
from skipcache.backbone import Backbone, is_named
from skipcache.errors import AdapterError, NoAdapterError, PluginWarning, did_you_mean

if TYPE_CHECKING:
    from torch import nn

GROUP = "skipcache"


@dataclass(frozen=True)
class Adapter:
    """One adapter, as ``skipcache adapters`` lists it.

    Attributes:
        name: plugin id.
        origin: distribution and version it came from, or ``"registered"``.
        claims: the class names that it says it describes (its ``claims`` attribute).
        refusals: class names that it knows and that cannot be cached, each with the sentence why
            (its ``refusals`` attribute).
        failure: why it could not be loaded; None when it is in use.
    """

    name: str
    origin: str
    claims: tuple[str, ...] = ()
    failure: str | None = None
    refusals: Mapping[str, str] = field(default_factory=dict)


class AdapterRegistry:
    """A set of adapters. ``default_registry()`` is the one that the public functions use."""

    def __init__(self, entry_points: Sequence[importlib.metadata.EntryPoint] = ()) -> None:
        """Loads the entry points one by one; what fails is warned about and left out."""
        self._manager = pluggy.PluginManager("skipcache")
        self._manager.add_hookspecs(hookspecs)
        self._adapters: dict[str, Adapter] = {}
        self._failed: list[Adapter] = []
        for entry_point in entry_points:
            self._load(entry_point)

    def _load(self, entry_point: importlib.metadata.EntryPoint) -> None:
        distribution = entry_point.dist
        origin = (
            f"{distribution.name} {distribution.version}"
            if distribution
            else "unknown distribution"
        )
        try:
            self.register(entry_point.load(), entry_point.name, origin)
        except Exception as error:  # a broken plugin, whatever it raises, must not break the others
            failure = f"{type(error).__name__}: {error}"
            self._failed.append(Adapter(entry_point.name, origin, failure=failure))
            warnings.warn(
                f"adapter {entry_point.name!r} of {origin} could not be loaded and is left out: "
                f"{failure}",
                PluginWarning,
                stacklevel=2,
            )

    def register(self, plugin: object, name: str | None = None, origin: str = "registered") -> str:
        """Adds one plugin: a module or object with the ``skipcache_backbone`` hook. The last one is
        asked first.

        Returns:
            The name it is registered under.

        Raises:
            AdapterError: the name is taken, a hook is misspelt or has a wrong signature, or there
                is no hook.
        """
        name = name or _name_of(plugin)
        if name in self._adapters:
            raise AdapterError(
                f"an adapter named {name!r} is already there, from {self._adapters[name].origin}. "
                "Unregister it first, or register this one under another name."
            )
        claims = getattr(plugin, "claims", ())
        if isinstance(claims, str) or not all(isinstance(c, str) for c in _as_tuple(claims)):
            raise AdapterError(
                f"adapter {name!r}: claims is {claims!r}. It is a tuple of names: ('FooDiT',)."
            )
        refusals = getattr(plugin, "refusals", {})
        if not isinstance(refusals, Mapping) or not all(
            isinstance(part, str) for pair in refusals.items() for part in pair
        ):
            raise AdapterError(
                f"adapter {name!r}: refusals is {refusals!r}. It maps class names to sentences."
            )
        try:
            if self._manager.register(plugin, name) is None:
                raise AdapterError(f"adapter {name!r} is blocked.")
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            self._forget(name)
            raise AdapterError(f"adapter {name!r} cannot be registered: {error}") from error
        if not self._manager.get_hookcallers(plugin):
            self._forget(name)
            raise AdapterError(
                f"adapter {name!r} implements no hook. It needs a function "
                "skipcache_backbone(transformer) marked with "
                "skipcache.hookimpl; see docs/how-to/write-an-adapter.md."
            )
        self._adapters[name] = Adapter(name, origin, tuple(claims), refusals=dict(refusals))
        return name

    def _forget(self, name: str) -> None:
        if self._manager.has_plugin(name):
            self._manager.unregister(name=name)

    def unregister(self, name: str) -> None:
        """Takes an adapter out again.

        Raises:
            NoAdapterError: there is none of that name.
        """
        self._require(name)
        del self._adapters[name]
        self._forget(name)

    def adapters(self) -> list[Adapter]:
        """Every adapter by name, the ones that failed to load after the others."""
        return sorted(self._adapters.values(), key=lambda adapter: adapter.name) + self._failed

    def backbone_of(self, transformer: nn.Module, adapter: str | None = None) -> Backbone:
        """Asks the adapters, the last registered first, or only the one named.

        Raises:
            NoAdapterError: nobody claims the transformer, or no adapter has that name.
            AdapterError: an adapter raised, answered with something that is no ``Backbone``, or
                says that this class cannot be cached.
        """
        if adapter is not None:
            self._require(adapter)
        for name in [adapter] if adapter is not None else reversed(self._adapters):
            backbone = self._ask(name, transformer)
            if backbone is not None:
                return backbone
        kind = type(transformer)
        for name, adapter_said in self._adapters.items():
            for refused, reason in adapter_said.refusals.items():
                if is_named(transformer, refused):
                    raise AdapterError(f"{refused} cannot be cached, says {name!r}: {reason}")
        asked = f"adapter {adapter!r} does not claim" if adapter else "no adapter claims"
        raise NoAdapterError(
            f"{asked} {kind.__qualname__!r} ({kind.__module__}). Installed: {self._names()}. "
            "Pass adapter=... (a name, a Backbone or a plugin), see "
            "docs/how-to/write-an-adapter.md."
        )

    def _ask(self, name: str, transformer: nn.Module) -> Backbone | None:
        others = [p for other, p in self._manager.list_name_plugin() if other != name]
        caller = self._manager.subset_hook_caller("skipcache_backbone", others)
        origin = self._adapters[name].origin
        try:
            answer = caller(transformer=transformer)
        except Exception as error:
            raise AdapterError(
                f"adapter {name!r} ({origin}) failed on {type(transformer).__qualname__!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if answer is not None and not isinstance(answer, Backbone):
            raise AdapterError(
                f"adapter {name!r} ({origin}) answered "
                f"skipcache_backbone({type(transformer).__qualname__}) with "
                f"{answer!r}. It must return a skipcache.Backbone, or None for a model that is not "
                "its own."
            )
        return answer

    def _require(self, name: str) -> None:
        if name not in self._adapters:
            failures = "".join(f" {a.name!r} failed to load: {a.failure}." for a in self._failed)
            raise NoAdapterError(
                f"no adapter is named {name!r}. {did_you_mean(name, self._adapters)}{failures}"
            )

    def _names(self) -> str:
        return ", ".join(sorted(self._adapters)) or "none"


def _as_tuple(claims: object) -> tuple[object, ...]:
    return tuple(claims) if isinstance(claims, Iterable) else (claims,)


def _name_of(plugin: object) -> str:
    name = getattr(plugin, "__name__", None) or type(plugin).__name__
    return str(name).rpartition(".")[2]


_lock = threading.Lock()
_default: AdapterRegistry | None = None


def default_registry() -> AdapterRegistry:
    """The registry of this process; the first call loads the installed adapters."""
    global _default
    with _lock:
        if _default is None:
            found = importlib.metadata.entry_points(group=GROUP)
            _default = AdapterRegistry(sorted(found, key=lambda entry_point: entry_point.name))
        return _default


def register_adapter(plugin: object, name: str | None = None) -> str:
    """Registers an adapter for this process: for notebooks, tests and models of your own.

    Args:
        plugin: a module or object with a ``skipcache_backbone(transformer)`` function marked by
            ``skipcache.hookimpl``. It is asked before the installed ones.
        name: its id; by default the name of the module, class or function.

    Returns:
        The name, for ``unregister_adapter`` and ``apply_skip_cache(..., adapter=name)``.

    Raises:
        AdapterError: the name is taken, or the plugin has no valid hook.
    """
    return default_registry().register(plugin, name)


def unregister_adapter(name: str) -> None:
    """Takes a registered adapter out again.

    Args:
        name: the id that ``register_adapter`` returned.

    Raises:
        NoAdapterError: there is none of that name.
    """
    default_registry().unregister(name)


def resolve_backbone(transformer: nn.Module, adapter: str | Backbone | object | None) -> Backbone:
    """What is said of the transformer by the adapter asked for.

    Args:
        transformer: the model.
        adapter: the name of an adapter, a ``Backbone``, or a plugin; None: whichever claims it.

    Raises:
        AdapterError: none claims it, or the answer is wrong.
    """
    if isinstance(adapter, Backbone):
        return adapter
    if adapter is None or isinstance(adapter, str):
        return default_registry().backbone_of(transformer, adapter)
    if not hasattr(adapter, "skipcache_backbone"):
        raise AdapterError(
            f"adapter is {adapter!r}. Pass the name of an adapter, a Backbone, or a plugin with "
            "the hook skipcache_backbone(transformer)."
        )
    own = AdapterRegistry()
    return own.backbone_of(transformer, own.register(adapter))
