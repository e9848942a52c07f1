"""A recipe: what was found out of one model, to name a speedup and get the best it can give."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from skipcache.branches.files import BaseModel, base_model_of, folder_of, is_made_for
from skipcache.config import SkipCacheConfig
from skipcache.errors import ConfigError, RecipeError, RecipeWarning
from skipcache.recipes.plan import PlannedRun, RecipeEstimator, RecipeSchedule, speedup_of
from skipcache.recipes.search import fewest_refreshes, plan_error
from skipcache.recipes.statistics import OutputStatistics

if TYPE_CHECKING:
    from torch import nn

DEFAULT_SPEEDUP = 2.0


@dataclass(frozen=True)
class Measured:
    """Nearness of samples to the uncached ones, on calls that nothing was fitted on.

    Attributes:
        decibels: ratio of signal to error of the sampler's last sample (latents), mean.
        deviation: its standard deviation over samples.
        samples: how many.
    """

    decibels: float
    deviation: float
    samples: int


@dataclass(frozen=True)
class Point:
    """A speedup that was measured.

    Attributes:
        speedup: asked for, wall-clock of the denoising.
        refresh_steps: of the steps that were calibrated.
        predicted_error: of the final sample, relative, root mean square.
        measured: on calls that were held out.
        expected_speedup: with so many refreshes, by the measured cost of a reuse step.
    """

    speedup: float
    refresh_steps: tuple[int, ...]
    predicted_error: float
    measured: Measured
    expected_speedup: float


@dataclass(frozen=True)
class RecipeRecord:
    """Where a recipe comes from.

    Attributes:
        base_model: class and fingerprint of the transformer.
        scheduler: ``name`` of its class, and ``prediction_type`` where it has one.
        guidance_scale: of the calls; None where not given.
        sample_shape: of one sample, as the scheduler sees it.
        layers: of the transformer.
        made_by: one sentence for people.
    """

    base_model: BaseModel
    scheduler: Mapping[str, str | None]
    guidance_scale: float | None
    sample_shape: tuple[int, ...]
    layers: int
    made_by: str


@dataclass(frozen=True, eq=False)
class Recipe:
    """When to refresh and what to take for the outputs in between, for any speedup and any number
    of steps of one model. Made by ``calibrate``.

    Attributes:
        statistics: what was measured of the model's outputs.
        reuse_cost: seconds of a reuse step over those of a refresh.
        points: the speedups at which its quality was measured.
        record: where it comes from.
    """

    statistics: OutputStatistics
    reuse_cost: float
    points: tuple[Point, ...]
    record: RecipeRecord
    plans: Mapping[int, tuple[int, ...]] = field(default_factory=dict, repr=False)

    @property
    def steps(self) -> int:
        """Number of denoising steps that it was calibrated at."""
        return self.statistics.steps

    @property
    def highest_speedup(self) -> float:
        """The fastest that it can be asked for, at the steps that it was calibrated at."""
        fewest = max(2, fewest_refreshes(self.statistics))
        return speedup_of(self.steps, fewest, self.reuse_cost)

    def at(
        self, speedup: float = DEFAULT_SPEEDUP, *, adaptive: str | None = None
    ) -> SkipCacheConfig:
        """The configuration that is so much faster: wall-clock of the denoising, at least.

        Args:
            speedup: a factor from 1.
            adaptive: ``"batch"`` adds refreshes to a run whose estimates miss by more than those of
                the calibration did, as those of other prompts, sizes or weights may, so it can be
                slower; ``"sample"`` where those of one sample of the batch do. Looks at refreshes
                only, and waits for the device there. Adds none to runs of more steps than were
                calibrated, or of unknown length.

        Raises:
            ConfigError: a speedup below 1 or that the model cannot reach, or another ``adaptive``.
        """
        self._check(speedup)
        if adaptive not in (None, "batch", "sample"):
            raise ConfigError(f"adaptive is {adaptive!r}. It is 'batch', 'sample' or None.")
        known = {len(point.refresh_steps): point.refresh_steps for point in self.points}
        schedule = RecipeSchedule(
            self.statistics, float(speedup), self.reuse_cost, {**known, **self.plans}, adaptive
        )
        estimator = RecipeEstimator(self.statistics, schedule.planned(self.statistics.times).plan)
        return SkipCacheConfig(
            front_layers=0, back_layers=0, schedule=schedule, estimator=estimator
        )

    def predicted_error(self, speedup: float, steps: int | None = None) -> float:
        """Of the final sample at that speedup, relative, root mean square.

        Args:
            speedup: as in ``at``.
            steps: of the run, spread as those that were calibrated; default: as many.

        Raises:
            ConfigError: as ``at``, or fewer than three steps.
        """
        run = planned(self, speedup, self.times_of(steps))
        return plan_error(self.statistics.at(run.times), run.plan)

    def times_of(self, steps: int | None) -> tuple[float, ...]:
        """The times of a run of so many steps, spread as those that were calibrated.

        Raises:
            ConfigError: fewer than three steps.
        """
        times = self.statistics.times
        if steps is None or steps == self.steps:
            return times
        if steps < 3:
            raise ConfigError(f"steps is {steps!r}. A cache needs at least three.")
        return spread_times(times, steps)

    def with_plan(self, refresh_steps: Sequence[int]) -> Recipe:
        """The same, with another schedule for so many refreshes at the steps calibrated.

        Raises:
            ConfigError: the first step is not among them, or the first one of another transformer,
                or one is past the last.
        """
        steps = tuple(sorted(set(refresh_steps)))
        begins = sorted({begin for begin, _ in self.statistics.stages})
        if not set(begins) <= set(steps) or steps[0] < 0 or steps[-1] >= self.steps:
            raise ConfigError(
                f"refresh steps {tuple(refresh_steps)} are none of {self.steps} steps: "
                f"{' and '.join(map(str, begins))} must be among them, and the last one is below "
                "that number."
            )
        return replace(self, plans={**self.plans, len(steps): steps})

    def check_for(self, transformer: nn.Module, scheduler: object = None) -> None:
        """Refuses another class of model or what a scheduler makes something else of, and warns of
        other weights or another scheduler.

        Raises:
            RecipeError: another class, or another type of prediction.
        """
        expected, found = self.record.base_model, base_model_of(transformer)
        if expected.name != found.name:
            raise RecipeError(
                f"this recipe is for a {expected.name!r}, and this is a {found.name!r}. Calibrate "
                "one for this model: skipcache calibrate."
            )
        difference = expected.fingerprint.difference(found.fingerprint)
        if difference is not None:
            warnings.warn(
                f"this recipe was made for another {expected.name!r}: {difference}. Calibrate one "
                "for these weights.",
                RecipeWarning,
                stacklevel=2,
            )
        if scheduler is None:
            return
        theirs = describe_scheduler(scheduler)
        ours = self.record.scheduler
        if theirs["prediction_type"] != ours["prediction_type"]:
            raise RecipeError(
                f"this recipe is for outputs of type {ours['prediction_type']!r}, and this "
                f"scheduler takes {theirs['prediction_type']!r}. Calibrate with this scheduler."
            )
        if theirs["name"] != ours["name"]:
            warnings.warn(
                f"this recipe was calibrated with {ours['name']}, and this is {theirs['name']}. "
                "It serves, but not as well as one calibrated with it.",
                RecipeWarning,
                stacklevel=2,
            )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes ``recipe.json`` and ``recipe.safetensors``.

        Args:
            folder: created if need be.

        Returns:
            The folder.

        Raises:
            RecipeFileError: it cannot be written.
        """
        from skipcache.recipes.files import write_recipe

        return write_recipe(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, local_files_only: bool = False
    ) -> Recipe:
        """Reads a recipe from a folder, or from a repository on the Hugging Face hub.

        Args:
            source: folder, or hub id such as ``"user/my-recipe"``.
            revision: of the repository.
            local_files_only: take the repository from the local hub cache only.

        Raises:
            RecipeFileError: no such folder or repository, a truncated or corrupt file, a newer
                format version, or values that cannot be.
        """
        from skipcache.recipes.files import read_recipe

        return read_recipe(source, revision=revision, local_files_only=local_files_only)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None) -> str:
        """Uploads what ``save_pretrained`` writes.

        Args:
            repo_id: hub id; the repository is created if need be.
            private: of a new repository.

        Returns:
            The address of the commit.

        Raises:
            RecipeFileError: the hub cannot be reached, or refuses.
        """
        from skipcache.recipes.files import push_recipe

        return push_recipe(self, repo_id, private)

    def _check(self, speedup: float) -> None:
        check_speedup(speedup)
        highest = self.highest_speedup
        if speedup > highest:
            error = self.predicted_error(highest)
            raise ConfigError(
                f"speedup={speedup:g} is out of reach. The highest for this model at {self.steps} "
                f"steps is {highest:.2f}, at a predicted error of {error:.1%} of the sample."
            )


