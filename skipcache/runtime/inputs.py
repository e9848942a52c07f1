"""What a backbone says of a call of the transformer: sizes that the model was made for, and whether
it is a denoising step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from skipcache.backbone import Backbone, InputSize
from skipcache.errors import ConfigError


class CallReader:
    """Looks up in the arguments of a call what a backbone states of them.

    Args:
        backbone: whose word.
        parameters: names of the forward's parameters, in order.
    """

    def __init__(self, backbone: Backbone, parameters: Sequence[str]) -> None:
        self.name, self.sizes = backbone.name, backbone.input_sizes
        self.whole_calls = backbone.whole_calls
        self.parameters = tuple(parameters)

    def is_step(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether it is a denoising step, so far as the backbone can tell."""
        for rule in self.whole_calls:
            given = self._given(rule.argument, args, kwargs)
            if rule.item is not None:
                given = given.get(rule.item) if isinstance(given, Mapping) else None
            if isinstance(given, type(rule.value)) and given == rule.value:
                return False
        return True

    def check_sizes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
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
