"""Conformance checks for anybody's adapter.

Usable from pytest, one test a check::

    from skipcache.testing import adapter_checks


    @pytest.mark.parametrize("check", adapter_checks(make_transformer, make_inputs), ids=str)
    def test_my_adapter(check):
        check()

or from a shell, ``skipcache check MODULE:FACTORY``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from skipcache.backbone import Backbone
from skipcache.errors import ConfigError, did_you_mean
from skipcache.testing.case import AdapterCase, Check, CheckFailure, CheckSkipped, Inputs
from skipcache.testing.checks import CHECKS

__all__ = ["AdapterCase", "Check", "CheckFailure", "CheckSkipped", "adapter_checks"]


def adapter_checks(
    make_transformer: Callable[[], nn.Module],
    make_inputs: Callable[[int], Inputs],
    *,
    make_other_inputs: Callable[[int], Inputs] | None = None,
    adapter: str | Backbone | object | None = None,
    expected_failures: Mapping[str, str] | None = None,
    seed: int = 0,
) -> list[Check]:
    """Every check of the kit on one transformer.

    Args:
        make_transformer: as in ``AdapterCase``.
        make_inputs: as in ``AdapterCase``.
        make_other_inputs: as in ``AdapterCase``.
        adapter: as in ``AdapterCase``.
        expected_failures: name of a check to the reason why it is known to fail here. It is
            reported as skipped with that reason, and fails once it passes.
        seed: as in ``AdapterCase``.

    Returns:
        ``Check`` objects, to be called: a list, as pytest's ``parametrize`` wants it.

    Raises:
        ConfigError: ``expected_failures`` names a check that does not exist.
    """
    case = AdapterCase(make_transformer, make_inputs, make_other_inputs, adapter, seed)
    known = dict(expected_failures or {})
    names = [function.__name__ for function in CHECKS]
    for name in known:
        if name not in names:
            raise ConfigError(f"no check is named {name!r}. {did_you_mean(name, names)}")
    return [Check(f.__name__, f, case, known.get(f.__name__)) for f in CHECKS]
