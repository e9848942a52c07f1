"""The closed-form fit: that it learns what can be learnt, and its files and refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import skipcache.branches.fit as fit_module
from pipelines import transformer_of
from skipcache import (
    FittedBranches,
    IntervalSchedule,
    apply_skip_cache,
    cache_stats,
    fit_skip_branches,
    is_skip_cached,
    remove_skip_cache,
    skip_cache,
    skip_cache_run,
)
from skipcache.demo import load_pipeline
from skipcache.errors import BranchError, BranchFileError, BranchWarning, ConfigError
from skipcache.estimators import Refresh


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


def calls_of(count: int, steps: int = 12, labels: int = 4) -> list[dict]:
    labels = [index % 10 for index in range(labels)]
    options = {"guidance_scale": 2.0, "num_inference_steps": steps, "output_type": "np"}
    return [{"class_labels": labels, **options} for _ in range(count)]


@pytest.fixture(scope="module")
def fit(pipe):
    return fit_skip_branches(pipe, calls_of(4), interval=3)


def sample(pipe, seed: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(pipe(**calls_of(1)[0], generator=generator).images)


def test_every_cell_kept_lowers_the_held_out_error(fit):
    """A matrix is only kept where it beats the extrapolation on calls it was not fitted on."""
    assert fit.cells
    assert all(0 <= cell.error_after < cell.error_before for cell in fit.cells)
    assert {cell.refreshes for cell in fit.cells} == {1, 2}


def draw_refreshes(count: int, width: int, draw: torch.Generator) -> list[Refresh]:
    """Refreshes every third step, from normalised time 0.9 down."""
    return [
        Refresh(
            3 * n,
            0.9 - 0.2 * n,
            deep=(torch.randn(2, 5, width, generator=draw),),
            shallow=(torch.randn(2, 5, width, generator=draw),),
        )
        for n in range(count)
    ]


def test_estimate_is_the_formula(fit):
    """The two-part estimate equals f_t + e_r + [f_t - f_r; e_r; s (e_r - e_r'); 1] W written out."""
    draw = torch.Generator().manual_seed(0)
    for index, cell in enumerate(fit.cells):
        refreshes = draw_refreshes(cell.refreshes, fit.dim, draw)
        step = refreshes[-1].step + 2
        time = refreshes[-1].time - cell.distance
        fit_here = dataclasses.replace(fit, cells=(cell,), matrices=(fit.matrices[index],))
        assert fit.cell_at(cell.refreshes, cell.distance, time) == index
        now = torch.randn(2, 5, fit.dim, generator=draw)
        e = [r.deep[0] - r.shallow[0] for r in refreshes]
        parts = [now - refreshes[-1].shallow[0], e[-1]]
        if len(e) == 2:
            parts.append(2 / 3 * (e[-1] - e[-2]))
        inputs = torch.cat([*parts, torch.ones(2, 5, 1)], -1)
        wanted = now + e[-1] + inputs @ fit.matrices[index][0][0]
        found = fit_here.estimate(fit_here.prepare(refreshes, step, time), (now,))[0]
        assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_linear_model_is_learnt_exactly():
    """Where the deep feature truly is linear in the inputs, the normal equations find it."""
    draw = torch.Generator().manual_seed(1)
    truth = torch.randn(9, 4, generator=draw) / 3
    learner = fit_module._Learner(1, 1)
    for number in range(20):
        learner.is_held_out = number >= 16
        (refresh,) = draw_refreshes(1, 4, draw)
        now = torch.randn(2, 5, 4, generator=draw)
        learner.estimate(learner.prepare([refresh], 1, 0.8), (now,))
        f, d = refresh.shallow[0], refresh.deep[0]
        inputs = torch.cat([now - f, d - f, torch.ones(2, 5, 1)], -1)
        learner.observe((now + d - f + inputs @ truth,))
    learner.solve(None, 1e-9)
    ((weight,),) = learner.weights.values()
    assert torch.allclose(weight[0], truth, atol=1e-4)
    learner.solve(2, 1e-9)
    ((down, up),) = learner.weights.values()
    assert (down.shape, up.shape) == ((1, 9, 2), (1, 2, 4))


def test_fitting_leaves_the_pipeline_as_it_was(pipe):
    """What was applied before the fit is applied after it, and without a cache no bit changed."""
    plain = sample(pipe)
    apply_skip_cache(pipe, interval=2, estimator="hold")
    held = sample(pipe)
    fit_skip_branches(pipe, calls_of(2, steps=6, labels=1), interval=2)
    assert is_skip_cached(pipe)
    assert torch.equal(sample(pipe), held)
    remove_skip_cache(pipe)
    assert torch.equal(sample(pipe), plain)


def test_the_same_calls_give_the_same_fit(pipe):
    """Two fits of the same calls and seed agree to the last bit, generators of the calls too."""
    made = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(4)
        calls = [{**call, "generator": generator} for call in calls_of(2, steps=6, labels=1)]
        made.append(fit_skip_branches(pipe, calls, interval=2))
    for first, second in zip(made[0].matrices, made[1].matrices, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_applied_from_object_and_from_folder_alike(pipe, fit, tmp_path):
    """A fit gives the same samples after a round trip through its files, bit for bit, and reuses
    the steps of the plan.
    """
    with skip_cache(pipe, interval=3, branches=fit):
        direct = sample(pipe)
        assert cache_stats(pipe).reused > 0
    with skip_cache(pipe, interval=3, branches=fit.save_pretrained(tmp_path)):
        assert torch.equal(sample(pipe), direct)
    with skip_cache(pipe, interval=3):
        assert not torch.equal(sample(pipe), direct)


def test_refreshing_always_changes_nothing(pipe, fit):
    """With the fit applied and every step a refresh, samples are those of the bare pipeline."""
    plain = sample(pipe)
    with skip_cache(pipe, interval=1, branches=fit):
        assert torch.equal(sample(pipe), plain)


def test_a_distance_never_seen_is_residual(pipe, fit):
    """Far from every distance of the fit, the estimate is that of residual."""
    found = []
    for options in ({"branches": fit}, {"estimator": "residual"}):
        with skip_cache(pipe, schedule=IntervalSchedule(2, 1.0, 0.0), **options):
            generator = torch.Generator().manual_seed(3)
            call = {**calls_of(1)[0], "num_inference_steps": 80, "class_labels": [1]}
            found.append(torch.tensor(pipe(**call, generator=generator).images))
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [{"rank": 8}, {"groups": 4}, {"rank": 4, "groups": 4}])
def test_smaller_forms(pipe, options, tmp_path):
    """Low rank and channel groups give smaller files, which still help where they are kept."""
    small = fit_skip_branches(pipe, calls_of(2, steps=8, labels=2), interval=2, **options)
    assert small.cells
    folder = small.save_pretrained(tmp_path)
    with skip_cache(pipe, interval=2, branches=small):
        direct = sample(pipe)
    with skip_cache(pipe, interval=2, branches=str(folder)):
        assert torch.equal(sample(pipe), direct)


def test_a_bare_transformer_is_fitted_from_its_sampler():
    """A sampler of one's own, around a transformer without a pipeline, is enough."""
    model = transformer_of("dit", 4)
    times = [900, 700, 500, 300, 100]

    @torch.no_grad()
    def sampler(seed: int) -> torch.Tensor:
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        with skip_cache_run(model, timesteps=times):
            for time in times:
                label = torch.tensor([1])
                x = x - 0.1 * model(x, torch.tensor([time]), class_labels=label).sample[:, :4]
        return x

    calls = [{"seed": seed} for seed in range(6)]
    schedule = IntervalSchedule(2, 1.0, 0.0)
    made = fit_skip_branches(model, calls, sampler=sampler, schedule=schedule, ridge=1e-2)
    assert not is_skip_cached(model)
    apply_skip_cache(model, branches=made, schedule=schedule)
    assert torch.isfinite(sampler(9)).all()
    with pytest.raises(ConfigError, match="sampler"):
        fit_skip_branches(model, calls)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calls": []}, "too few"),
        ({"calls": calls_of(1)}, "too few"),
        ({"interval": 1}, "reused nothing"),
        ({"interval": 2, "schedule": IntervalSchedule(2, 1.0, 0.0)}, "Pass one"),
        ({"rank": 0}, "rank"),
        ({"groups": 7}, "does not divide"),
        ({"time_buckets": 0}, "time_buckets"),
        ({"ridge": float("nan")}, "ridge"),
        ({"front_layers": 17}, "leave nothing"),
    ],
)
def test_what_cannot_be_fitted_is_refused(pipe, change, message):
    """Every value that cannot be is named, and the pipeline is left without a cache."""
    options = {"calls": calls_of(2, steps=6, labels=1), **change}
    with pytest.raises(ConfigError, match=message):
        fit_skip_branches(pipe, **options)
    assert not is_skip_cached(pipe)


