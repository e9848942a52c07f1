"""Pipeline in, the same pipeline out: apply, remove, context manager, stats."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from skipcache.backbone import Backbone
from skipcache.config import SkipCacheConfig
from skipcache.errors import (
    ConfigError,
    NoAdapterError,
    NotAppliedError,
    UnknownOptionError,
    did_you_mean,
)
from skipcache.plugins import resolve_backbone
from skipcache.schedules import Schedule
from skipcache.targets import is_module, transformers_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from skipcache.branches.fitted import FittedBranches
    from skipcache.estimators import Estimator
    from skipcache.recipes.recipe import Recipe
    from skipcache.runtime.conductor import Conductor
    from skipcache.runtime.controller import Controller
    from skipcache.runtime.stats import CacheStats

Target = TypeVar("Target")

_OPTIONS = tuple(field.name for field in dataclasses.fields(SkipCacheConfig))


def apply_skip_cache(
    target: Target,
    *,
    interval: int | None = None,
    window: tuple[float, float] | None = None,
    front_layers: int | None = None,
    back_layers: int | None = None,
    schedule: Schedule | None = None,
    estimator: str | Estimator | None = None,
    preset: str | None = None,
    branches: FittedBranches | str | Path | None = None,
    recipe: Recipe | str | Path | None = None,
    speedup: float | None = None,
    adaptive: str | None = None,
    adapter: str | Backbone | object | None = None,
    config: SkipCacheConfig | None = None,
    **unknown: object,
) -> Target:
    """Makes a pipeline, or a bare transformer, reuse deep features between neighbouring denoising
    steps.

    All or nothing: if anything is wrong, the target is left exactly as it was. Applying again
    replaces the configuration. ``target`` may be compiled or offloaded, before or after.

    Args:
        target: a diffusers pipeline (both transformers of one that has two), or a transformer.
        interval: refresh every so many steps; default 2.
        window: (start, stop) in normalised time, 1 = noise: outside it every step refreshes;
            default (0.98, 0.02).
        front_layers: layers at the front that always run; default 1.
        back_layers: layers at the back that always run, at least 0; default 1. With 0 it is the
            transformer's output that is kept and estimated, by ``"taylor"`` unless said otherwise.
        schedule: when to refresh, instead of ``interval`` and ``window``.
        estimator: what a reuse step takes for the deep feature; see ``SkipCacheConfig``.
        preset: name of settings for what is not given otherwise, such as ``"skip-dit/latte-t2v"``;
            default: see ``SkipCacheConfig``.
        branches: fitted branches as the estimator: what ``fit_skip_branches`` returned, its folder
            or a hub id. Front and back layers are then those that it was fitted for. Default: the
            fit whose files lie in the folder that the transformer was loaded from, if it was made
            for these weights and layers, and the model has no skip branches of its own.
        recipe: what ``calibrate`` returned, its folder or a hub id: it says where, when and what.
            Default, where ``speedup`` is given: the recipe whose files lie in the folder that the
            transformer was loaded from, if it was made for these weights.
        speedup: how much faster the denoising is to be, wall-clock; default with a recipe: 2.
            Where there is no recipe, up to 4, as steps over refreshes: the transformer's output is
            extrapolated between them, and early steps get more; ``cache_stats`` says what was done.
        adaptive: with a recipe, ``"batch"`` adds refreshes to runs whose estimates miss by more
            than those of its calibration did; ``"sample"`` where those of one sample of the batch
            do. Such runs are slower than asked for; see ``Recipe.at``.
        adapter: the name of an adapter, a ``Backbone``, or a plugin; default: the adapter that
            claims the model. ``"auto"``: where none does, the first forward is traced, a
            ``Backbone`` guessed and checked on the spot, and used if every check passes; if not,
            that forward raises ``AdapterError`` and the cache is taken off.
        config: a ``SkipCacheConfig``; options given beside it take precedence over its fields.

    Returns:
        ``target`` itself.

    Raises:
        ConfigError: a value that cannot be, a preset that does not exist, a deep span without
            layers, branches together with an estimator or for another deep span, a recipe or a
            speedup together with another option, a speedup out of reach, or ``adaptive`` without a
            recipe.
        RecipeError: a recipe that cannot be read, or is for another class of model.
        BranchFileError: branches that cannot be read, or are for another class of model.
        UnknownOptionError: an option that does not exist.
        TargetError: the target has no transformer.
        AdapterError: no adapter claims the model (``NoAdapterError``), or the adapter is wrong
            about it.
    """
    _refuse_unknown(unknown)
    if recipe is not None or speedup is not None or adaptive is not None:
        given = (interval, window, front_layers, back_layers, schedule, estimator, preset, branches)
        if any(value is not None for value in (*given, config)):
            raise ConfigError(
                "a recipe or a speedup says where, when and what to reuse. Pass no other option "
                "than adapter and adaptive beside it."
            )
        config = _from_recipe(target, recipe, speedup, adaptive)
    if branches is not None:
        estimator, front_layers, back_layers = _fitted(
            branches, estimator, front_layers, back_layers
        )
    config = _merge(
        config,
        interval=interval,
        window=window,
        front_layers=front_layers,
        back_layers=back_layers,
        schedule=schedule,
        estimator=estimator,
        preset=preset,
    )
    transformers = transformers_of(target)
    built = [
        (transformer, build_controller(transformer, config, adapter))
        for transformer in transformers.values()
    ]
    _install(target, built)
    return target


def remove_skip_cache(target: object) -> bool:
    """Takes the cache off again: the same objects with the same attributes, and bit-identical
    output.

    Args:
        target: what ``apply_skip_cache`` was given, or its transformer. One that was never applied
            is left alone.

    Returns:
        Whether there was a cache to remove.
    """
    from skipcache.runtime.controller import controller_of

    removed = False
    for transformer in transformers_of(target).values():
        controller = controller_of(transformer)
        if controller is not None:
            if not is_module(target):
                controller.clock.attach(target)  # so that its scheduler is left clean too
            replace_conductor(transformer, None)
            conduct_branches(transformer, controller.bound.backbone)
            removed = True
    return removed


@contextmanager
def skip_cache(target: Target, **options: Any) -> Iterator[Target]:
    """``apply_skip_cache`` for the length of a ``with`` block; what was applied before is put back
    after it.

    Args:
        target: as for ``apply_skip_cache``.
        **options: those of ``apply_skip_cache``.

    Yields:
        ``target``.

    Raises:
        SkipCacheError: as ``apply_skip_cache``.
    """
    from skipcache.runtime.controller import controller_of

    before = {id(t): controller_of(t) for t in transformers_of(target).values()}
    apply_skip_cache(target, **options)
    try:
        yield target
    finally:
        remove_skip_cache(target)
        transformers = transformers_of(target).values()
        _install(target, [(t, c) for t in transformers if (c := before.get(id(t))) is not None])


def is_skip_cached(target: object) -> bool:
    """Whether a cache is applied to the target (to both, of a pipeline with two transformers).

    Args:
        target: a pipeline or a transformer.
    """
    from skipcache.runtime.controller import controller_of

    return all(controller_of(t) is not None for t in transformers_of(target).values())


def cache_stats(target: object) -> CacheStats:
    """What the last run did.

    Args:
        target: a pipeline or transformer with a cache applied.

    Returns:
        ``.refreshed`` and ``.reused`` steps, ``.layers_run`` of ``.layers_total``,
        ``.compute_fraction``, ``.cache_bytes`` (the peak), ``.plan`` like ``"FrrFrr"``; per stream
        in ``.streams``. Empty before a run, but for ``.preset``.

    Raises:
        NotAppliedError: no cache is applied.
    """
    from skipcache.runtime.stats import merge_stats

    return merge_stats({name: c.stats() for name, _, c in _applied(target)})


@contextmanager
def skip_cache_run(
    target: Target,
    streams: int = 1,
    timesteps: Sequence[float] | torch.Tensor | None = None,
) -> Iterator[Target]:
    """One run of a sampler that is no pipeline: each call of the transformer inside is a step.

    Args:
        target: a transformer with a cache applied (or a pipeline whose transformer you call
            yourself).
        streams: calls a step, for samplers that call once for each guidance pass.
        timesteps: those of the run, as the transformer will be given them, one a step. With them
            the run is planned ahead and no call waits for the device; without, a schedule with a
            window reads each call's own.

    Raises:
        NotAppliedError: no cache is applied.
        ConfigError: ``streams`` below 1, or timesteps that are not finite.
    """
    from skipcache.runtime.clock import ExplicitRun

    if not isinstance(streams, int) or isinstance(streams, bool) or streams < 1:
        raise ConfigError(f"streams is {streams!r}. It is the number of calls a step, at least 1.")
    controllers = [controller for _, _, controller in _applied(target)]
    runs = [ExplicitRun(streams, _times(controller, timesteps)) for controller in controllers]
    for controller, run in zip(controllers, runs, strict=True):
        controller.clock.explicit.append(run)
    try:
        yield target
    finally:
        for controller, run in zip(controllers, runs, strict=True):
            run.drop()
            if run in controller.clock.explicit:
                controller.clock.explicit.remove(run)


def _times(
    controller: Controller, timesteps: Sequence[float] | torch.Tensor | None
) -> list[float] | None:
    import math

    if timesteps is None:
        return None
    from skipcache.runtime.taps import normalised_times

    values = [float(value) for value in timesteps]
    if not values or not all(math.isfinite(value) for value in values):
        raise ConfigError(f"timesteps {timesteps!r}: at least one, and all finite, are needed.")
    scale = controller.bound.backbone.timestep
    if scale is None:  # then, as a scheduler's, they tell their scale by how they run
        return normalised_times(values, 1000)
    return [scale.normalise(value) for value in values]


def _fitted(
    branches: FittedBranches | str | Path,
    estimator: str | Estimator | None,
    front_layers: int | None,
    back_layers: int | None,
) -> tuple[FittedBranches, int, int]:
    from skipcache.branches.fitted import fit_from

    if estimator is not None:
        raise ConfigError("branches and estimator both say what to reuse. Pass one of them.")
    fit = fit_from(branches)
    return (
        fit,
        fit.front_layers if front_layers is None else front_layers,
        fit.back_layers if back_layers is None else back_layers,
    )


def _from_recipe(
    target: object,
    recipe: Recipe | str | Path | None,
    speedup: float | None,
    adaptive: str | None,
) -> SkipCacheConfig:
    from skipcache.recipes.generic import generic_config
    from skipcache.recipes.recipe import DEFAULT_SPEEDUP, recipe_beside, recipe_from

    wanted = DEFAULT_SPEEDUP if speedup is None else speedup
    transformer = next(iter(transformers_of(target).values()))
    found = recipe_beside(transformer) if recipe is None else recipe_from(recipe)
    if found is None:
        if adaptive is not None:
            raise ConfigError(
                "adaptive compares a run with the calibration of a recipe, and there is none for "
                "this model. Pass recipe, or calibrate one: skipcache calibrate."
            )
        return generic_config(wanted)
    found.check_for(transformer, getattr(target, "scheduler", None))
    return found.at(wanted, adaptive=adaptive)


def _refuse_unknown(unknown: dict[str, object]) -> None:
    options = [*_OPTIONS, "branches", "recipe", "speedup", "adaptive", "adapter", "config"]
    for name in unknown:
        raise UnknownOptionError(
            f"apply_skip_cache has no option {name!r}. {did_you_mean(name, options)}"
        )


def _merge(config: SkipCacheConfig | None, **options: Any) -> SkipCacheConfig:
    given = {name: value for name, value in options.items() if value is not None}
    if config is None:
        return SkipCacheConfig(**given)
    if not isinstance(config, SkipCacheConfig):
        raise ConfigError(f"config is {config!r}. Pass a skipcache.SkipCacheConfig.")
    if "schedule" in given:
        config = dataclasses.replace(config, interval=None, window=None)
    elif given.keys() & {"interval", "window"}:
        config = dataclasses.replace(config, schedule=None)
    return dataclasses.replace(config, **given)


def build_controller(
    transformer: nn.Module, config: SkipCacheConfig, adapter: str | Backbone | object | None
) -> Controller:
    """Everything that ``apply_skip_cache`` installs on one transformer, which is not touched.

    Raises:
        SkipCacheError: as ``apply_skip_cache``.
    """
    if adapter == "auto":
        try:
            adapter = resolve_backbone(transformer, None)
        except NoAdapterError:
            from skipcache.runtime.conductor import conductor_of
            from skipcache.testing.auto import GuessingController

            conductor = conductor_of(transformer)
            if conductor is None or conductor.bound.branches is None:
                return GuessingController(transformer, config)
            adapter = conductor.bound.backbone  # known since it was given skip branches
    from skipcache.branches.fitted import FittedBranches, fit_beside
    from skipcache.runtime.controller import Controller
    from skipcache.runtime.layout import bind

    bound = bind(resolve_backbone(transformer, adapter), transformer)
    own_preset = bound.backbone.preset if bound.has_working_branches else None
    used = config.resolve_preset(own_preset, bound.depth)
    front_layers, back_layers = used.resolve_layers(bound.depth)
    estimator = used.resolve_estimator(has_branches=bound.has_working_branches)
    if isinstance(estimator, FittedBranches):
        estimator.check_for(transformer, front_layers, back_layers)
    if used.estimator is None and not bound.has_working_branches:
        own = fit_beside(transformer)  # checked against the model already
        if own is not None and (own.front_layers, own.back_layers) == (front_layers, back_layers):
            estimator = own
    schedule = used.resolve_schedule()
    controller = Controller(transformer, bound, front_layers, back_layers, schedule, estimator)
    controller.config = config
    controller.preset = used.preset or getattr(schedule, "preset", None)
    return controller


def _install(target: object, built: Sequence[tuple[nn.Module, Controller]]) -> None:
    """Replaces what is applied by what was built. Only attaching can fail, and comes first."""
    from skipcache.runtime.controller import controller_of

    earlier = [controller_of(transformer) for transformer, _ in built]
    try:
        for (_, controller), before in zip(built, earlier, strict=True):
            links = before.clock.links if before is not None else []
            for pipeline in [link.pipeline for link in links if link.pipeline is not None]:
                controller.clock.attach(pipeline)
            if not is_module(target):
                controller.clock.attach(target)
    except BaseException:
        for _, controller in built:
            controller.clock.release()
        raise
    for transformer, controller in built:
        replace_conductor(transformer, controller)


def replace_conductor(transformer: nn.Module, conductor: Conductor | None) -> None:
    """Takes off what is installed on the transformer, and installs this. Cannot fail."""
    from skipcache.runtime.conductor import conductor_of

    before = conductor_of(transformer)
    if before is not None:
        before.uninstall(transformer)
    if conductor is not None:
        conductor.install(transformer)


def conduct_branches(transformer: nn.Module, backbone: Backbone) -> None:
    """Adapts what is installed to the skip branches that the transformer carries now.

    Raises:
        SkipCacheError: the branches, or an applied cache together with them, cannot be. Nothing was
            changed then.
    """
    from skipcache.branches.module import attached_branches
    from skipcache.runtime.conductor import Conductor
    from skipcache.runtime.controller import controller_of
    from skipcache.runtime.layout import bind

    controller = controller_of(transformer)
    if controller is not None:
        _install(
            transformer, [(transformer, build_controller(transformer, controller.config, backbone))]
        )
    elif attached_branches(transformer) is None:
        replace_conductor(transformer, None)
    else:
        replace_conductor(transformer, Conductor(bind(backbone, transformer)))


def _applied(target: object) -> list[tuple[str, nn.Module, Controller]]:
    from skipcache.runtime.controller import controller_of

    found = []
    for name, transformer in transformers_of(target).items():
        controller = controller_of(transformer)
        if controller is None:
            raise NotAppliedError(
                f"no cache is applied to {type(transformer).__qualname__!r}. Call apply_skip_cache "
                "on it first."
            )
        found.append((name, transformer, controller))
    return found
