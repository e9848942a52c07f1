"""The report of benchmarks: the page without a browser and in one, the plots, the Markdown."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import html.parser
import io
import itertools
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skipcache.cli import report as command
from skipcache.errors import ConfigError, SkipCacheError
from skipcache.evaluation.bench.results import Cell, Frechet, Results, Spread
from skipcache.evaluation.report.columns import (
    bytes_text,
    drift_text,
    psnr_text,
    seconds_text,
    speedup_text,
    spread_text,
)
from skipcache.evaluation.report.front import pareto_front
from skipcache.evaluation.report.markdown import markdown_table
from skipcache.evaluation.report.pictures import load_picture
from skipcache.evaluation.report.plan import plan_of
from skipcache.evaluation.report.plots import method_styles, write_plots
from skipcache.evaluation.report.report import write_report

HOSTILE = '</script><script>alert(1)</script> "quoted" & $x_1$'
FRAMES = 5
VOID = {"meta", "img", "input", "br", "path", "use"}


def spread(*values):
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Spread(values, float(np.mean(values)), deviation)


def save_picture(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), colour).save(path)


def save_clip(path, colours):
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = [Image.new("RGB", (16, 12), colour) for colour in colours]
    first.save(path, save_all=True, append_images=rest, duration=80, loop=0)


def cell(family, method, setting, speedup, psnr, shade, folder, is_video, **more):
    """A cell that ran, with two pictures of its own shade of grey."""
    base = (2.0, 2.2, 2.1)
    name = re.sub(r"\W+", "-", f"{family}-{method}-{setting}")
    pictures = []
    for sample in range(2):
        pictures.append(f"pictures/{name}-{sample}.{'gif' if is_video else 'png'}")
        tint = shade + 40 * sample
        if is_video:
            save_clip(folder / pictures[-1], [(tint, 50 * i, 0) for i in range(FRAMES)])
        else:
            save_picture(folder / pictures[-1], (tint, tint, tint))
    given = {
        "seconds": tuple(s / speedup for s in base),
        "baseline_seconds": base,
        "speedup": speedup,
        "speedup_low": speedup * 0.9,
        "speedup_high": speedup * 1.1,
        "layers_run": 10,
        "layers_total": 16,
        "ran": ("1111", "1001", "1001", "1111"),
        "cache_bytes": 4096,
        "peak_bytes": 3 << 20,
        "psnr": None if psnr is None else spread(psnr - 1, psnr + 1),
        "frechet": Frechet(1.2, 0.01, -0.02, 0.03, 500),
        "accuracy": 0.9,
        "is_repeatable": True,
        "pictures": tuple(pictures),
    }
    return Cell(family, method, setting, {"interval": 2}, **{**given, **more})


def make_results(folder, is_video=False, **more):
    def ran(*args, **more):
        return cell(*args, folder, is_video, **more)

    cells = (
        ran("uncached", "uncached", "", 1.0, None, 100),
        ran("skipcache", "fit", "interval 2", 1.8, 45.0, 110),
        ran("skipcache", "fit", "interval 3", 2.4, 40.0, 120),
        ran("fewer steps", "fewer steps", "10 steps", 3.0, 20.0, 160, ran=("1111", "1111")),
        ran("diffusers", "FirstBlockCache", "0.1", 1.5, 30.0, 130, is_repeatable=False),
        Cell("cache-dit", "DBCache", HOSTILE, status="failed", message=HOSTILE),
        Cell("diffusers", "FasterCache", "", status="unavailable", message="needs attention"),
    )
    given = {
        "subject": {
            "name": "clips" if is_video else "pictures",
            "pipeline": "DiTPipeline",
            "steps": 4,
            "samples": 2,
            "call": {"guidance_scale": 2.0, "eta": 0},
            "is_video": is_video,
            "captions": ["a boot", HOSTILE],
        },
        "machine": {"processor": "a processor", "memory_bytes": 8 << 30},
        "versions": {"torch": "2.13.0"},
        "command": ("skipcache", "bench", "demo", "--out", "a folder"),
        "created": "2026-01-01T00:00:00Z",
        "cells": cells,
    }
    results = Results(**{**given, **more})
    results.save(folder)
    return results


class Page(html.parser.HTMLParser):
    """What a page is made of; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.scripts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open.pop() == tag

    def values(self, *names):
        return [value for _, name, value in self.attributes if name in names]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    make_results(root / "pictures")
    make_results(root / "clips", is_video=True)
    return [root / "pictures", root / "clips"]


