import functools
import math

import numpy as np
import pytest
import torch

from skipcache import Hold, IntervalSchedule, cache_stats, skip_cache
from skipcache.evaluation import benchmark, models, presets, quality, rival_overhead
from skipcache.evaluation.__main__ import main
from skipcache.evaluation.metrics import psnr
from skipcache.evaluation.timing import format_table, in_turns, speedups


def test_psnr_of_a_hand_made_case():
    """An error of 0.1 everywhere is 20 dB, whatever the shape."""
    reference = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert psnr(reference + 0.1, reference) == pytest.approx(20.0, abs=1e-4)
    assert psnr(reference * 255 + 25.5, reference * 255, peak=255) == pytest.approx(20.0, abs=1e-3)


def test_psnr_agrees_with_numpy():
    """The value equals an independent computation in float64."""
    a, b = (torch.rand(4, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    error = np.mean((a.numpy().astype(np.float64) - b.numpy().astype(np.float64)) ** 2)
    assert psnr(a, b) == pytest.approx(10 * math.log10(1 / error))


def test_psnr_of_equal_pictures_is_infinite():
    """No error, no noise."""
    assert psnr(torch.ones(3), torch.ones(3)) == math.inf


def test_psnr_sees_errors_below_one_grey_level():
    """An error that rounding to uint8 would hide still counts."""
    reference = torch.full((16, 16), 0.5)
    assert psnr(reference + 0.001, reference) == pytest.approx(60.0, abs=1e-2)


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)),
    ],
)
def test_psnr_refuses_what_it_cannot_compare(image, reference):
    """Integers would wrap round, and shapes would broadcast: both are errors."""
    with pytest.raises(ValueError, match="psnr"):
        psnr(image, reference)


def test_variants_run_in_turns():
    """Every variant runs once a turn, the first turn is dropped, and the ratio is of medians."""
    order = []
    clock = {"slow": iter([9.0, 4.0, 2.0, 6.0]), "fast": iter([9.0, 2.0, 1.0, 3.0])}

    def variant(name):
        def run():
            order.append(name)
            return next(clock[name])

        return run

    seconds = in_turns({name: variant(name) for name in clock}, repeats=3)
    assert order == ["slow", "fast"] * 4
    assert seconds == {"slow": [4.0, 2.0, 6.0], "fast": [2.0, 1.0, 3.0]}
    assert speedups(seconds, "slow") == {"slow": 1.0, "fast": 2.0}
    # A machine that slows down from turn to turn: medians of each alone would say 3.
    assert speedups({"slow": [2.0, 6.0, 12.0], "fast": [1.0, 2.0, 6.0]}, "slow")["fast"] == 2.0


def test_table_is_markdown():
    """Columns line up and the rule below the header is there."""
    assert format_table(["a", "bb"], [["1", "2"], ["333", "4"]]).splitlines() == [
        "| a   | bb |",
        "| --- | -- |",
        "| 1   | 2  |",
        "| 333 | 4  |",
    ]


def test_static_schedule_adds_no_host_sync():
    """A profile of a cached run counts exactly the host syncs of the uncached one."""
    counts = benchmark.count_syncs(steps=6)
    assert counts["uncached"] > 0
    assert len(counts) == 4
    assert len(set(counts.values())) == 1


def test_memory_is_as_stated():
    """The bytes measured on the stored tensors equal the features stated for each estimator."""
    rows = [line.split("|") for line in benchmark.memory(steps=8).splitlines()[2:]]
    assert len(rows) == 5
    for row in rows:
        assert int(row[3]) == int(row[4]) > 0


def test_speedup_benchmark_counts_the_ideal(monkeypatch, capsys):
    """The ideal is the ratio of layers; here on a tiny model in place of DiT-XL/2."""
    monkeypatch.setattr(models, "dit_xl_2", lambda: models.tiny_dit(layers=28))
    assert main(["speedup"]) == 0
    table = capsys.readouterr().out
    assert "1.867" in table  # 28 x 8 / (28 x 4 + 2 x 4)
    assert "3.294" in table  # 28 x 8 / (28 x 2 + 2 x 6)


def test_unknown_benchmark_is_refused(capsys):
    """A misspelt name ends with the list of names, before anything runs."""
    with pytest.raises(SystemExit):
        main(["speed"])
    names = "presets, sizes, relayouts, memory, syncs, estimators"
    assert names in capsys.readouterr().err