def test_what_cannot_be_applied_is_refused(pipe, fit, tmp_path):
    """Another deep span, an estimator besides, another class of model, other weights, no fit."""
    with pytest.raises(ConfigError, match="fitted with 1 and 1"):
        apply_skip_cache(pipe, branches=fit, front_layers=2)
    with pytest.raises(ConfigError, match="Pass one"):
        apply_skip_cache(pipe, branches=fit, estimator="hold")
    with pytest.raises(BranchError, match="hub id"):
        apply_skip_cache(pipe, branches=3)
    with pytest.raises(BranchFileError, match="no folder"):
        apply_skip_cache(pipe, branches=tmp_path / "none")
    with pytest.raises(BranchFileError, match="LatteTransformer3DModel"):
        apply_skip_cache(transformer_of("latte", 4), branches=fit)
    assert not is_skip_cached(pipe)
    other = transformer_of("dit", 4)
    with pytest.warns(BranchWarning, match="another"):
        apply_skip_cache(other, branches=fit)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text["settings"].pop("cells"),
        lambda text: text["settings"].update(groups=0),
        lambda text: text["settings"].update(ranks=[None]),
        lambda text: text["settings"]["cells"][0].pop("distance"),
        lambda text: text["settings"]["cells"][0].update(distance=-1),
        lambda text: text["settings"].update(dim=80),
        lambda text: text.update(format_version=99),
        lambda text: text.update(kind="branches"),
    ],
)
def test_spoilt_files_are_refused(fit, tmp_path, spoil):
    """A record that contradicts itself or its tensors is refused, whatever is wrong in it."""
    path = fit.save_pretrained(tmp_path) / "skip_branches.json"
    text = json.loads(path.read_text())
    spoil(text)
    path.write_text(json.dumps(text))
    with pytest.raises(BranchFileError):
        FittedBranches.from_pretrained(tmp_path)
