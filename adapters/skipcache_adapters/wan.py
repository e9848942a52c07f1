"""Wan 2.1 and 2.2 and what was made of them: diffusers' ``WanTransformer3DModel``,
``WanVACETransformer3DModel``, ``WanAnimateTransformer3DModel``, ``WanAnimate2Transformer3DModel``
and ``ChronoEditTransformer3DModel``.

A layer is one block: self-attention over all frames, cross-attention to the prompt, feed-forward.
VACE adds its hints between the blocks, the last ones too, so all that makes them always runs.
Animate 2 is called once a segment to fill its cache of keys and values.
"""

from __future__ import annotations

from torch import nn

from skipcache import Backbone, BlockList, WholeCall, hookimpl, is_named

claims = (
    "diffusers.WanTransformer3DModel",
    "diffusers.WanVACETransformer3DModel",
    "diffusers.WanAnimateTransformer3DModel",
    "diffusers.WanAnimate2Transformer3DModel",
    "diffusers.ChronoEditTransformer3DModel",
)

_ALWAYS_RUN: dict[str, tuple[str, ...]] = {
    "WanTransformer3DModel": (),
    "WanVACETransformer3DModel": ("vace_blocks",),
    "WanAnimateTransformer3DModel": (
        "motion_encoder.res_blocks",
        "motion_encoder.motion_network",
    ),
    "WanAnimate2Transformer3DModel": (),
    "ChronoEditTransformer3DModel": (),
}


@hookimpl
def skipcache_backbone(transformer: nn.Module) -> Backbone | None:
    """By class name."""
    known = [name for name in _ALWAYS_RUN if is_named(transformer, name)]
    if not known:
        return None
    head = getattr(transformer, "head", None)  # of Animate 2; the others have a proj_out
    width = getattr(getattr(transformer, "proj_out", None), "in_features", None)
    return Backbone(
        name="wan",
        lists=(BlockList("blocks"),),
        hidden_size=width if width is not None else getattr(head, "dim", None),
        whole_calls=(WholeCall("kv_cache_mode", "extract"),),
        interleaved=(BlockList("face_adapter"),) if hasattr(transformer, "face_adapter") else (),
        always_run=_ALWAYS_RUN[known[0]],
    )