def test_run_steps_drives_one_run():
    """The benchmark's own loop is one run of as many steps as asked."""
    transformer = models.tiny_dit(layers=4)
    with skip_cache(transformer, schedule=IntervalSchedule(2), estimator=Hold()):
        benchmark.run_steps(transformer, models.sample_inputs(transformer), steps=6)
        assert cache_stats(transformer).plan == "FrFrFr"


def test_estimators_are_compared_on_the_demo_model():
    """One row for each number of steps and interval, one column for each estimator, all finite."""
    lines = quality.estimators(seeds=2, steps=(6,), intervals=(2, 3)).splitlines()
    assert len(lines) == 4
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[:3] == ["6", "2", "1.80"]
    assert all(10 < float(cell.split(" ± ")[0]) < 90 for cell in cells[3:])


TINY = {"layers": 6, "heads": 2, "head_width": 8}


def test_presets_benchmark_counts_the_ideal(monkeypatch):
    """Each model is measured under its own preset, and the ideal is that of the plan and layers;
    here on tiny models of the same classes.
    """
    small = {**TINY, "sample_size": 8}
    makers = {name: getattr(models, name) for name in ("latte_1", "latte_class", "hunyuan_g_2")}
    for name, make in makers.items():
        monkeypatch.setattr(models, name, functools.partial(make, **small))
    rows = [
        [cell.strip() for cell in line.split("|")[2:-1]]
        for line in presets.presets(repeats=1).splitlines()[2:]
    ]
    # Times 1, 7/8, ..., 1/8, six layers of which a reuse step runs two.
    assert [(row[0], row[1], row[5]) for row in rows] == [
        ("skip-dit/latte-t2v", "FFFrFrFr", "1.333"),  # 48 / (5 x 6 + 3 x 2)
        ("skip-dit/latte-c2v", "FrFrFrFr", "1.500"),  # 48 / (4 x 6 + 4 x 2)
        ("skip-dit/hunyuan", "FFFrFrFr", "1.333"),
    ]
    for _, _, *numbers in rows:
        uncached, cached, speedup, ideal, ratio = map(float, numbers)
        assert uncached > 0
        assert cached > 0
        assert ratio == pytest.approx(speedup / ideal, abs=0.002)


def test_sizes_benchmark_counts_the_ideal(monkeypatch):
    """Models without a preset are measured by the default settings; here tiny ones."""
    flux = functools.partial(models.flux_dev, 2, 4, tokens=4, heads=2, head_width=32)
    wan = functools.partial(models.wan_1_3b, layers=6, sample_size=4, heads=2, head_width=12)
    monkeypatch.setattr(models, "flux_dev", flux)
    monkeypatch.setattr(models, "wan_1_3b", wan)
    rows = [
        [cell.strip() for cell in line.split("|")[2:-1]]
        for line in presets.sizes(repeats=1).splitlines()[2:]
    ]
    # Times 1, 7/8, ..., 1/8 in the window 0.98 to 0.02, six layers of which a reuse runs two.
    plans = {(row[0], row[4]) for row in rows}
    assert plans == {("FrFrFrFr", "1.500")}


def test_relayouts_benchmark_measures_both_ways(monkeypatch):
    """A reuse step and the copies that it is spared, of a model with the depth of Latte-1."""
    tiny = functools.partial(models.latte_1, heads=2, head_width=8)
    monkeypatch.setattr(models, "latte_1", tiny)
    lines = presets.relayouts(repeats=1, reuses=2, frames=2, sample_size=8).splitlines()
    assert "26 of 28 layers skipped, 2 x 32 tokens" in lines[0]
    step, cost = (float(line.split("|")[2].split()[0]) for line in lines[2:])
    assert step > 0
    share = float(lines[3].partition("(")[2].partition(" %")[0])
    assert share == pytest.approx(100 * cost / step, abs=100 * 0.2 / step)


def test_rival_overhead_has_a_number_for_each_that_runs():
    """Every cache is timed never and always reusing, beside uncached models of fewer layers."""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in rival_overhead.rival_overhead(repeats=1, steps=6).splitlines()[2:]
    ]
    assert [row[0] for row in rows[:4]] == [
        "uncached, 12 layers",
        "uncached, 2 layers",
        "uncached, 1 layers",
        "skipcache",
    ]
    assert len(rows) == 8
    never, always, cost = (int(number) for number in rows[3][1:])
    assert never > 0
    assert always > 0
    assert cost == pytest.approx(never - int(rows[0][1]), abs=1)
