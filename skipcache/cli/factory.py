"""What ``MODULE:FACTORY`` on a command line stands for."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
from typing import TYPE_CHECKING, Any

from skipcache.errors import ConfigError

if TYPE_CHECKING:
    from skipcache.testing import AdapterCase


def imported(name: str) -> Any:
    """What ``package.module:name`` names; modules are looked for in the working directory too.

    Raises:
        ConfigError: not of that form, or no such module or name.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ConfigError(f"{name!r} is not of the form MODULE:FACTORY, as in my_model:tiny.")
    if "" not in sys.path:
        sys.path.insert(0, "")  # to stay: a factory may import when it is called, much later
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name!r} cannot be imported: {error}") from error
    return found


def case_of(name: str, adapter: str | None = None) -> AdapterCase:
    """The case that a factory makes.

    Args:
        name: ``package.module:function``. The function takes nothing and returns an
            ``AdapterCase``, or a transformer and a dict of the keyword arguments of one forward.
        adapter: the name of the adapter to check, instead of the case's own.

    Raises:
        ConfigError: no such module or function, or it returned something else.
    """
    from torch import nn

    from skipcache.testing import AdapterCase
    from skipcache.testing.guess import varied

    found = imported(name)
    made = found() if callable(found) else found
    if isinstance(made, AdapterCase):
        case = made
    elif (
        isinstance(made, tuple)
        and len(made) == 2
        and isinstance(made[0], nn.Module)
        and isinstance(made[1], dict)
    ):
        transformer, inputs = made
        case = AdapterCase(lambda: copy.deepcopy(transformer), lambda seed: varied(inputs, seed))
    else:
        raise ConfigError(
            f"{name!r} {'returned' if callable(found) else 'is'} {type(made).__name__}. It returns "
            "an AdapterCase, or a transformer and the keyword arguments of one forward: "
            "(transformer, {'hidden_states': ...})."
        )
    if adapter is None:
        return case
    return dataclasses.replace(case, adapter=adapter)