@pytest.fixture(scope="module")
def page_file(folders):
    return write_report(folders, folders[0].parent / "made" / "report.html")


@pytest.fixture(scope="module")
def page_text(page_file):
    return page_file.read_text(encoding="utf-8")


# Without a browser


def test_the_page_is_well_formed(page_text):
    """Every tag is closed, ids are unique, and what refers to an id finds it."""
    page = Page(page_text)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    wanted = page.values("for", "aria-labelledby")
    wanted += [v[1:] for v in page.values("href") if v.startswith("#")]
    assert wanted
    assert set(wanted) <= set(ids)
    assert {"h1", "h2", "h3", "table", "caption", "figure", "figcaption", "svg"} <= set(page.tags)
    assert all(value in ("row", "col") for value in page.values("scope"))


def test_everything_is_inside(page_text):
    """Nothing is loaded: pictures are data, and no other address stands in the page."""
    page = Page(page_text)
    sources = page.values("src", "srcset", "poster", "data", "action")
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(value.startswith("#") for value in page.values("href"))
    assert "link" not in page.tags
    assert not re.search(r"https?://|@import|url\((?!#)", page_text)
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(alts) == page.tags.count("img") == 2 * 5 * 2
    assert all(alts)


def test_hostile_text_is_text(page_text):
    """Markup in a message, a setting or a caption neither runs nor breaks the page."""
    page = Page(page_text)
    assert page.tags.count("script") == 1
    assert "<script>alert" not in page_text
    assert page_text.count("&lt;script&gt;alert(1)") >= 4


def test_what_is_said(page_text):
    """The machine, the command, the spreads, n, failures and flags are in the page."""
    for said in (
        "skipcache bench demo --out &#39;a folder&#39;",
        "processor: a processor; memory: 8.0 GiB",
        "mean ± standard deviation of 2 samples",
        "median (least to greatest) of 3 turns",
        "95 % bootstrap intervals over 500 samples",
        "Fréchet distance and accuracy: of 500 samples.",
        "samples: 2; call: guidance_scale 2.0, eta 0",
        "2.40x (2.16 to 2.64)",
        "40.0 ± 1.4",
        "+0.0100 (-0.0200 to +0.0300)",
        "a count, not a speedup",
        "needs attention",
        "not repeatable",
        "4 calls of 4 layers: 12 of 16 ran",
        "4.0 KiB",
    ):
        assert said in page_text, said


