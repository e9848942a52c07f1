"""HunyuanDiT: diffusers' ``HunyuanDiT2DModel`` and the research code's ``HunYuanDiT``.

Both are born with long skips: the second half of the layers takes the outputs of the first half,
last in first out. ControlNet residuals are added to what the skips carry.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, InputSize, SkipCacheError, Timestep, hookimpl

claims = (
    "diffusers.HunyuanDiT2DModel",
    "HunYuanDiT (x_embedder, blocks, final_layer)",
)


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """HunyuanDiT, by class name and structure; the skips are those that its blocks have."""
    names = {kind.__name__ for kind in type(transformer).__mro__}
    blocks = getattr(transformer, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        return None
    if "HunyuanDiT2DModel" in names:
        flow, timestep, width = "hidden_states", Timestep(), "inner_dim"
    elif "HunYuanDiT" in names and all(
        hasattr(transformer, a) for a in ("x_embedder", "final_layer")
    ):
        flow, timestep, width = "x", Timestep("t"), "hidden_size"
    else:
        return None
    skips = _native_skips(transformer, blocks)
    residuals = InputSize(
        "controlnet_block_samples", None, (len(skips),), "ControlNet residuals, one a skip branch"
    )
    return Backbone(
        name="hunyuan_dit",
        lists=(BlockList("blocks", takes=(flow,), returns=flow),),
        timestep=timestep,
        native_skips=skips,
        hidden_size=getattr(transformer, width, None),
        preset="skip-dit/hunyuan",
        input_sizes=(residuals,),
    )


def _native_skips(transformer: nn.Module, blocks: nn.ModuleList) -> tuple[tuple[int, int], ...]:
    """(source, target) of every block that takes a skip; the first of them takes the last skip.

    Raises:
        SkipCacheError: an odd depth. The model keeps one skip fewer than its blocks take, and fails
            in its own forward.
    """
    depth = len(blocks)
    targets = [i for i, b in enumerate(blocks) if getattr(b, "skip_linear", None) is not None]
    if targets and depth % 2:
        raise SkipCacheError(
            f"{type(transformer).__name__} has {depth} blocks. {len(targets)} of them take a skip, "
            f"and its forward keeps {len(targets) - 1}: with an odd depth the model itself cannot "
            "run. Use an even one."
        )
    return tuple((depth - 1 - target, target) for target in reversed(targets))
