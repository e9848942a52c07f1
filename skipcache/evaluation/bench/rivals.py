"""Other caching libraries, and settings of ours after other papers, for the benchmark.

Each is used as its documentation says. Where a model needs more than that, ``diffusers_rivals``
says what is done, and ``Method.options`` repeats it in the results.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from skipcache.errors import SkipCacheError
from skipcache.evaluation.bench.diffusers_rivals import (
    MagRatios,
    Sampler,
    faster_cache,
    first_block_cache,
    mag_cache,
    pyramid_attention_broadcast,
    taylor_seer,
)
from skipcache.evaluation.bench.methods import Method, Unavailable, skip_cache_method
from skipcache.evaluation.bench.surgery import quiet, restored, transformer_of

_NO_CACHE_DIT = (
    "cache-dit is not installed. Install it: pip install cache-dit, or skipcache with its extra "
    "'bench'."
)


def rivals(quick: bool = False, sample: Sampler | None = None) -> list[Method]:
    """Every rival, each at settings from fast to slow.

    Args:
        quick: one middle setting of each.
        sample: samples once as the benchmark does, given the pipeline and the number of steps;
            MagCache is calibrated by it. By default a call with a prompt or class label of its own.
    """
    methods = [*cache_dit_methods(quick), *diffusers_methods(quick, sample)]
    return [*methods, *paper_methods(quick)]


def cache_dit_methods(quick: bool = False) -> list[Method]:
    """cache-dit's DBCache, without and with its TaylorSeer calibrator.

    ``F8B0`` with threshold 0.08 and 8 warm-up steps is its default. The first two settings are
    those that SGLang and vLLM-Omni use it with.
    """
    if quick:
        return [db_cache(1, 0.12), db_cache(1, 0.12, has_taylor_seer=True)]
    methods = [
        db_cache(1, 0.24, warmup_steps=4, most_in_a_row=3, has_taylor_seer=has)
        for has in (False, True)
    ]
    for front_blocks in (1, 8):
        for threshold in (0.24, 0.12, 0.08):
            for has in (False, True):
                methods.append(db_cache(front_blocks, threshold, has_taylor_seer=has))
    return methods


def diffusers_methods(quick: bool = False, sample: Sampler | None = None) -> list[Method]:
    """The caches of diffusers.

    Args:
        quick: as in ``rivals``.
        sample: as in ``rivals``.
    """
    ratios = MagRatios(_sample_once if sample is None else sample)
    if quick:
        return [
            first_block_cache(0.1),
            mag_cache(ratios, 0.06, 3),
            taylor_seer(3, "output"),
            pyramid_attention_broadcast(2, 4, 6),
            faster_cache(5),
        ]
    return [
        *(first_block_cache(threshold) for threshold in (0.2, 0.1, 0.05)),
        mag_cache(ratios, 0.24, 5, first=0.1),
        mag_cache(ratios, 0.12, 4),
        mag_cache(ratios, 0.06, 3),
        *(taylor_seer(interval, "output") for interval in (4, 3, 2)),
        *(taylor_seer(interval, "sublayers") for interval in (5, 3, 2)),
        taylor_seer(5, "attention", first_steps=10),
        pyramid_attention_broadcast(4, 6, 8, timesteps=(50, 950)),
        pyramid_attention_broadcast(2, 4, 6),
        faster_cache(8, 3, timesteps=(-1, 951)),
        faster_cache(5),
    ]


def paper_methods(quick: bool = False) -> list[Method]:
    """Settings of ours after the idea of other papers.

    FORA (arXiv:2407.01425) holds what each layer adds, on an interval: ``residual`` over the whole
    stack. DeepCache (arXiv:2312.00858) holds the deep feature between shallow layers that run.
    """
    always = [1.0, 0.0]
    methods: list[Method] = []
    for interval in (3,) if quick else (4, 3, 2):
        options: dict[str, Any] = {"interval": interval, "window": always}
        setting = f"interval {interval}"
        fora: dict[str, Any] = {"front_layers": 0, "back_layers": 1, "estimator": "residual"}
        deep: dict[str, Any] = {"front_layers": 2, "back_layers": 2, "estimator": "hold"}
        methods += [
            _if_possible(skip_cache_method(setting, "FORA-style", **options, **fora)),
            _if_possible(skip_cache_method(setting, "DeepCache-style", **options, **deep)),
        ]
    return methods


def _if_possible(method: Method) -> Method:
    """A model too shallow, or with skips of its own from the first layer, makes it unavailable."""

    @contextmanager
    def applied(pipeline: Any, steps: int) -> Iterator[Any]:
        with ExitStack() as stack:
            try:
                entered = stack.enter_context(method.applied(pipeline, steps))
            except SkipCacheError as error:
                raise Unavailable(str(error)) from error
            yield entered

    return dataclasses.replace(method, applied=applied)


def db_cache(
    front_blocks: int,
    threshold: float,
    *,
    warmup_steps: int = 8,
    most_in_a_row: int | None = None,
    has_taylor_seer: bool = False,
) -> Method:
    """cache-dit's DBCache.

    Args:
        front_blocks: its ``Fn_compute_blocks``; ``Bn_compute_blocks`` is 0, as it recommends.
        threshold: its ``residual_diff_threshold``.
        warmup_steps: its ``max_warmup_steps``, 8 by default.
        most_in_a_row: its ``max_continuous_cached_steps``; by default it has no limit.
        has_taylor_seer: with its TaylorSeer calibrator of order 1.
    """
    config = {
        "Fn_compute_blocks": front_blocks,
        "Bn_compute_blocks": 0,
        "residual_diff_threshold": threshold,
        "max_warmup_steps": warmup_steps,
        "max_continuous_cached_steps": -1 if most_in_a_row is None else most_in_a_row,
    }
    calibrator = {"taylorseer_order": 1} if has_taylor_seer else None

    def applied(pipeline: Any, steps: int) -> Any:
        return _cache_dit(pipeline, config, calibrator)

    setting = f"F{front_blocks}B0, threshold {threshold:g}, {warmup_steps} warm-up steps"
    if most_in_a_row is not None:
        setting += f", at most {most_in_a_row} in a row"
    options = {"cache_config": config, "calibrator_config": calibrator}
    name = "DBCache + TaylorSeer" if has_taylor_seer else "DBCache"
    return Method("cache-dit", name, setting, options, applied, spoils_pipeline=True)


@contextmanager
def _cache_dit(
    pipeline: Any, config: dict[str, Any], calibrator: dict[str, Any] | None
) -> Iterator[None]:
    """``enable_cache`` on entering, ``disable_cache`` on leaving.

    Raises:
        Unavailable: cache-dit is missing, refuses the pipeline, or would compute every block.
    """
    cache_dit = _imported_cache_dit()
    transformer = transformer_of(pipeline)
    with restored(pipeline), quiet("cache_dit"):
        try:
            cache_dit.enable_cache(
                pipeline,
                cache_config=cache_dit.DBCacheConfig(**config),
                calibrator_config=(
                    cache_dit.TaylorSeerCalibratorConfig(**calibrator) if calibrator else None
                ),
            )
        except Exception as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from error
        try:
            _check_depth(transformer, config["Fn_compute_blocks"])
            yield
        finally:
            cache_dit.disable_cache(pipeline)


def _imported_cache_dit() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what its own imports warn of
            return importlib.import_module("cache_dit")
    except Exception as error:
        if isinstance(error, ImportError) and error.name == "cache_dit":
            raise Unavailable(_NO_CACHE_DIT) from None
        raise Unavailable(f"cache-dit cannot be imported: {error}") from error


def _check_depth(transformer: nn.Module, front_blocks: int) -> None:
    lists = [child for child in transformer.children() if isinstance(child, nn.ModuleList)]
    depth = max((len(blocks) for blocks in lists), default=0)
    if lists and depth <= front_blocks:
        raise Unavailable(
            f"F{front_blocks} computes the first {front_blocks} blocks of each list, and "
            f"{type(transformer).__name__} has no more than {depth}: nothing is left to cache."
        )


def _sample_once(pipeline: Any, steps: int) -> None:
    accepted = inspect.signature(type(pipeline).__call__).parameters
    asked = {"class_labels": [0], "prompt": "a picture"}
    call = next(({name: asked[name]} for name in asked if name in accepted), {})
    pipeline(**call, num_inference_steps=steps)
