"""DiT: diffusers' ``DiTTransformer2DModel`` and patched ``Transformer2DModel``, and the research
code's ``DiT``.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl

claims = (
    "diffusers.DiTTransformer2DModel",
    "diffusers.Transformer2DModel (patched input)",
    "DiT (x_embedder, blocks, final_layer)",
)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """Class-conditional DiT, by class name and structure; no model code is imported."""
    names = {kind.__name__ for kind in type(transformer).__mro__}
    if "DiTTransformer2DModel" in names or (
        "Transformer2DModel" in names and getattr(transformer, "is_input_patches", False)
    ):
        return Backbone(
            name="dit_xl",
            lists=(BlockList("transformer_blocks"),),
            hidden_size=getattr(transformer, "inner_dim", None),
            preset="skip-dit/dit-xl",
        )
    if "DiT" in names and all(
        hasattr(transformer, a) for a in ("x_embedder", "blocks", "final_layer")
    ):
        return Backbone(
            name="dit_xl",
            lists=(BlockList("blocks", takes=("x",), returns="x"),),
            timestep=Timestep("t"),
            entry_points=("forward_with_cfg",),
            preset="skip-dit/dit-xl",
        )
    return None
