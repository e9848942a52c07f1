"""Cosmos: diffusers' ``CosmosTransformer3DModel`` (1, 2 and 2.5; one stream that looks at the text)
and ``Cosmos3OmniTransformer`` (a stream to understand and one to generate).
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, Timestep, hookimpl, is_named

claims = ("diffusers.CosmosTransformer3DModel", "diffusers.Cosmos3OmniTransformer")

# The first Cosmos is given a quarter of the logarithm of sigma, which falls from 80 to 0.002.
_LOG_SIGMA = Timestep(noise=1.0955, clean=-1.5537)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name. The first Cosmos is told from its successors by its learnt positions."""
    width = getattr(getattr(transformer, "proj_out", None), "in_features", None)
    if is_named(transformer, "CosmosTransformer3DModel"):
        is_first = getattr(transformer, "learnable_pos_embed", None) is not None
        return Backbone(
            name="cosmos",
            lists=(BlockList("transformer_blocks"),),
            timestep=_LOG_SIGMA if is_first else Timestep(noise=1.0),
            hidden_size=width,
        )
    if is_named(transformer, "Cosmos3OmniTransformer"):
        return Backbone(
            name="cosmos",
            lists=(BlockList("layers", ("gen_seq", "und_seq"), ("und_seq", "gen_seq")),),
            timestep=Timestep("vision_timesteps"),
            hidden_size=width,
        )
    return None
