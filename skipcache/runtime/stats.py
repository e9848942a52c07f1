"""What a run did: steps refreshed and reused, layers run, bytes held."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from skipcache.runtime.store import Run


@dataclass(frozen=True)
class StreamStats:
    """One guidance pass of one run.

    Attributes:
        plan: one letter a step, F = refresh (full), r = reuse.
        depth: layers of the model, L.
        kept_layers: layers that a reuse step runs, front_layers + back_layers.
    """

    plan: str
    depth: int
    kept_layers: int

    @property
    def refreshed(self) -> int:
        """Steps that ran every layer."""
        return self.plan.count("F")

    @property
    def reused(self) -> int:
        """Steps that left the deep span out."""
        return self.plan.count("r")

    @property
    def layers_run(self) -> int:
        """Layers run over all steps."""
        return self.refreshed * self.depth + self.reused * self.kept_layers

    @property
    def layers_total(self) -> int:
        """Layers that the same steps would have run uncached."""
        return len(self.plan) * self.depth


@dataclass(frozen=True)
class CacheStats:
    """The last run of a target: sums over its streams, and each stream apart.

    Attributes:
        streams: stats by stream: the pass's name where the pipeline gives one, else ``"0"``,
            ``"1"``, ... in the order of calls. With two transformers the name is in front:
            ``"transformer_2/0"``.
        cache_bytes: the most bytes that the caches held at once, measured on the stored tensors.
        preset: name of the preset in use, given or the model's own, or what a speedup took:
            ``"recipe/2x"``, or ``"line/2x"`` without a recipe; None where there is none. What was
            given beside it is not part of it. Those of two transformers that differ are joined by
            ``|``.
    """

    streams: Mapping[str, StreamStats] = field(default_factory=dict)
    cache_bytes: int = 0
    preset: str | None = None

    @property
    def refreshed(self) -> int:
        """Refresh steps, summed over streams."""
        return sum(stream.refreshed for stream in self.streams.values())

    @property
    def reused(self) -> int:
        """Reuse steps, summed over streams."""
        return sum(stream.reused for stream in self.streams.values())

    @property
    def layers_run(self) -> int:
        """Layers run, summed over streams."""
        return sum(stream.layers_run for stream in self.streams.values())

    @property
    def layers_total(self) -> int:
        """Layers that the uncached run would have run."""
        return sum(stream.layers_total for stream in self.streams.values())

    @property
    def compute_fraction(self) -> float:
        """layers_run / layers_total; 1.0 before any run. A count of layers, not a speedup."""
        return self.layers_run / self.layers_total if self.layers_total else 1.0

    @property
    def plan(self) -> str:
        """The plan as in ``"FrrFrr"``; the streams' plans joined by ``|`` where they differ."""
        return "|".join(dict.fromkeys(stream.plan for stream in self.streams.values()))


def stats_of(
    run: Run | None, depth: int, kept_layers: int, preset: str | None = None
) -> CacheStats:
    """Reads a run's record; empty stats before the first one."""
    if run is None:
        return CacheStats(preset=preset)
    streams = {
        _name_of(key): StreamStats("".join("F" if r else "r" for r in s.record), depth, kept_layers)
        for key, s in run.streams.items()
        if s.record
    }
    return CacheStats(streams, run.peak_bytes, preset)


def merge_stats(parts: Mapping[str, CacheStats]) -> CacheStats:
    """One ``CacheStats`` for a pipeline, its transformers' names in front of the streams' where
    there are several.
    """
    if len(parts) == 1:
        return next(iter(parts.values()))
    streams = {
        f"{name}/{key}": s for name, part in parts.items() for key, s in part.streams.items()
    }
    presets = dict.fromkeys(str(part.preset) for part in parts.values())
    preset = None if list(presets) == ["None"] else "|".join(presets)
    return CacheStats(streams, sum(part.cache_bytes for part in parts.values()), preset)


def _name_of(key: Hashable) -> str:
    return (
        ".".join(str(part) for part in key)
        if isinstance(key, Sequence) and not isinstance(key, str)
        else str(key)
    )
