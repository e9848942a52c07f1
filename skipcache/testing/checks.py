"""The checks. Each takes an ``AdapterCase`` and returns, or raises ``CheckFailure`` with what is
wrong; ``CheckSkipped`` where it does not apply.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from skipcache import api
from skipcache.backbone import BlockList, Zipped
from skipcache.branches.module import SkipBranches
from skipcache.branches.retrofit import add_skip_branches
from skipcache.errors import BranchError, ConfigError, NotCachingWarning
from skipcache.schedules import MaskSchedule
from skipcache.testing.case import (
    AdapterCase,
    CheckFailure,
    CheckSkipped,
    largest_difference,
    require_equal,
)
from skipcache.testing.trace import BlockCall, is_tensor, lists_in, recorded

COVERED_SHARE = 0.1  # of the parameters in blocks: a list above it must be named somewhere


def check_output_is_telling(case: AdapterCase) -> None:
    """The transformer gives the same output twice, another one for other inputs, and another one
    when the deep span is left out: without that the other checks say nothing.
    """
    transformer = case.build()
    inputs, others = case.at_noise(0), case.at_noise(1)
    expected = case.run(transformer, inputs)
    if not expected or not all(torch.isfinite(t).all() for t in expected):
        raise CheckFailure("the output has no tensors, or holds infinities or NaNs.")
    require_equal(case.run(transformer, inputs), expected, "the same input twice differs")
    if largest_difference(case.run(transformer, others), expected) == 0:
        raise CheckFailure(
            "another seed of make_inputs gives the same output. Draw the inputs from the seed, and "
            "give the transformer weights that let them through (gates often start at zero)."
        )
    schedule = MaskSchedule((0,), steps=2)
    with case.cached(transformer, schedule=schedule), case.run_of(transformer, 2):
        case.run(transformer, others)
        reused = case.run(transformer, inputs)
    if largest_difference(reused, expected) == 0:
        raise CheckFailure(
            "a deep feature of other inputs leaves the output as it is: the deep span does not "
            "matter to it. Give the transformer weights that let every layer through (gates often "
            "start at zero)."
        )


def check_never_reusing_is_bit_identical(case: AdapterCase) -> None:
    """Applied, but refreshing at every step, the cache changes no bit."""
    transformer = case.build()
    expected = [case.run(transformer, case.at_noise(seed)) for seed in range(2)]
    for estimator in ("hold", "taylor(2)"):
        cached = case.cached(transformer, interval=1, window=(1.0, 0.0), estimator=estimator)
        with cached, case.run_of(transformer, 2):
            for seed in range(2):
                found = case.run(transformer, case.at_noise(seed))
                require_equal(found, expected[seed], f"{estimator}, never reusing, differs")


def check_same_input_reuse_is_exact(case: AdapterCase) -> None:
    """The same input at a refresh step and at a reuse step with ``hold`` gives the same output,
    wherever the deep span ends or begins: nothing behind it needs what was left out.
    """
    transformer = case.build()
    inputs = case.at_noise(0)
    expected = case.run(transformer, inputs)
    for front, back in case.spans:
        where = f"front_layers={front}, back_layers={back}"
        cached = case.cached(transformer, (front, back), schedule=MaskSchedule((0,), steps=2))
        with cached, case.run_of(transformer, 2), _telling_why_not():
            require_equal(case.run(transformer, inputs), expected, f"{where}: refresh differs")
            found = case.run(transformer, inputs)
            if api.cache_stats(transformer).plan != "Fr":
                raise CheckFailure(
                    f"{where}: the second of two equal calls was no reuse (plan "
                    f"{api.cache_stats(transformer).plan!r}). Something that flows has another "
                    "shape where it was captured."
                )
        require_equal(
            found,
            expected,
            f"{where}: a reuse of the same input differs. Something that the layers from "
            f"{case.depth - back} on need is not among the tensors that flow",
        )


def check_layers_run(case: AdapterCase) -> None:
    """At a reuse step exactly the blocks of the front and the back run, once each; at a refresh
    step all of them.
    """
    transformer = case.build()
    bound = case.bind(transformer)
    lists = {entry.spec.path: entry.module for entry in bound.lists}
    layer_of = {
        (entry.spec.path, i): entry.first_layer + i // entry.spec.blocks_per_layer
        for entry in bound.lists
        for i in range(len(entry.module))
    }
    with recorded(lists, kept=0) as calls:
        case.run(transformer, case.at_noise(0))
    uncached = Counter((call.path, call.index) for call in calls)
    wrong = sorted(str(seat) for seat in layer_of if uncached[seat] != 1)
    if wrong:
        raise CheckFailure(
            f"an uncached forward runs these blocks not once but never or several times: {wrong}."
        )
    for front, back in case.spans[:2] + case.spans[-1:]:
        kept = {s: n for s, n in layer_of.items() if n < front or n >= case.depth - back}
        cached = case.cached(transformer, (front, back), schedule=MaskSchedule((0, 3), steps=4))
        with cached, case.run_of(transformer, 4), _telling_why_not():
            for step, due in enumerate([layer_of, kept, kept, layer_of]):
                with recorded(lists, kept=0) as calls:
                    case.run(transformer, case.at_noise(step))
                ran = Counter((call.path, call.index) for call in calls)
                if ran != Counter(due.keys()):
                    raise CheckFailure(
                        f"front_layers={front}, back_layers={back}, step {step} of 'FrrF' ran "
                        f"{_told(ran)}; due were {_told(Counter(due.keys()))}."
                    )
            stats = api.cache_stats(transformer)
            if stats.layers_run != 2 * case.depth + 2 * (front + back):
                raise CheckFailure(f"cache_stats counts {stats.layers_run} layers for {stats.plan}")


def check_interleaved_are_left_out(case: AdapterCase) -> None:
    """At a reuse step the interleaved modules between layers that are left out do not run."""
    if not case.backbone.interleaved:
        raise CheckSkipped("the backbone names no interleaved lists.")
    transformer = case.build()
    entries = case.bind(transformer).interleaved
    ran = []
    with (
        case.cached(transformer, schedule=MaskSchedule((0,), steps=2)),
        case.run_of(transformer, 2),
    ):
        for step in range(2):
            with recorded({e.spec.path: e.module for e in entries}, kept=0) as calls:
                case.run(transformer, case.at_noise(step))
            ran.append(len(calls))
    if not ran[1] < ran[0]:
        raise CheckFailure(f"{ran[0]} of them ran at a refresh step, {ran[1]} at a reuse step.")


def check_order_of_layers(case: AdapterCase) -> None:
    """The blocks run in the order in which the backbone counts them: list after list, zipped ones
    in turns.
    """
    transformer = case.build()
    lists = {entry.spec.path: entry.module for entry in case.bind(transformer).lists}
    with recorded(lists, kept=0) as calls:
        case.run(transformer, case.at_noise(0))
    due: list[tuple[str, int]] = []
    for entry in case.backbone.lists:
        paths = [s.path for s in entry.lists] if isinstance(entry, Zipped) else [entry.path]
        due += [(path, i) for i in range(len(lists[paths[0]])) for path in paths]
    ran = [(call.path, call.index) for call in calls]
    if ran != due:
        raise CheckFailure(f"blocks run in the order {_listed(ran)}; declared is {_listed(due)}.")


def check_flow_is_named(case: AdapterCase) -> None:
    """What a block returns is what the next one takes under that name, as far as it is handed on
    untouched or can be told by its shape.
    """
    transformer = case.build()
    lists = case.bind(transformer).lists
    modules = {entry.spec.path: entry.module for entry in lists}
    with recorded(modules, kept=4 if case.in_place else None) as calls:
        case.run(transformer, case.at_noise(0))
    specs = {entry.spec.path: entry.spec for entry in lists}
    last = (lists[-1].spec.path, len(lists[-1].module) - 1)
    for call in calls:
        _check_returned(call, specs[call.path], is_last=(call.path, call.index) == last)
    for call, following in pairwise(calls):
        spec = specs[call.path]
        has_both = call.has_tensors and following.has_tensors
        if call.path != following.path or following.index in spec.breaks or not has_both:
            continue
        for position, value in enumerate(call.returned):
            heirs = [name for name, taken in following.inputs.items() if taken is value]
            if is_tensor(value) and heirs and spec.returned[position] not in heirs:
                raise CheckFailure(
                    f"{call.path}.{call.index} returns at {position} what the next block takes as "
                    f"{heirs[0]!r}; declared is {spec.returned[position]!r}."
                )


def _check_returned(call: BlockCall, spec: BlockList, is_last: bool) -> None:
    """One block's output against the backbone's word. The last block of all may leave out what
    nobody takes from it.
    """
    where, declared = f"{call.path}.{call.index}", f"declared is returns={spec.returns!r}."
    if isinstance(call.output, tuple) == isinstance(spec.returns, str):
        kind = "a tuple" if isinstance(call.output, tuple) else "a bare tensor"
        raise CheckFailure(f"{where} returns {kind}; {declared}")
    if len(call.returned) != len(spec.returned):
        raise CheckFailure(f"{where} returns {len(call.returned)} values; {declared}")
    for position, (name, value) in enumerate(zip(spec.returned, call.returned, strict=True)):
        given = call.inputs.get(name) if name is not None else None
        if value is None and (given is None or is_last):
            continue
        if name is None or value is None:
            what = "None" if value is None else "a value"
            raise CheckFailure(f"{where} returns {what} at {position}; {declared}")
        if given is not None and given.shape != value.shape:
            raise CheckFailure(
                f"{where} takes {name!r} as {tuple(given.shape)} and returns "
                f"{tuple(value.shape)} in its place: another tensor, or returns is in the wrong "
                "order."
            )


def check_no_list_is_missing(case: AdapterCase) -> None:
    """Every list of blocks that a forward walks is among the backbone's, or small, or named in
    ``always_run``.
    """
    transformer = case.build()
    named = {entry.spec.path for entry in case.bind(transformer).lists}
    every = lists_in(transformer, named)
    with recorded(every, kept=0) as calls:
        case.run(transformer, case.at_noise(0))
    walked = {call.path for call in calls if len(every[call.path]) > 1 or call.path in named}
    sizes = {path: sum(p.numel() for p in every[path].parameters()) for path in walked}
    total = sum(sizes.values())
    missing = [
        path
        for path, size in sizes.items()
        if size > COVERED_SHARE * total
        and not any(path == n or path.startswith(f"{n}.") for n in named)
        and path not in case.backbone.always_run
        and path not in [spec.path for spec in case.backbone.interleaved]
    ]
    if missing:
        raise CheckFailure(
            f"the forward runs the blocks of {missing} too, and no list of the backbone covers "
            "them: every reuse step would still run them. Add them, or name them in always_run."
        )
    unknown = [path for path in case.backbone.always_run if path not in every]
    if unknown:
        raise CheckFailure(f"always_run names {unknown}, and there is no such nn.ModuleList.")


def check_time_is_read(case: AdapterCase) -> None:
    """Called bare, without a word of what step it is, a schedule with a window finds the time in
    the forward's own argument.
    """
    scale = case.backbone.timestep
    if scale is None:
        raise CheckSkipped("the transformer is not told the time.")
    transformer = case.build()
    inputs = case.make_inputs(0)
    if scale.argument not in inputs:
        raise CheckFailure(f"make_inputs gives no {scale.argument!r}, which Timestep names.")
    given = torch.as_tensor(inputs[scale.argument]).float()
    times = [scale.normalise(float(value)) for value in given.flatten()]
    if not 0.1 <= max(times) <= 0.9:
        raise CheckFailure(
            f"{scale.argument}={given.flatten().tolist()} of make_inputs is not in the middle "
            f"between clean={scale.clean} and noise={scale.noise}: the adapter has another scale, "
            "or the inputs are not what the model is given half-way."
        )
    with case.cached(transformer, interval=10, window=(0.75, 0.0)):
        for time in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
            case.run(transformer, case.at_time(inputs, time))
        plan = api.cache_stats(transformer).plan
    if plan != "FFFrrr":
        raise CheckFailure(
            f"with a window that opens at 0.75 the plan at times 1.0 to 0.5 is {plan!r}: the time "
            f"is not read from {scale.argument!r} on the scale noise={scale.noise}, "
            f"clean={scale.clean}."
        )


def check_estimators_run(case: AdapterCase) -> None:
    """Every estimator gives finite output, or says beforehand that it cannot be used here."""
    transformer = case.build()
    for estimator in ("hold", "residual", "taylor", "taylor(2)"):
        try:
            cached = case.cached(transformer, interval=2, window=(1.0, 0.0), estimator=estimator)
            with cached, case.run_of(transformer, 6):
                for step in range(6):
                    found = case.run(transformer, case.at_noise(step))
                    if not all(torch.isfinite(t).all() for t in found):
                        raise CheckFailure(f"{estimator}: not finite at step {step}.")
        except ConfigError:
            if estimator != "residual":
                raise


def check_streams_do_not_mix(case: AdapterCase) -> None:
    """Two guidance passes of one run give what each gives in a run of its own."""
    transformer = case.build()
    schedule = MaskSchedule((0, 2), steps=4)

    def outputs(seeds: tuple[int, ...]) -> list[list[torch.Tensor]]:
        cached = case.cached(transformer, schedule=schedule)
        with cached, case.run_of(transformer, 4, streams=len(seeds)):
            return [
                case.run(transformer, case.at_noise(10 * seed + step))
                for step in range(4)
                for seed in seeds
            ]

    together, apart = outputs((1, 2)), [outputs((1,)), outputs((2,))]
    for i, found in enumerate(together):
        expected = apart[i % 2][i // 2]
        require_equal(found, expected, f"pass {i % 2} at step {i // 2} is another than alone")


def check_second_run_equals_first(case: AdapterCase) -> None:
    """Nothing that is cached crosses into the next run, also after one that an error stopped."""
    transformer = case.build()

    def outputs(stop_at: int | None = None) -> list[list[torch.Tensor]]:
        found = []
        with case.run_of(transformer, 4):
            for step in range(4):
                if step == stop_at:
                    raise _Stop
                found.append(case.run(transformer, case.at_noise(step)))
        return found

    with case.cached(transformer, schedule=MaskSchedule((0, 2), steps=4)):
        first = outputs()
        with suppress(_Stop):
            outputs(stop_at=2)
        for step, (found, expected) in enumerate(zip(outputs(), first, strict=True)):
            require_equal(found, expected, f"step {step} of a second run differs from the first's")


def check_shape_change_refreshes(case: AdapterCase) -> None:
    """A batch or resolution that changes within a run is met by a refresh, not by a stale
    feature.
    """
    if case.make_other_inputs is None:
        raise CheckSkipped("make_other_inputs is not given.")
    transformer = case.build()
    inputs, others = case.at_noise(0), case.at_time(case.make_other_inputs(0), 0.5)
    expected = case.run(transformer, others)
    for estimator in ("hold", "taylor(2)"):
        schedule = MaskSchedule((0,), steps=4)
        cached = case.cached(transformer, schedule=schedule, estimator=estimator)
        with cached, case.run_of(transformer, 4):
            case.run(transformer, inputs)
            found = case.run(transformer, others)
            plan = api.cache_stats(transformer).plan
        require_equal(found, expected, f"{estimator}: a call of another shape differs")
        if plan != "FF":
            raise CheckFailure(f"plan {plan!r}: a call of another shape was served from the cache.")


def check_remove_restores(case: AdapterCase) -> None:
    """After removal: the same objects, classes, attributes and names, and not a bit of
    difference.
    """
    transformer = case.build()
    before, expected = _surroundings(transformer), case.run(transformer, case.at_noise(0))
    front, back = case.span
    options: dict[str, Any] = {"front_layers": front, "back_layers": back, "interval": 2}
    for _ in range(2):
        api.apply_skip_cache(transformer, adapter=case.backbone, **options)
        with case.run_of(transformer, 3):
            for step in range(3):
                case.run(transformer, case.at_noise(step))
    if not api.remove_skip_cache(transformer):
        raise CheckFailure("there was no cache to remove.")
    after = _surroundings(transformer)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    if changed:
        raise CheckFailure(f"removing left these as they were not: {changed[:5]}.")
    require_equal(case.run(transformer, case.at_noise(0)), expected, "after removal: differs")


def check_deepcopy_is_independent(case: AdapterCase) -> None:
    """Copies and pickles of a cached transformer run their own weights."""
    transformer = case.build()

    def outputs(model: nn.Module) -> list[list[torch.Tensor]]:
        with case.run_of(model, 2):
            return [case.run(model, case.at_noise(step)) for step in range(2)]

    with case.cached(transformer, schedule=MaskSchedule((0,), steps=2)):
        expected = outputs(transformer)
        copies = [copy.deepcopy(transformer)]
        try:
            copies.append(pickle.loads(pickle.dumps(transformer)))
        except (pickle.PicklingError, AttributeError, TypeError):
            _require_that_plain_does_not_pickle_either(case)
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.zero_()
        for model in copies:
            for step, found in enumerate(outputs(model)):
                require_equal(found, expected[step], "a copy gives another output")
            if api.cache_stats(model).plan != "Fr":
                raise CheckFailure(f"a copy's plan is {api.cache_stats(model).plan!r}, not 'Fr'.")


def check_zero_branch_is_exact(case: AdapterCase) -> None:
    """Skip branches that start at zero change no bit."""
    if case.backbone.native_skips:
        raise CheckSkipped("the model has skip branches of its own.")
    if case.backbone.hidden_size is None:
        raise CheckSkipped("the backbone does not say its hidden_size.")
    transformer = case.build()
    expected = case.run(transformer, case.at_noise(0))
    branches = SkipBranches(case.backbone.hidden_size, case.depth)
    try:
        add_skip_branches(transformer, branches, adapter=case.backbone)
    except BranchError as error:
        raise CheckSkipped(str(error)) from error
    require_equal(case.run(transformer, case.at_noise(0)), expected, "zero branches: differs")


def check_compiles_fullgraph(case: AdapterCase) -> None:
    """Blocks that compile on their own, one graph each, still do under the cache, and nothing is
    compiled anew in a second run.
    """
    from torch._dynamo.utils import counters

    transformer = case.build()
    bound = case.bind(transformer)
    inputs = case.at_noise(0)
    for entry in bound.lists:
        for block in entry.module._modules.values():
            assert block is not None
            block.compile(fullgraph=True, backend="eager")
    torch._dynamo.reset()
    try:
        expected = case.run(transformer, inputs)
    except Exception as error:
        raise CheckSkipped(f"does not compile uncached either: {type(error).__name__}") from error
    with case.cached(transformer, schedule=MaskSchedule((0,), steps=2)):
        graphs = []
        for _ in range(2):
            with case.run_of(transformer, 2):
                for _ in range(2):
                    found = case.run(transformer, inputs)
                    difference = largest_difference(found, expected)
                    if difference > 1e-5:
                        raise CheckFailure(f"compiled and cached: differs by {difference:.2g}.")
            graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    if graphs[1] > graphs[0]:
        raise CheckFailure(f"{graphs[1] - graphs[0]} graphs were compiled anew in a second run.")


# Those that leave the transformer as it was, also one that was not copied.
CHECKS_IN_PLACE = (
    check_output_is_telling,
    check_order_of_layers,
    check_flow_is_named,
    check_no_list_is_missing,
    check_never_reusing_is_bit_identical,
    check_same_input_reuse_is_exact,
    check_layers_run,
    check_streams_do_not_mix,
    check_second_run_equals_first,
)
CHECKS = (
    *CHECKS_IN_PLACE,
    check_interleaved_are_left_out,
    check_time_is_read,
    check_estimators_run,
    check_shape_change_refreshes,
    check_remove_restores,
    check_deepcopy_is_independent,
    check_zero_branch_is_exact,
    check_compiles_fullgraph,
)


class _Stop(Exception):
    """Ends a run half-way."""


@contextmanager
def _telling_why_not() -> Iterator[None]:
    """What would be a warning that nothing is cached is an error within the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotCachingWarning)
        yield


def _told(ran: Counter[tuple[str, int]]) -> str:
    return _listed(sorted(ran.elements())) or "nothing"


def _listed(seats: list[tuple[str, int]]) -> str:
    return " ".join(f"{path}.{index}" for path, index in seats)


def _surroundings(transformer: nn.Module) -> dict[str, Any]:
    """What a removal must give back: classes, attributes and hooks of every module, and names."""
    found: dict[str, Any] = {"state_dict": list(transformer.state_dict())}
    for path, module in transformer.named_modules():
        found[f"{path} class"] = type(module)
        found[f"{path} attributes"] = sorted(module.__dict__)
        found[f"{path} hooks"] = (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
    return found


def _require_that_plain_does_not_pickle_either(case: AdapterCase) -> None:
    try:
        pickle.dumps(case.build())
    except (pickle.PicklingError, AttributeError, TypeError):
        return
    raise CheckFailure("the cached transformer cannot be pickled; the plain one can.")
