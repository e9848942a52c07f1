"""Checks a call of the transformer against the sizes that its model was made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from skipcache.backbone import Backbone, InputSize
from skipcache.errors import ConfigError


class InputCheck:
    """The sizes that a backbone states, looked up in the arguments of a call.

    Args:
        backbone: whose sizes.
        parameters: names of the forward's parameters, in order.
    """

    def __init__(self, backbone: Backbone, parameters: Sequence[str]) -> None:
        self.name, self.sizes = backbone.name, backbone.input_sizes
        self.parameters = tuple(parameters)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Nothing is read but shapes and lengths.

        Raises:
            ConfigError: an argument of another size.
        """
        for rule in self.sizes:
            if rule.unless_false and self._given(rule.unless_false, args, kwargs) is False:
                continue
            size = _size_of(self._given(rule.argument, args, kwargs), rule)
            if size is not None and size not in rule.allowed:
                allowed = " or ".join(str(number) for number in sorted(rule.allowed))
                raise ConfigError(
                    f"{rule.argument} has {size} {rule.what}, and this {self.name!r} model was "
                    f"made for {allowed}."
                )

    def _given(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        position = self.parameters.index(name) if name in self.parameters else len(args)
        return args[position] if position < len(args) else None


def _size_of(value: Any, rule: InputSize) -> int | None:
    if rule.axis is None:
        return len(value) if isinstance(value, (list, tuple)) else None
    if isinstance(value, torch.Tensor) and value.dim() > rule.axis:
        return value.shape[rule.axis]
    return None
