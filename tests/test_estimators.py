"""What: the three estimators, by their formulas and by the memory that they say they keep."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DiTTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from skipcache import (
    Estimator,
    Hold,
    IntervalSchedule,
    Refresh,
    Residual,
    Taylor,
    apply_skip_cache,
    cache_stats,
    skip_cache_run,
)
from skipcache.errors import ConfigError
from skipcache.estimators import estimator_named, extrapolation_weights

NAN = float("nan")
QUICK = settings(deadline=None, max_examples=60, derandomize=True)
ALL = [Hold(), Residual(), Taylor(0), Taylor(1), Taylor(2), Taylor(3)]

increasing_steps = st.sets(st.integers(0, 40), min_size=1, max_size=5).map(sorted)


def refresh_at(step: int, *deep: torch.Tensor | None, shallow=None) -> Refresh:
    return Refresh(step, NAN, deep, shallow)


def ask(estimator: Estimator, refreshes: list[Refresh], step: int, shallow=None):
    """As the runtime does: no more than ``history`` refreshes, then the step's shallow feature."""
    kept = refreshes[-estimator.history :]
    return estimator.estimate(estimator.prepare(kept, step, NAN), shallow)


def some_refreshes(count: int = 4, dtype: torch.dtype = torch.float32) -> list[Refresh]:
    torch.manual_seed(0)
    steps = [0, 1, 4, 6, 9][:count]
    return [
        Refresh(step, NAN, (torch.randn(2, 3).to(dtype),), (torch.randn(2, 3).to(dtype),))
        for step in steps
    ]


def test_hold_gives_the_last_deep_feature():
    """hold is the deep feature of the newest refresh, bit for bit."""
    refreshes = some_refreshes()
    (held,) = ask(Hold(), refreshes, 11)
    assert torch.equal(held, refreshes[-1].deep[0])


def test_residual_moves_the_deep_feature_by_the_shallow_change():
    """residual is the last deep feature plus what the shallow feature has moved since then."""
    refreshes = some_refreshes()
    now = torch.randn(2, 3)
    (moved,) = ask(Residual(), refreshes, 11, (now,))
    assert torch.equal(moved, refreshes[-1].deep[0] + (now - refreshes[-1].shallow[0]))


def test_residual_of_an_unmoved_shallow_feature_is_hold():
    """Where the shallow feature has not moved, residual gives what hold gives."""
    refreshes = some_refreshes()
    (moved,) = ask(Residual(), refreshes, 11, refreshes[-1].shallow)
    assert torch.equal(moved, refreshes[-1].deep[0])


@QUICK
@given(
    st.integers(0, 4),
    increasing_steps,
    st.integers(1, 6),
    st.lists(st.integers(-5, 5), min_size=5, max_size=5),
)
def test_taylor_is_exact_on_polynomials(order, steps, ahead, coefficients):
    """taylor(n) extrapolates a polynomial of degree n exactly from unequally spaced refreshes."""
    degree = min(order, len(steps) - 1)

    def value(step: int) -> float:
        return float(sum(c * step**power for power, c in enumerate(coefficients[: degree + 1])))

    def feature(step: int) -> torch.Tensor:
        return torch.tensor([[value(step), -2.0 * value(step)]], dtype=torch.float64)

    step = steps[-1] + ahead
    (guess,) = ask(Taylor(order), [refresh_at(s, feature(s)) for s in steps], step)
    weights = extrapolation_weights(steps[-order - 1 :], step)
    used = steps[-order - 1 :]
    scale = sum(abs(w * value(s)) for w, s in zip(weights, used, strict=True)) + 1.0
    assert torch.allclose(guess, feature(step), rtol=0.0, atol=1e-12 * scale)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_goes_on_along_a_line(order):
    """An increasing line is extrapolated beyond its last value, and a falling one below it."""
    refreshes = [
        refresh_at(s, torch.tensor([2.0 * s, -3.0 * s], dtype=torch.float64)) for s in (1, 2, 5, 6)
    ]
    (guess,) = ask(Taylor(order), refreshes, 8)
    assert guess[0] > refreshes[-1].deep[0][0]
    assert guess[1] < refreshes[-1].deep[0][1]
    assert torch.allclose(guess, torch.tensor([16.0, -24.0], dtype=torch.float64), atol=1e-9)


