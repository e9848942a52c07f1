"""Runs the calls of a calibration, and says what was seen."""

from __future__ import annotations

import math
import statistics as stats
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipcache.api import skip_cache
from skipcache.branches.files import BaseModel
from skipcache.config import SkipCacheConfig
from skipcache.errors import ConfigError
from skipcache.recipes.checkpoint import Checkpoint, described
from skipcache.recipes.listening import Listened, effects_of, listening
from skipcache.recipes.statistics import Array
from skipcache.runtime.controller import controller_of
from skipcache.schedules import Miss
from skipcache.targets import transformers_of

ELEMENTS = 262_144  # of a call's output that moments are taken of

Moments = Mapping[str, Array]


class Sampler:
    """Runs the calls, always from the same noise, and keeps what was measured."""

    def __init__(
        self,
        pipe: Any,
        calls: Sequence[dict[str, Any]],
        seed: int,
        adapter: Any = None,
    ) -> None:
        self.pipe, self.calls, self.seed, self.adapter = pipe, calls, seed, adapter
        self.checkpoint = Checkpoint(None, "")
        self.states = states_of(calls)
        self.times: tuple[float, ...] = ()
        self.effects: Array | None = None
        self.sample_shape: tuple[int, ...] = ()
        # The last sample of a call, fp32 on the CPU; the last few are kept.
        self.uncached_sample = lru_cache(maxsize=4)(self._sampled)
        self.misses: list[Miss] = []  # of the last run that measured any
        self._progress: Callable[[int, int], object] | None = None
        self._done = self._total = 0

    def keep_in(self, path: str | Path | None, base: BaseModel) -> None:
        """Keeps what is measured of the base model in a file, and goes on from what it holds.

        Raises:
            RecipeFileError: it cannot be read, or is of another calibration.
        """
        calls = [
            {**call, "noise": [state for _, state in states]}
            for call, states in zip(self.calls, self.states, strict=True)
        ]
        scheduler = getattr(self.pipe, "scheduler", None)
        settings = dict(getattr(scheduler, "config", None) or {})
        words = f"{type(scheduler).__name__} {sorted(settings.items(), key=repr)}"
        self.checkpoint = Checkpoint(path, described((base, words), calls, self.seed))

    @contextmanager
    def generators_kept(self) -> Iterator[None]:
        """Puts the generators of the calls back afterwards."""
        given = {each: each.get_state() for call in self.calls for each in _generators(call)}
        try:
            yield
        finally:
            for generator, state in given.items():
                generator.set_state(state)

    def report(self, progress: Callable[[int, int], object] | None, total: int) -> None:
        self._progress, self._total = progress, total

    @property
    def guidance_scale(self) -> float | None:
        given = self.calls[0].get("guidance_scale")
        return float(given) if isinstance(given, (int, float)) else None

    def run(self, index: int, **listening_to: Any) -> Listened:
        """Samples a call."""
        call = dict(self.calls[index])
        for generator, state in self.states[index]:
            generator.set_state(state)
        if call.get("generator") is None:
            call["generator"] = torch.Generator().manual_seed(self.seed + index)
        with (
            listening(self.pipe, **listening_to) as heard,
            torch.no_grad(),
            torch.random.fork_rng(),
        ):
            torch.manual_seed(self.seed + index)  # what draws from no generator of the call
            self.pipe(**call)
        if heard.sample is None:
            raise ConfigError("the pipeline sampled without its scheduler, so nothing was learnt.")
        shape = tuple(heard.sample.shape[1:])
        if self.sample_shape and shape != self.sample_shape:
            raise ConfigError(
                f"call {index} makes samples of {shape} where others are of {self.sample_shape}. "
                "Calibrate each size on its own."
            )
        if self.times and heard.times != self.times:
            raise ConfigError(
                f"call {index} has {len(heard.times)} steps where others have {len(self.times)}, "
                "or other timesteps. Calibrate each number of steps on its own."
            )
        if len(heard.times) < 3:
            raise ConfigError(
                f"the calls make {len(heard.times)} steps. A cache needs at least three."
            )
        self.times, self.sample_shape = heard.times, shape
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, max(self._total, self._done))
        return heard

    def moments(self, index: int) -> Moments:
        """Of an uncached call, measured once."""

        def measure() -> dict[str, Array]:
            picked: list[torch.Tensor] = []
            sizes: list[torch.Size] = []
            by: list[str] = []  # the transformer called last before each step

            def keep(output: torch.Tensor) -> torch.Tensor:
                by.extend(called[-1:])
                called.clear()
                if not picked:
                    draw = torch.Generator().manual_seed(index)
                    chosen = torch.randperm(output.numel(), generator=draw)[:ELEMENTS]
                    picked.append(chosen.sort().values.to(output.device))
                    sizes.append(output.shape)
                if output.shape != sizes[0]:
                    raise ConfigError(
                        f"the scheduler is given outputs of shapes {tuple(sizes[0])} and "
                        f"{tuple(output.shape)} in one run, so they cannot be told from one "
                        "another. There are no recipes for such pipelines."
                    )
                return output.detach().flatten()[picked[0]].float().cpu()

            with _calls_of(self.pipe) as called:
                heard = self.run(index, keep=keep)
            assert heard.sample is not None
            rows = torch.stack(heard.outputs).double()
            of_all = {"effects": effects_of(heard)} if self.effects is None else {}
            return {
                **of_all,
                "times": np.array(heard.times),
                "shape": np.array(heard.sample.shape[1:], dtype=np.float64),
                "covariance": (rows @ rows.T / rows.shape[1]).numpy(),
                "weight": np.array([float(len(heard.sample))]),
                "power": np.array([float(heard.sample.double().square().mean())]),
                "switches": np.array(
                    [
                        (heard.times[i - 1] + heard.times[i]) / 2
                        for i in range(1, len(by))
                        if by[i] != by[i - 1]
                    ]
                ),
            }

        found = self.checkpoint.measured(f"moments.{index}", measure)
        if self.effects is None:
            self.times = tuple(found["times"].tolist())
            self.effects = found["effects"]
            self.sample_shape = tuple(int(size) for size in found["shape"])
        elif tuple(found["times"].tolist()) != self.times:
            raise ConfigError("the calls have different timesteps. Calibrate each on its own.")
        return found

    def _sampled(self, index: int) -> torch.Tensor:
        heard = self.run(index)
        assert heard.sample is not None
        return heard.sample.float().cpu()

    def errors(self, index: int, reference: torch.Tensor, config: SkipCacheConfig) -> list[float]:
        """Relative error of each sample of the call by that configuration."""
        with skip_cache(self.pipe, config=config, adapter=self.adapter):
            heard = self.run(index)
            controllers = map(controller_of, transformers_of(self.pipe).values())
            runs = [each.last_run for each in controllers if each is not None]
            self.misses = [miss for run in runs if run is not None for miss in run.misses]
        assert heard.sample is not None
        return sample_errors(heard.sample.float().cpu(), reference)


