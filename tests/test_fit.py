"""The closed-form fit: that it learns what can be learnt, and its files and refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch

from pipelines import transformer_of
from skipcache import (
    FittedBranches,
    IntervalSchedule,
    MaskSchedule,
    ProbeSchedule,
    apply_skip_cache,
    cache_stats,
    fit_skip_branches,
    is_skip_cached,
    remove_skip_cache,
    skip_cache,
    skip_cache_run,
)
from skipcache.branches import walks
from skipcache.branches.recorder import Features
from skipcache.demo import load_pipeline
from skipcache.demo.model import MODEL_FOLDER
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


def test_the_matrices_lower_the_held_out_error(fit):
    """The matrices lower the error of the deep feature on calls that they were not fitted on.

    All together: a single one may not, as it pays back what earlier steps owe.
    """
    assert fit.cells
    assert all(cell.error_after >= 0 for cell in fit.cells)
    before, after = (
        sum(getattr(cell, name) for cell in fit.cells) for name in ("error_before", "error_after")
    )
    assert after < before
    assert {cell.refreshes for cell in fit.cells} == {1, 2}


def draw_refreshes(
    count: int, width: int, draw: torch.Generator, spacing: float = 0.2
) -> list[Refresh]:
    """Refreshes every third step, from normalised time 0.9 down."""
    return [
        Refresh(
            3 * n,
            0.9 - spacing * n,
            deep=(torch.randn(2, 5, width, generator=draw),),
            shallow=(torch.randn(2, 5, width, generator=draw),),
        )
        for n in range(count)
    ]


def test_estimate_is_the_formula(fit):
    """The two-part estimate equals the formula of ``FittedBranches`` written out."""
    draw = torch.Generator().manual_seed(0)
    for index, cell in enumerate(fit.cells):
        refreshes = draw_refreshes(cell.refreshes, fit.dim, draw, cell.spacing)
        step = refreshes[-1].step + 2
        time = refreshes[-1].time - cell.distance
        fit_here = dataclasses.replace(fit, cells=(cell,), matrices=(fit.matrices[index],))
        assert fit.cell_at(cell.distance, cell.spacing, time) == index
        now = torch.randn(2, 5, fit.dim, generator=draw)
        e = [r.deep[0] - r.shallow[0] for r in refreshes]
        parts = [now - refreshes[-1].shallow[0], e[-1]]
        if len(e) == 2:
            parts.append(2 / 3 * (e[-1] - e[-2]))
        inputs = torch.cat([*parts, torch.ones(2, 5, 1)], -1)
        wanted = now + e[-1] + inputs @ fit.matrices[index][0][0]
        found = fit_here.estimate(fit_here.prepare(refreshes, step, time), (now,))[0]
        assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)


def test_buckets_near_by_serve_as_well(fit):
    """Runs of another number of steps fall between the times of those that were fitted: what is
    nearest in distance and time serves, up to 0.04 away in time.
    """
    one = dataclasses.replace(fit.cells[0], distance=0.06, spacing=0.0)
    places = {10: 0.06, 11: 0.056, 14: 0.06}  # bucket of fifty to distance
    cells = tuple(dataclasses.replace(one, bucket=b, distance=near) for b, near in places.items())
    many = dataclasses.replace(fit, cells=cells, matrices=fit.matrices[:3], time_buckets=50)

    def served(bucket: int) -> int | None:
        found = many.cell_at(0.06, 0.0, 1 - (bucket + 0.5) / 50)
        return None if found is None else cells[found].bucket

    expected = {7: None, 8: 10, 9: 10, 10: 10, 11: 11, 12: 11, 13: 14, 14: 14, 16: 14, 17: None}
    assert {bucket: served(bucket) for bucket in expected} == expected
    few = dataclasses.replace(many, time_buckets=20)
    assert few.cell_at(0.06, 0.0, 1 - 9.5 / 20) is None  # its neighbour is 0.05 away


def features_of(shallow: torch.Tensor, deep: torch.Tensor) -> Features:
    """Recorded features [T, N, C] of T steps from time 0.9 down; the last fifth is held out."""
    times = tuple(0.9 - 0.1 * step for step in range(len(deep)))
    rows = torch.arange(deep.shape[1])
    is_held_out = rows >= 4 * deep.shape[1] // 5
    return Features(times, [*shallow], [*deep], is_held_out)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_linear_model_is_learnt_exactly(rank):
    """Where the deep feature truly is linear in the inputs, least squares find it; and the best
    matrix of a lower rank is that of the singular values of what it makes of its inputs.
    """
    draw = torch.Generator().manual_seed(1)
    truth = torch.randn(13, 4, generator=draw) / 3
    shallow, deep = torch.randn(2, 4, 500, 4, generator=draw)
    e, before = deep[2] - shallow[2], deep[0] - shallow[0]
    inputs = torch.cat([shallow[3] - shallow[2], e, (e - before) / 2, torch.ones(500, 1)], -1)
    deep[1] = shallow[1] + before  # nothing to learn, and nothing owed
    deep[3] = shallow[3] + e + inputs @ truth
    cells = walks.Cells(1, 1, 1e-9)
    cells.walk(features_of(shallow, deep), [(1, MaskSchedule([0, 2]))])
    found = dict(zip(*cells.solve((1e-9,), rank), strict=True))
    (factors,) = (matrix for cell, matrix in found.items() if cell.refreshes == 2)
    whole = factors[0][0] if rank is None else factors[0][0] @ factors[1][0]
    fitted = (inputs @ whole)[:400]
    wanted = (inputs @ truth)[:400]
    left, size, right = torch.linalg.svd(wanted, full_matrices=False)
    best = wanted if rank is None else (left[:, :rank] * size[:rank]) @ right[:rank]
    assert torch.allclose(fitted, best, atol=1e-2)


def test_what_a_walk_owes_is_added_to_its_next_target():
    """The second of two reuse steps is fitted to the true feature plus the part of the first one's
    error that is not forgotten yet.
    """
    draw = torch.Generator().manual_seed(2)
    shallow, deep = torch.randn(2, 3, 10, 4, generator=draw).double()
    walk = walks.Walk(features_of(shallow, deep), 1, MaskSchedule([0, 3]), 1)
    missed = [(deep[i] - deep[0]) - (shallow[i] - shallow[0]) for i in range(3)]
    first = walk.look(1, walk.refreshes(1))
    weight = torch.randn(1, 9, 4, generator=draw).double()
    assert torch.allclose(first.wanted[0], missed[1])
    walk.go(first, weight)
    second = walk.look(2, walk.refreshes(2))
    owed = missed[1] - first.inputs[0] @ weight[0]
    assert torch.allclose(second.missed[0], missed[2])
    wanted = missed[2] + owed * math.exp(-0.1 / walks.MEMORY)
    assert torch.allclose(second.wanted[0], wanted)


def test_only_so_many_tokens_are_kept(pipe):
    """The rows that a fit goes by do not grow with the number of calls."""
    counts = []
    for number in (2, 4):
        options = {"interval": 3, "tokens": 64}
        few = fit_skip_branches(pipe, calls_of(number, steps=6, labels=2), **options)
        counts.append(max(cell.samples for cell in few.cells))
    assert counts == [32, 48]  # of 64 shared out, less the call that is held out


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
    with skip_cache(pipe, interval=3, estimator="residual"):
        assert not torch.equal(sample(pipe), direct)


def test_the_fit_beside_the_weights_is_the_default(tmp_path):
    """A model loaded from a folder with a fit of its own uses it: the demo model, and a copy of its
    folder. With other weights, layers or an estimator asked for, it does not.
    """
    folder = tmp_path / "copy"
    shutil.copytree(MODEL_FOLDER, folder)
    plain = FittedBranches.from_pretrained(folder / "transformer")
    for pipe in (load_pipeline(), load_pipeline(folder)):
        samples = {}
        for name, options in {
            "default": {},
            "fit": {"branches": plain},
            "taylor(2)": {"estimator": "taylor(2)"},
        }.items():
            with skip_cache(pipe, interval=3, **options):
                samples[name] = sample(pipe)
        assert torch.equal(samples["default"], samples["fit"])
        assert not torch.equal(samples["default"], samples["taylor(2)"])
    with skip_cache(pipe, interval=3, front_layers=2):
        other = sample(pipe)
    with skip_cache(pipe, interval=3, front_layers=2, estimator="taylor(2)"):
        assert torch.equal(sample(pipe), other)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.1)
    with skip_cache(pipe, interval=3):
        other = sample(pipe)
    with skip_cache(pipe, interval=3, estimator="taylor(2)"):
        assert torch.equal(sample(pipe), other)
    (folder / "transformer" / "skip_branches.safetensors").write_bytes(b"spoilt")
    with pytest.raises(BranchFileError):
        apply_skip_cache(load_pipeline(folder))


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
        ({"interval": 1}, "reuses nothing"),
        ({"interval": 2, "schedule": IntervalSchedule(2, 1.0, 0.0)}, "Pass one"),
        ({"rank": 0}, "rank"),
        ({"full_rank_above": 2.0}, "full_rank_above"),
        ({"groups": 7}, "does not divide"),
        ({"time_buckets": 0}, "time_buckets"),
        ({"ridge": float("nan")}, "ridge"),
        ({"tokens": 0}, "tokens"),
        ({"schedule": ProbeSchedule(0.1)}, "cannot plan ahead"),
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