def test_taylor_zero_is_hold():
    """taylor(0) gives what hold gives."""
    refreshes = some_refreshes()
    assert torch.equal(ask(Taylor(0), refreshes, 11)[0], refreshes[-1].deep[0])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_starts_at_a_lower_order(order):
    """While fewer refreshes than order + 1 are cached, taylor is of the order that they allow."""
    refreshes = some_refreshes(5)
    for available in range(1, order + 1):
        early = ask(Taylor(order), refreshes[:available], 12)[0]
        lower = ask(Taylor(available - 1), refreshes[:available], 12)[0]
        assert torch.equal(early, lower)
        higher = ask(Taylor(available), refreshes[: available + 1], 12)[0]
        assert not torch.allclose(early, higher)


@QUICK
@given(increasing_steps, st.integers(-3, 50))
def test_extrapolation_weights_are_those_of_lagrange(steps, step):
    """The weights sum to one and give back the very point at a step that is cached."""
    assert math.isclose(sum(extrapolation_weights(steps, step)), 1.0, abs_tol=1e-3)
    for index, own in enumerate(steps):
        expected = [1.0 if other == index else 0.0 for other in range(len(steps))]
        assert extrapolation_weights(steps, own) == pytest.approx(expected)


@pytest.mark.parametrize("estimator", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_estimates_keep_dtype_and_shape(estimator, dtype):
    """An estimate has the shape and dtype of the cached feature, also in half precision."""
    refreshes = some_refreshes(dtype=dtype)
    (guess,) = ask(estimator, refreshes, 10, (torch.randn(2, 3).to(dtype),))
    assert guess.dtype == dtype
    assert guess.shape == (2, 3)
    assert torch.isfinite(guess).all()


def test_residual_keeps_the_dtype_of_the_deep_feature():
    """Where the stream is wider at the front than at the back, the estimate has the dtype of the
    back.
    """
    last = Refresh(0, NAN, (torch.ones(2, dtype=torch.float16),), (torch.zeros(2),))
    (guess,) = ask(Residual(), [last], 1, (torch.ones(2),))
    assert guess.dtype == torch.float16
    assert guess.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_does_not_round_its_terms_to_half(order):
    """In half precision the weighted terms are summed wider, so only the result is rounded."""
    refreshes = some_refreshes(dtype=torch.bfloat16)
    wide = [refresh_at(r.step, r.deep[0].double()) for r in refreshes]
    (guess,) = ask(Taylor(order), refreshes, 12)
    (exact,) = ask(Taylor(order), wide, 12)
    assert torch.allclose(guess.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("estimator", ALL, ids=repr)
def test_none_passes(estimator):
    """A tensor that a model leaves out stays out, and its neighbour is estimated as ever."""
    refreshes = [
        Refresh(r.step, NAN, (None, *r.deep), (None, *r.shallow)) for r in some_refreshes()
    ]
    now = torch.randn(2, 3)
    absent, guess = ask(estimator, refreshes, 10, (None, now))
    assert absent is None
    assert torch.equal(guess, ask(estimator, some_refreshes(), 10, (now,))[0])


@pytest.mark.parametrize("estimator", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 4])
def test_estimates_never_alias_the_cache(estimator, dtype, count):
    """Working in place on an estimate leaves every cached tensor, and the step's own feature, as it
    was.
    """
    refreshes = some_refreshes(count, dtype)
    now = torch.randn(2, 3).to(dtype)
    cached = [t for r in refreshes for t in (*r.deep, *r.shallow)] + [now]
    before = [t.clone() for t in cached]
    (guess,) = ask(estimator, refreshes, 10, (now,))
    guess.add_(1.0).mul_(7.0)
    assert all(torch.equal(old, new) for old, new in zip(before, cached, strict=True))
    (again,) = ask(estimator, refreshes, 10, (now,))
    assert not torch.equal(again, guess)


@pytest.mark.parametrize(
    ("estimator", "history", "needs_shallow"),
    [
        (Hold(), 1, False),
        (Residual(), 1, True),
        (Taylor(0), 1, False),
        (Taylor(), 2, False),
        (Taylor(3), 4, False),
    ],
)
def test_what_estimators_ask_to_be_kept(estimator, history, needs_shallow):
    """Each estimator says how many refreshes it looks at and whether it needs the shallow
    feature.
    """
    assert isinstance(estimator, Estimator)
    assert estimator.history == history
    assert estimator.needs_shallow is needs_shallow


@pytest.mark.parametrize("order", [-1, 1.5, True, "1", None])
def test_taylor_refuses_a_bad_order(order):
    """An order that is no whole number from 0 is a ConfigError saying so."""
    with pytest.raises(ConfigError, match="whole number from 0") as caught:
        Taylor(order)
    assert repr(order) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hold", Hold()),
        ("residual", Residual()),
        ("taylor", Taylor(1)),
        ("taylor(0)", Taylor(0)),
        ("taylor(2)", Taylor(2)),
    ],
)
def test_estimators_by_name(name, expected):
    """Every documented name gives its estimator."""
    assert estimator_named(name) == expected


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("hodl", "hold"),
        ("residuals", "residual"),
        ("tailor", "taylor"),
        ("taylor(-1)", "taylor(2)"),
    ],
)
def test_misspelt_estimator_suggests_the_nearest(name, nearest):
    """A misspelt name is a ConfigError that names it, the nearest one and all the others."""
    with pytest.raises(ConfigError) as caught:
        estimator_named(name)
    message = str(caught.value)
    assert repr(name) in message
    assert f"Did you mean {nearest!r}?" in message
    assert all(known in message for known in ("hold", "residual", "taylor"))