def check_speedup(speedup: float) -> None:
    """Refuses what is no factor from 1.

    Raises:
        ConfigError: such.
    """
    is_number = isinstance(speedup, (int, float)) and not isinstance(speedup, bool)
    if not is_number or not math.isfinite(speedup) or speedup < 1:
        raise ConfigError(f"speedup is {speedup!r}. It is a factor from 1, such as 2.0.")


def planned(recipe: Recipe, speedup: float, times: Sequence[float] | None = None) -> PlannedRun:
    """What a run does at that speedup; by default one of the steps that were calibrated.

    Raises:
        ConfigError: a speedup that cannot be.
    """
    schedule = recipe.at(speedup).schedule
    assert isinstance(schedule, RecipeSchedule)
    return schedule.planned(recipe.statistics.times if times is None else times)


def spread_times(times: Sequence[float], steps: int) -> tuple[float, ...]:
    """So many times, spread as ``times`` are: the first stays, the last spans as much as its
    share.
    """
    import numpy as np

    edges = np.array([*times, 0.0])
    places = np.arange(steps) * (len(times) / steps)
    return tuple(float(time) for time in np.interp(places, np.arange(len(edges)), edges))


def describe_scheduler(scheduler: object) -> dict[str, str | None]:
    """Name of its class, and what it takes the model's output for."""
    config = getattr(scheduler, "config", None)
    kind = config.get("prediction_type") if isinstance(config, Mapping) else None
    return {"name": type(scheduler).__name__, "prediction_type": kind}


def recipe_from(source: object) -> Recipe:
    """What ``apply_skip_cache(recipe=...)`` was given, as a recipe.

    Raises:
        RecipeError: it is neither a recipe nor a folder or hub id.
        RecipeFileError: the files cannot be read.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, (str, Path)):
        return Recipe.from_pretrained(source)
    raise RecipeError(
        f"recipe is {source!r}. Pass what calibrate returned, its folder or a hub id."
    )


def recipe_beside(transformer: nn.Module) -> Recipe | None:
    """The recipe whose files lie beside the weights that the transformer was loaded from, if it was
    made for these very weights.

    Raises:
        RecipeFileError: the files are there, and cannot be read.
    """
    from skipcache.recipes.files import RECIPE_FILE

    folder = folder_of(transformer)
    if folder is None or not (folder / RECIPE_FILE).is_file():
        return None
    found = Recipe.from_pretrained(folder)
    return found if is_made_for(found.record.base_model, transformer) else None