@contextmanager
def _calls_of(pipe: Any) -> Iterator[list[str]]:
    """Names of the pipeline's transformers, one a call."""
    called: list[str] = []
    handles = [
        transformer.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, transformer in transformers_of(pipe).items()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _generators(call: Mapping[str, Any]) -> list[torch.Generator]:
    given = call.get("generator")
    several = given if isinstance(given, (list, tuple)) else [given]
    return [generator for generator in several if isinstance(generator, torch.Generator)]


def states_of(
    calls: Sequence[Mapping[str, Any]],
) -> list[list[tuple[torch.Generator, torch.Tensor]]]:
    """Of each call, its generators and the states that it begins with."""
    uses: Counter[torch.Generator] = Counter()
    states = []
    for call in calls:
        generators = list(dict.fromkeys(_generators(call)))
        states.append([(each, _state_for(each, uses[each])) for each in generators])
        uses.update(generators)
    return states


def _state_for(generator: torch.Generator, use: int) -> torch.Tensor:
    """The generator's own for its first use; for later ones, seeded by so many draws from it."""
    state = generator.get_state()
    if use == 0:
        return state
    fresh = torch.Generator(generator.device)
    fresh.set_state(state)
    seeds = torch.randint(2**62, (use,), generator=fresh, device=generator.device)
    return fresh.manual_seed(int(seeds[-1])).get_state()


def sample_errors(samples: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """|sample - reference| / |reference| of each [B, ...]."""
    difference = (samples - reference).double().flatten(1).norm(dim=1)
    ratio: list[float] = (difference / reference.double().flatten(1).norm(dim=1)).tolist()
    return ratio


def decibels(errors: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of the signal-to-error ratio, dB."""
    values = [-20 * math.log10(max(error, 1e-9)) for error in errors]
    return stats.mean(values), stats.pstdev(values)