def test_a_single_sample_is_called_one(tmp_path):
    """Where there is one sample and one turn, the page says so, and shows no spread of 0."""
    one = dataclasses.replace(
        cell("skipcache", "fit", "interval 2", 1.8, 45.0, 110, tmp_path, False),
        psnr=spread(45.0),
        seconds=(1.0,),
        speedup_low=1.8,
        speedup_high=1.8,
    )
    make_results(tmp_path, cells=(one,))
    text = write_report([tmp_path], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "45.0 (one sample)" in text
    assert "1.80x (one turn)" in text
    assert "Quality: one sample a setting, so no spread." in text
    assert "± 0.0" not in text


def test_results_without_quality_or_pictures(tmp_path):
    """A benchmark that measured next to nothing still makes a page."""
    cells = (Cell("uncached", "uncached", ""), Cell("skipcache", "fit", "2", speedup=0.9))
    make_results(tmp_path, cells=cells, subject={}, machine={}, versions={}, command=())
    text = write_report([tmp_path / "results.json"], tmp_path / "r.html").read_text("utf-8")
    assert Page(text).tags.count("img") == 0
    assert "so there is no plot" in text
    with pytest.raises(ConfigError, match="nothing to draw"):
        write_plots([Results.load(tmp_path)], tmp_path / "plots")


def test_one_page_is_the_same_each_time(folders, page_text):
    """Equal results give an equal file."""
    again = write_report(folders, folders[0].parent / "again.html")
    assert again.read_text(encoding="utf-8") == page_text


def test_errors(tmp_path, folders):
    """No results, another schema, a missing or foreign picture, and no cells are refused."""
    out = tmp_path / "report.html"
    with pytest.raises(ConfigError, match="no results"):
        write_report([], out)
    with pytest.raises(ConfigError, match="Pass a list"):
        write_report(str(folders[0]), out)
    with pytest.raises(ConfigError, match="does not exist"):
        write_report([tmp_path / "nowhere"], out)
    make_results(tmp_path / "other", schema="skipcache-bench/99")
    with pytest.raises(ConfigError, match="has the schema 'skipcache-bench/99'"):
        write_report([folders[0], tmp_path / "other"], out)
    make_results(tmp_path / "empty", cells=())
    with pytest.raises(ConfigError, match="has no cells"):
        write_report([tmp_path / "empty"], out)
    results = make_results(tmp_path / "gone")
    (tmp_path / "gone" / results.cells[1].pictures[0]).unlink()
    with pytest.raises(ConfigError, match=r"interval-2-0\.png, which the results name"):
        write_report([tmp_path / "gone"], out)
    assert not out.exists()


def test_pictures_that_are_none(tmp_path):
    """What is outside the folder, of another kind or damaged is not put into the page."""
    folder = tmp_path / "results"
    save_picture(folder / "whole.png", (1, 2, 3))
    save_picture(tmp_path / "outside.png", (1, 2, 3))
    with pytest.raises(ConfigError, match="lies outside"):
        load_picture(folder, "../outside.png")
    (folder / "text.png").write_text("text")
    with pytest.raises(ConfigError, match="neither a PNG nor a GIF"):
        load_picture(folder, "text.png")
    (folder / "half.png").write_bytes((folder / "whole.png").read_bytes()[:50])
    with pytest.raises(ConfigError, match="damaged"):
        load_picture(folder, "half.png")


def test_a_clip_is_a_film_strip(tmp_path):
    """Every frame of a GIF is in the strip, in reading order, with its colours and pace."""
    save_clip(tmp_path / "clip.gif", [(0, 40 * i, 0) for i in range(FRAMES)])
    picture = load_picture(tmp_path, "clip.gif")
    assert (picture.width, picture.height, picture.frames) == (16, 12, FRAMES)
    assert (picture.columns, picture.rows, picture.frame_ms) == (3, 2, 80)
    data = base64.b64decode(picture.uri.split(",")[1])
    strip = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert strip.shape == (24, 48, 3)
    greens = [int(strip[i // 3 * 12 + 6, i % 3 * 16 + 8, 1]) for i in range(FRAMES)]
    assert greens == [40 * i for i in range(FRAMES)]


def test_frames_that_last_longer(tmp_path):
    """Equal neighbours, which a GIF holds once, take as many places in the strip as they last."""
    save_clip(tmp_path / "clip.gif", ["red", "lime", "lime", "lime", "blue"])
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.n_frames == 3
    picture = load_picture(tmp_path, "clip.gif")
    assert (picture.frames, picture.frame_ms) == (5, 80)
    save_clip(tmp_path / "still.gif", ["red"])
    assert load_picture(tmp_path, "still.gif").frames == 1


def test_missing_packages_are_named(folders, tmp_path, monkeypatch):
    """Without jinja2 or matplotlib the error says what to install."""
    for package, stem in (("jinja2", "jinja2"), ("matplotlib", "matplotlib.figure")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, stem, None)
            with pytest.raises(SkipCacheError, match=f"{package}, which is not installed"):
                write_report(folders, tmp_path / "report.html")


# Parts


def test_the_front_holds_what_nothing_beats():
    """Dominated cells, slow ones and those that did not run are not on it; equal ones are."""

    def at(speedup, psnr, name, status="ok"):
        return Cell("a", name, "", status=status, speedup=speedup, psnr=spread(psnr))

    cells = [
        at(2.0, 30.0, "fast"),
        at(1.5, 40.0, "good"),
        at(1.5, 40.0, "as good"),
        at(1.5, 35.0, "beaten"),
        at(0.9, 90.0, "slow"),
        at(3.0, 90.0, "failed", "failed"),
        Cell("a", "no quality", "", speedup=9.0),
    ]
    assert [c.method for c in pareto_front(cells)] == ["good", "as good", "fast"]


def test_plans_cover_exactly_what_ran():
    """The rectangles of the path, painted on a grid, are the letters."""
    ran = ("1101", "1101", "0001", "1111", "10")
    plan = plan_of(ran)
    painted = np.zeros((plan.layers, plan.calls), int)
    for left, top, width, height in re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-\3z", plan.path):
        rows = slice(int(top), int(top) + int(height))
        painted[rows, int(left) : int(left) + int(width)] += 1
    due = np.array([[int(call[i : i + 1] or 0) for call in ran] for i in range(4)])
    assert (painted == due).all()
    assert plan.ran == due.sum()
    assert plan_of(()) is None


def test_numbers_in_words():
    """Bytes, spreads and intervals read as they should."""
    counts = (0, 1023, 1024, 1536, 600 << 10, 3 << 30, None)
    texts = ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "600 KiB", "3.0 GiB", ""]
    assert [bytes_text(count) for count in counts] == texts
    assert spread_text(spread(1.0, 2.0), 1) == "1.5 ± 0.7"
    assert spread_text(None, 1) == ""
    assert psnr_text(spread(200.0, 200.0)) == "identical"
    assert drift_text(Frechet(120.0, 1.5, -0.25, 3.0, 9)) == "+1.50 (-0.25 to +3.00)"
    assert drift_text(Frechet(1.0, 0.0, 0.0, 0.0, 9)) == "0"
    timed = Cell("uncached", "uncached", "", seconds=(0.5, 0.25, 1.0), speedup=1.0)
    assert seconds_text(timed) == "0.500 (0.250 to 1.000)"
    assert speedup_text(timed) == "1.00x"


def test_styles_tell_methods_apart():
    """Up to 42 methods have a marker and colour of their own; a method keeps its own."""
    cells = tuple(Cell("family", f"method {i}", "") for i in range(42))
    results = Results({}, {}, {}, (), "", (Cell("uncached", "uncached", ""), *cells))
    styles = method_styles([results, results])
    assert len(styles) == len(set(styles.values())) == 42
    for one, other in itertools.pairwise(styles.values()):
        assert one.marker != other.marker
        assert one.colour != other.colour


def test_plots_as_files(folders, tmp_path):
    """Two plots a subject, as PNG and SVG, under the subject's name where there are several."""
    loaded = [Results.load(folder) for folder in folders]
    alone = write_plots(loaded[:1], tmp_path / "one")
    assert sorted(path.name for path in alone) == [
        "frechet-drift.png",
        "frechet-drift.svg",
        "speed-quality.png",
        "speed-quality.svg",
    ]
    assert {path.name for path in write_plots(loaded, tmp_path / "two")} == {
        f"{start}-{path.name}" for start in ("1-pictures", "2-clips") for path in alone
    }
    with Image.open(tmp_path / "one" / "speed-quality.png") as image:
        assert image.width > 1000


def test_labels_that_matplotlib_reads_otherwise(tmp_path):
    """Dollars, underscores and markup in names are drawn as they are."""
    odd = [
        cell("_f", method, "$\\frac$", 1.5 + i, 40.0 - i, 110, tmp_path, False)
        for i, method in enumerate(("_m", "<b>", "-->"))
    ]
    make_results(tmp_path, cells=tuple(odd), subject={"name": "../$a_b$ <i>"})
    page = Page(write_report([tmp_path], tmp_path / "report.html").read_text("utf-8"))
    assert page.tags.count("b") == 6  # those of the front's list
    files = write_plots([Results.load(tmp_path)], tmp_path / "plots")
    assert {path.parent for path in files} == {tmp_path / "plots"}


def test_markdown(folders):
    """A row a cell that ran, marks and notes, and what did not run, in one line each."""
    text = markdown_table(Results.load(folders[0]))
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert len(table) == 2 + 5
    assert len({line.count("|") for line in table}) == 1
    assert "2.40x (2.16 to 2.64)" in text
    assert r"interval 3 \*" in text
    assert "mean ± standard deviation of 2 samples" in text
    assert "<script>" not in text
    assert "- diffusers: FasterCache: unavailable. needs attention" in lines


def test_the_command(folders, tmp_path, capsys):
    """It writes the page, the plots and the Markdown, and names them."""
    parser = argparse.ArgumentParser()
    command.add_to(parser.add_subparsers())
    options = ["--out", f"{tmp_path}/a/r.html", "--plots", f"{tmp_path}/plots"]
    options += ["--markdown", f"{tmp_path}/b/table.md"]
    arguments = parser.parse_args(["report", *map(str, folders), *options])
    assert arguments.run(arguments) == 0
    named = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert len(named) == 1 + 8 + 1
    assert all(path.stat().st_size for path in named)
    headings = re.findall("^## (.*)", named[-1].read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == ["pictures", "clips"]


# In a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser, page_file):
    """Opens the page; at the end nothing may have been loaded, logged or thrown."""
    contexts, faults = [], []

    def opened(**options):
        options = {"viewport": {"width": 1200, "height": 900}, "reduced_motion": "reduce"} | options
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(page_file.as_uri())
        return page

    requested = []
    yield opened
    for context in contexts:
        context.close()
    assert faults == []
    others = [url for url in requested if not url.startswith("data:")]
    assert others == [page_file.as_uri()] * len(contexts)


def pixels(locator, folder):
    locator.screenshot(path=folder / "shot.png")
    with Image.open(folder / "shot.png") as image:
        return np.asarray(image.convert("RGB")).astype(int)


def centre(locator, folder):
    shot = pixels(locator, folder)
    return tuple(shot[shot.shape[0] // 2, shot.shape[1] // 2])


def test_the_slider_wipes(visit, tmp_path):
    """Mouse, keyboard and dragging on the picture move the edge between the two pictures."""
    section = visit().locator("#subject-1 .pictures")
    stage, slider = section.locator(".stage.wipe"), section.get_by_label("Wipe")
    uncached, cached = (100,) * 3, (110,) * 3
    box = slider.bounding_box()
    slider.click(position={"x": box["width"] * 0.9, "y": box["height"] / 2})
    assert int(slider.input_value()) > 80
    assert centre(stage, tmp_path) == uncached
    slider.press("Home")
    assert slider.input_value() == "0"
    assert centre(stage, tmp_path) == cached
    slider.press("ArrowRight")
    assert slider.input_value() == "1"
    assert slider.get_attribute("aria-valuetext") == "1 % uncached"
    slider.press("End")
    assert centre(stage, tmp_path) == uncached
    box = stage.bounding_box()
    stage.click(position={"x": box["width"] * 0.25, "y": 5})
    assert slider.input_value() == "25"
    assert centre(stage, tmp_path) == cached


def test_the_difference_is_amplified(visit, tmp_path):
    """The pixels are |uncached - cached| times the factor, at most white."""
    section = visit().locator("#subject-1 .pictures")
    stage, gain = section.locator(".stage.difference"), section.get_by_label("Absolute difference")
    assert centre(stage, tmp_path) == (80,) * 3  # 8 (110 - 100)
    gain.press("ArrowRight")
    assert section.locator(".gain-text").inner_text() == "16"
    assert centre(stage, tmp_path) == (160,) * 3
    gain.press("End")
    assert centre(stage, tmp_path) == (255,) * 3


def test_choosing_changes_the_pictures(visit, tmp_path):
    """Another setting, another sample, or a click in the contact sheet shows another pair."""
    section = visit().locator("#subject-1 .pictures")
    section.get_by_label("Wipe").press("Home")
    stage = section.locator(".stage.wipe")
    section.get_by_label("Setting", exact=True).select_option("skipcache: fit, interval 3")
    assert centre(stage, tmp_path) == (120,) * 3
    assert "2.40x (2.16 to 2.64) wall-clock" in section.locator(".numbers").inner_text()
    section.get_by_label("Sample", exact=True).select_option("1")
    assert centre(stage, tmp_path) == (160,) * 3
    section.locator('.thumb[data-cell="4"][data-sample="0"]').click()
    assert centre(stage, tmp_path) == (130,) * 3
    assert section.get_by_label("Setting", exact=True).input_value() == "4"
    assert "Not repeatable" in section.locator(".numbers").inner_text()
    alts = [image.get_attribute("alt") for image in stage.locator("img").all()]
    assert alts == [
        "uncached, sample 1: a boot",
        "diffusers: FirstBlockCache, 0.1, sample 1: a boot",
    ]


def test_clips_play_in_step(visit, tmp_path):
    """The frame slider shows the same frame everywhere; the button plays and pauses."""
    page = visit()
    section = page.locator("#subject-2 .pictures")
    stage, frame = section.locator(".stage.wipe"), section.get_by_label("Frame")
    section.get_by_label("Wipe").press("Home")
    frame.press("End")
    assert centre(stage, tmp_path) == (110, 200, 0)
    thumb = section.locator('.thumb[data-cell="2"][data-sample="0"]')
    assert centre(thumb, tmp_path) == (120, 200, 0)
    assert centre(section.locator(".stage.difference"), tmp_path) == (80, 0, 0)
    section.get_by_label("Setting", exact=True).select_option("2")
    assert centre(stage, tmp_path) == (120, 200, 0)
    play = section.get_by_role("button", name="Play")
    play.click()
    page.wait_for_function("() => document.querySelector('.frame-range').value !== '4'")
    section.get_by_role("button", name="Pause").click()
    stopped = frame.input_value()
    page.wait_for_timeout(300)
    assert frame.input_value() == stopped


def test_motion_is_asked_for(visit):
    """Clips begin to play by themselves, but not for those who prefer reduced motion."""
    assert visit(reduced_motion="reduce").locator(".play").inner_text() == "Play"
    assert visit(reduced_motion="no-preference").locator(".play").inner_text() == "Pause"


def test_sorting(visit):
    """The buttons sort, by mouse and keyboard, up and then down; empty values stay last."""
    table = visit().locator("#subject-1 table.sortable")

    def column(index):
        return [row.locator("th, td").nth(index).inner_text() for row in rows.all()]

    rows = table.locator("tbody tr")
    speedup = table.get_by_role("button", name="Speedup")
    speedup.click()
    firsts = [text.split("x")[0] for text in column(2)]
    assert firsts == ["1.00", "1.50", "1.80", "2.40", "3.00"]
    head = table.locator("thead th").nth(2)
    assert head.get_attribute("aria-sort") == "ascending"
    speedup.press("Enter")
    assert [text.split("x")[0] for text in column(2)] == firsts[::-1]
    assert head.get_attribute("aria-sort") == "descending"
    psnr = table.get_by_role("button", name="PSNR")
    for _ in range(2):
        psnr.press("Space")
        assert column(4)[-1] == "-"
    assert head.get_attribute("aria-sort") == "none"
    table.get_by_role("button", name="Family").click()
    families = column(1)
    assert families == sorted(families)


def test_the_plots_are_there(visit):
    """Both plots of both subjects are drawn, with their points, names and hover texts."""
    page = visit()
    plots = page.locator(".plot.wide svg")
    assert plots.count() == 4
    assert page.locator(".plot.narrow svg").first.is_hidden()
    for plot in plots.all():
        box = plot.bounding_box()
        assert box["width"] > 800
        assert box["height"] > 300
    texts = plots.first.locator("text").all_text_contents()
    assert {"skipcache: fit", "fewer steps", "Pareto front", "interval 3"} <= set(texts)
    told = plots.first.locator("title").all_text_contents()
    assert len(told) == 4
    assert any(text.startswith("skipcache: fit, interval 2. speedup 1.80x") for text in told)


def test_a_phone_has_no_page_to_push_sideways(visit):
    """At 360 pixels nothing is wider than the page, and the narrow plots are shown."""
    page = visit(viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator(".plot.narrow svg").first.is_visible()
    assert page.locator(".plot.wide svg").first.is_hidden()
    page.locator("summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_dark_and_light(visit, tmp_path):
    """The scheme of the system sets the colours, those of the plots included."""
    found = {}
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme)
        plot = page.locator(".plot.wide").first
        shot = pixels(plot, tmp_path)
        text = plot.locator("text").first
        found[scheme] = (
            page.evaluate("getComputedStyle(document.body).backgroundColor"),
            text.evaluate("element => getComputedStyle(element).fill"),
        )
        assert (shot.mean() > 128) == (scheme == "light")
    assert found["light"] == ("rgb(254, 254, 254)", "rgb(27, 29, 33)")
    assert found["dark"] == ("rgb(20, 22, 26)", "rgb(232, 234, 238)")


def test_focus_is_seen(visit):
    """Controls are reached with the tab key, and the one that has the focus is outlined."""
    page = visit()
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name, width = page.evaluate(
            """() => {
              const element = document.activeElement;
              return [element.className || element.tagName, getComputedStyle(element).outlineWidth];
            }"""
        )
        reached.add(name)
        assert name == "BODY" or width == "3px"
    assert {"cell-choice", "sample-choice", "wipe-range", "gain-range", "scroll"} <= reached


def test_without_scripts_the_pictures_are_there(visit):
    """A reader that runs no script sees the table and every picture."""
    page = visit(java_script_enabled=False)
    assert page.locator(".thumb img").first.is_visible()
    assert page.locator(".viewer").first.is_hidden()
    assert page.locator("table.sortable thead").first.inner_text().startswith("Setting")