def test_unlike_name_gets_no_suggestion():
    """A name that resembles nothing lists what there is and suggests nothing."""
    with pytest.raises(ConfigError, match="Allowed: hold, residual, taylor") as caught:
        estimator_named("xyz")
    assert "Did you mean" not in str(caught.value)


BATCH, TOKENS, WIDTH = 2, 16, 8
FEATURE_BYTES = BATCH * TOKENS * WIDTH * 4  # [B, T, C] in float32


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize(
    ("estimator", "features"),
    [
        ("hold", 1),
        ("residual", 2),
        ("taylor", 2),
        ("taylor(0)", 1),
        ("taylor(2)", 3),
        ("taylor(3)", 4),
    ],
)
@pytest.mark.parametrize("is_planned", [True, False])
def test_memory_is_as_stated(estimator, features, streams, is_planned):
    """In a real run the cache holds just the number of features a stream that the
    estimator states.
    """
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        in_channels=2,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()
    apply_skip_cache(transformer, schedule=IntervalSchedule(2), estimator=estimator)
    times = [1000.0 - 100 * index for index in range(9)]
    with torch.no_grad(), skip_cache_run(transformer, streams, times if is_planned else None):
        for t in times:
            for _ in range(streams):
                timestep = torch.full((BATCH,), int(t))
                labels = torch.zeros(BATCH, dtype=torch.long)
                transformer(torch.randn(BATCH, 2, 8, 8), timestep=timestep, class_labels=labels)
    stats = cache_stats(transformer)
    assert stats.cache_bytes == streams * features * FEATURE_BYTES
    assert len(stats.streams) == streams
    assert stats.plan == "FrFrFrFrF"
