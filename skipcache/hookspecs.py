"""The hooks that an adapter plugin may implement. Signatures only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from skipcache.backbone import Backbone

hookspec = pluggy.HookspecMarker("skipcache")
hookimpl = pluggy.HookimplMarker("skipcache")


@hookspec(firstresult=True)
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """Describe this transformer, or return None if it is not one of yours."""
