"""Ranks that run one transformer together: what each of them decides, all must decide alike, or a
collective of its layers waits for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed, nn


def agreed(values: Sequence[float], shared: Sequence[tuple[Any, int]]) -> list[float]:
    """The largest of the values that the ranks of these meshes found, one by one.

    Args:
        values: of this rank.
        shared: what ``shared_along`` found.
    """
    found = list(values)
    for mesh, place in shared:
        largest = torch.tensor(found, dtype=torch.float64, device=mesh.device_type)
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=mesh.get_group(place))
        found = largest.tolist()
    return found


def shared_along(transformer: nn.Module | None) -> list[tuple[Any, int]]:
    """Device meshes and their dimensions along which the transformer's weights (FSDP2 of its
    blocks, tensor parallel) or its sequence (context parallel) are split.

    Ranks that each run a whole copy on data of their own need not agree.
    """
    found: list[tuple[Any, int]] = []
    if transformer is None or not (distributed.is_available() and distributed.is_initialized()):
        return found
    for parameter in transformer.parameters():
        mesh, placements = (getattr(parameter, n, ()) for n in ("device_mesh", "placements"))
        for place, how in enumerate(placements):  # of a DTensor
            if not how.is_replicate() and (mesh, place) not in found:
                found.append((mesh, place))
    parallel = getattr(transformer, "_parallel_config", None)  # of diffusers
    sequence = getattr(getattr(parallel, "context_parallel_config", None), "_mesh", None)
    if sequence is not None:
        found += [(sequence, place) for place in range(sequence.ndim)]
    return found
