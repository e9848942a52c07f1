"""What the public functions are given: a pipeline, or a bare transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from skipcache.errors import TargetError

if TYPE_CHECKING:
    from torch import nn


def transformers_of(target: object) -> dict[str, nn.Module]:
    """The transformers of a pipeline by component name, or the bare one; unwrapped from
    ``torch.compile``.

    Raises:
        TargetError: there is none.
    """
    from torch import nn

    if is_module(target):
        return {"transformer": _unwrap(target)}
    components = getattr(target, "components", None)
    names = (
        list(components) if isinstance(components, dict) else list(getattr(target, "__dict__", ()))
    )
    found = {
        name: _unwrap(module)
        for name in names
        if (name.startswith("transformer") or name.endswith("_transformer") or name == "prior")
        and isinstance(module := getattr(target, name, None), nn.Module)
    }
    if not found:
        has = f" It has: {', '.join(names)}." if names else ""
        raise TargetError(
            f"{type(target).__qualname__!r} is no torch module and has no component named "
            f"'transformer'.{has} "
            "Pass a diffusers pipeline with a transformer, or the transformer itself."
        )
    return found


def is_module(target: object) -> TypeGuard[nn.Module]:
    """Whether this is a module, and so a transformer by itself."""
    from torch import nn

    return isinstance(target, nn.Module)


def _unwrap(module: nn.Module) -> nn.Module:
    while "_orig_mod" in module._modules:
        inner = module._modules["_orig_mod"]
        assert inner is not None
        module = inner
    return module
