"""AnyFlow: diffusers' ``AnyFlowTransformer3DModel`` and ``AnyFlowFARTransformer3DModel``, which
makes a video chunk by chunk.

A layer is one block: self-attention over all frames, cross-attention to the prompt, feed-forward.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, WholeCall, hookimpl, is_named

claims = (
    "diffusers.AnyFlowTransformer3DModel",
    "diffusers.AnyFlowFARTransformer3DModel",
)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    if not is_named(transformer, "AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel"):
        return None
    return Backbone(
        name="anyflow",
        lists=(BlockList("blocks"),),
        hidden_size=getattr(getattr(transformer, "proj_out", None), "in_features", None),
        # Between two chunks FAR is called to fill its cache of keys and values.
        whole_calls=(WholeCall("kv_cache_flag", True, item="is_cache_step"),),
    )
