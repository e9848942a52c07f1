"""``back_layers=0``: no layers run behind the span, and it is the transformer's output that is
kept and estimated.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from pipelines import (
    ALWAYS_OPEN,
    KINDS,
    STEPS,
    apply_to,
    block_lists,
    build,
    call_of,
    reference,
    sample,
    transformer_of,
)
from research_code import DiT
from skipcache import (
    MaskSchedule,
    Taylor,
    apply_skip_cache,
    cache_stats,
    remove_skip_cache,
    skip_cache,
    skip_cache_run,
)
from skipcache.errors import ConfigError
from skipcache.runtime.controller import controller_of
from skipcache.testing.case import tensors_in

OUTPUT = {"front_layers": 0, "back_layers": 0}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_reuse_runs_no_layer(kind):
    """With no layers in front and behind, a reuse step runs none, and the stats say so."""
    pipe = apply_to(build(kind), **OUTPUT)
    counts: Counter[int] = Counter()
    for block_list in block_lists(pipe.transformer):
        for block in block_list._modules.values():
            block.register_forward_hook(lambda module, *rest: counts.update([id(module)]))
    sample(pipe)
    stats = cache_stats(pipe)
    assert stats.plan == "FrrFrr"
    assert stats.layers_run == 2 * stats.layers_total // STEPS
    assert set(counts.values()) == {2}


def test_samples_are_finite_repeatable_and_not_the_uncached_ones(kind):
    """What comes out is another picture, the same one each time, and exact again after removal."""
    pipe = apply_to(build(kind), **OUTPUT)
    first = sample(pipe)
    assert not torch.equal(first, reference(kind, estimator=None))
    assert torch.equal(sample(pipe), first)
    remove_skip_cache(pipe)
    assert torch.equal(sample(pipe), reference(kind, estimator=None))


@pytest.mark.parametrize("estimator", ["hold", "taylor", "taylor(2)"])
def test_never_reusing_is_bit_identical(kind, estimator):
    """Refreshing at every step changes no bit."""
    pipe = apply_to(build(kind), interval=1, estimator=estimator, **OUTPUT)
    assert torch.equal(sample(pipe), reference(kind, estimator=None))


def inputs_at(kind: str, count: int) -> tuple[nn.Module, list[dict]]:
    pipe = build(kind)
    args, kwargs = call_of(pipe)
    names = list(type(pipe.transformer).forward.__code__.co_varnames)[1:]
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    noise = [torch.Generator().manual_seed(i) for i in range(count)]
    hidden = call["hidden_states"]
    varied = [
        {**call, "hidden_states": hidden + torch.randn(hidden.shape, generator=draw)}
        for draw in noise
    ]
    return pipe.transformer, varied


@torch.no_grad()
def test_line_through_the_last_two_outputs(kind):
    """``taylor`` takes for the output the line through those of the last two refreshes."""
    transformer, calls = inputs_at(kind, 4)
    plain = [tensors_in(transformer(**call)) for call in calls]
    schedule = MaskSchedule((0, 2), steps=4)
    cached = skip_cache(transformer, schedule=schedule, estimator="taylor", **OUTPUT)
    with cached, skip_cache_run(transformer, timesteps=[1000, 750, 500, 250]):
        found = [tensors_in(transformer(**call)) for call in calls]
    for i, (start, later) in enumerate(zip(plain[0], plain[2], strict=True)):
        assert torch.equal(found[0][i], start)
        assert torch.equal(found[1][i], start)  # one refresh so far
        assert torch.equal(found[2][i], later)
        torch.testing.assert_close(found[3][i], later + (later - start) / 2)


def test_output_keeps_its_class_and_layout(kind):
    """A reuse returns what the forward returns: the same class, or a tuple, as it was asked."""
    transformer, calls = inputs_at(kind, 2)
    for is_dict in (True, False):
        options = {"schedule": MaskSchedule((0,), steps=2), "estimator": "hold", **OUTPUT}
        cached = skip_cache(transformer, **options)
        with torch.no_grad(), cached, skip_cache_run(transformer, timesteps=[1000, 500]):
            one, other = (transformer(**{**c, "return_dict": is_dict}) for c in calls)
        assert type(one) is type(other)
        assert torch.equal(one[0], other[0])
        if is_dict:
            assert torch.equal(one.sample, other.sample)


def test_default_estimator_is_taylor():
    """Where the output is kept and nothing else is said, of order 1."""
    transformer = apply_skip_cache(transformer_of("pixart"), **OUTPUT)
    assert controller_of(transformer).estimator == Taylor(1)
    assert controller_of(apply_skip_cache(transformer, back_layers=1)).estimator == Taylor(2)


def test_estimators_of_the_shallow_feature_are_refused():
    """``residual`` compares features, and an output is none: an error when applied."""
    with pytest.raises(ConfigError, match="back_layers=0"):
        apply_skip_cache(transformer_of("dit"), estimator="residual", **OUTPUT)


def test_cache_holds_outputs_alone(kind):
    """One output a pass for ``hold``: much less than a deep feature of many channels."""
    pipe = apply_to(build(kind), **OUTPUT)
    sample(pipe)
    args, kwargs = call_of(pipe)
    remove_skip_cache(pipe)
    with torch.no_grad():
        output = pipe.transformer(*args, **kwargs)
    assert cache_bytes_of(output) == held_by(kind)


def cache_bytes_of(output) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_in(output))


def held_by(kind: str) -> int:
    pipe = apply_to(build(kind), **OUTPUT)
    sample(pipe)
    return cache_stats(pipe).cache_bytes


@torch.no_grad()
def test_another_shape_refreshes(kind):
    """A batch that changes in the middle of a run is computed, not estimated."""
    pipe = apply_to(build(kind), **OUTPUT)
    sample(pipe)
    assert torch.equal(sample(pipe, batch=2), sample(build_cached(kind), batch=2))


def build_cached(kind: str):
    return apply_to(build(kind), **OUTPUT)


@torch.no_grad()
def test_methods_called_in_place_of_the_module():
    """``forward_with_cfg`` of research code returns the estimate too."""

    class Guided(DiT):
        def forward_with_cfg(self, x, t, y, cfg_scale):
            return cfg_scale * self.forward(x, t, y)

    torch.manual_seed(0)
    model = Guided(input_size=8, hidden_size=16, depth=4, num_heads=2, num_classes=5).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 5])
    with skip_cache(model, interval=2, window=ALWAYS_OPEN, estimator="hold", **OUTPUT):
        outputs = [
            model.forward_with_cfg(x * scale, torch.full((2,), t), y, 1.5)
            for scale, t in ((1.0, 900.0), (2.0, 800.0))
        ]
        assert cache_stats(model).plan == "Fr"
    assert torch.equal(*outputs)


@torch.no_grad()
def test_whole_model_compiles():
    """Compiled as a whole, the samples are those of the eager model."""
    expected = sample(build_cached("pixart"))
    pipe = build("pixart")
    pipe.transformer.compile(backend="eager")
    apply_to(pipe, **OUTPUT)
    torch.testing.assert_close(sample(pipe), expected)
    assert cache_stats(pipe).plan == "FrrFrr"
