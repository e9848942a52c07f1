"""Which methods are compared when nothing else is said."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from skipcache.evaluation.bench.methods import Method, fewer_steps_method, skip_cache_method
from skipcache.evaluation.bench.subjects import Subject

SPEEDUPS = (1.5, 2.0, 3.0)


def own_methods(quick: bool = False) -> list[Method]:
    """Our settings: recipes by the speedup asked for, the default estimator, the output alone, the
    training-free default and the paper's.
    """
    recipes = [skip_cache_method(f"{x:g}x asked for", "speedup", speedup=x) for x in SPEEDUPS]
    output = {"front_layers": 0, "back_layers": 0}
    if quick:
        found = [skip_cache_method(f"interval {n}", interval=n) for n in (2, 3)]
        found.append(skip_cache_method("interval 3", "output", interval=3, **output))
        return [recipes[1], *found]
    found = [*recipes]
    found += [skip_cache_method(f"interval {n}", interval=n) for n in (2, 3, 4, 5, 6)]
    found += [
        skip_cache_method(f"interval {n}", "output", interval=n, **output) for n in (2, 3, 4, 5)
    ]
    for estimator in ("taylor(2)", "hold"):
        found += [
            skip_cache_method(f"interval {n}", estimator, interval=n, estimator=estimator)
            for n in (2, 3, 4)
        ]
    return found


def fewer_steps(steps: int, quick: bool = False) -> list[Method]:
    """The uncached pipeline with so many fewer steps."""
    return [
        fewer_steps_method(max(1, round(steps / speedup)))
        for speedup in (SPEEDUPS[1:2] if quick else SPEEDUPS)
    ]


def all_methods(
    subject: Subject, *, quick: bool = False, with_rivals: bool = True, seed: int = 0
) -> list[Method]:
    """Ours, fewer steps, and the rivals."""
    found = [*own_methods(quick), *fewer_steps(subject.steps, quick)]
    if with_rivals:
        from skipcache.evaluation.bench.rivals import rivals

        def sample(pipeline: Any, steps: int) -> None:
            call = subject.call_of(range(subject.batch_size), seed)
            pipeline(**{**call, "num_inference_steps": steps})

        found += rivals(quick, sample)
    return found


def missing_packages(names: Sequence[str] = ("cache_dit",)) -> list[str]:
    """Packages of rivals that are not installed, by their names on the index."""
    return [n.replace("_", "-") for n in names if importlib.util.find_spec(n) is None]
