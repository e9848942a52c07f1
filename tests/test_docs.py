"""Proves that the documentation says what the code does: names, defaults, commands, output."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

import skipcache
import tiny
from skipcache import cli, config, errors, hookspecs, plugins, testing
from skipcache.evaluation import __main__ as evaluation
from skipcache.runtime.stats import CacheStats
from skipcache.testing.checks import CHECKS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
EXECUTED = sorted(
    [
        ROOT / "README.md",
        DOCS / "index.md",
        *DOCS.glob("tutorials/*.md"),
        *DOCS.glob("how-to/*.md"),
        *DOCS.glob("models/*.md"),
        *DOCS.glob("explanation/*.md"),
    ]
)
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])


def names_of(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


@dataclasses.dataclass(frozen=True)
class Fence:
    """A fenced block: its language, its text, and the line of the page that the text begins on."""

    language: str
    text: str
    line: int


def fences_of(page: Path) -> list[Fence]:
    text = page.read_text(encoding="utf-8")
    return [
        Fence(match[1], match[2], text[: match.start(2)].count("\n") + 1)
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def section(page: Path, heading: str) -> str:
    """The text under a heading, up to the next one of any level."""
    pattern = rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)"
    found = re.search(pattern, page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no heading {heading!r}"
    return found[1]


def table(text: str) -> dict[str, list[str]]:
    """The table rows of a text that begin with one name in backticks: name to its other cells."""
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {row[0].strip("`"): row[1:] for row in rows if re.fullmatch(r"`[\w.-]+`", row[0])}


# Hooks


def test_every_hook_has_its_signature_for_a_heading_and_no_heading_is_stale():
    """hooks.md has one heading for each hook, equal to its signature, and no other."""
    signatures = {
        f"{name}({', '.join(inspect.signature(hook).parameters)})"
        for name, hook in vars(hookspecs).items()
        if hasattr(hook, "skipcache_spec")
    }
    text = (DOCS / "reference/hooks.md").read_text("utf-8")
    headings = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert signatures
    assert sorted(headings) == sorted(signatures)


# Code


@pytest.fixture
def quiet_process(tmp_path, monkeypatch) -> Iterator[None]:
    """A folder, an adapter registry, a thread count and compiled code of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_default", None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are small: more threads cost more than they give
    yield
    torch.set_num_threads(threads)
    torch.compiler.reset()


@pytest.mark.parametrize("page", EXECUTED, ids=names_of(EXECUTED))
def test_code_runs_and_prints_what_the_page_says(page, quiet_process, capsys):
    """The Python blocks of a page run in order; a text block after one is what it printed."""
    fences = fences_of(page)
    if not any(fence.language == "python" for fence in fences):
        pytest.skip(f"{page.name} has no Python block")
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for fence, following in zip(fences, [*fences[1:], None], strict=True):
        if fence.language != "python":
            continue
        # Empty lines in front, so that a traceback gives the line of the page.
        source = "\n" * (fence.line - 1) + fence.text
        exec(compile(source, str(page), "exec", dont_inherit=True), namespace)
        printed = capsys.readouterr().out
        if following is not None and following.language == "text":
            assert printed.strip() == following.text.strip(), f"{page.name}, line {following.line}"


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_blocks_name_a_known_language(page):
    """Every fenced block says its language, so that none escapes the tests by accident."""
    known = {"python", "bash", "text", "toml", "bibtex", "diff"}
    assert {fence.language for fence in fences_of(page)} <= known


# Commands


class Parsed(Exception):
    """Carries the parser of a command out of its ``main``."""


def parser_of(main: Callable[[list[str]], int], monkeypatch) -> argparse.ArgumentParser:
    def stop(self, *args, **kwargs):
        raise Parsed(self)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as caught:
            main([])
    return caught.value.args[0]


def commands_in(page: Path) -> list[str]:
    """Commands of skipcache in bash blocks, and in code spans that have an argument."""
    scripts = [fence.text for fence in fences_of(page) if fence.language == "bash"]
    lines = [command for text in scripts for command in re.split(r"\n|&&|;", text)]
    prose = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`((?:python -m )?skipcache(?:\.evaluation)? [^`|]+)`", prose)
    stripped = [line.strip() for line in lines]
    return [line for line in stripped if re.match(r"(python -m )?skipcache\b", line)]


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_commands_parse(page, monkeypatch):
    """Every command shown is one that the command line accepts."""
    for line in commands_in(page):
        words = shlex.split(line, comments=True)
        if words[:2] == ["python", "-m"]:
            words = words[2:]
        program, arguments = words[0], words[1:]
        if program == "skipcache.evaluation":
            names = parser_of(evaluation.main, monkeypatch).parse_args(arguments).names
            assert set(names) <= set(evaluation.BENCHMARKS), line
        else:
            assert program == "skipcache", line
            if arguments != ["--version"]:  # which prints and exits
                parser_of(cli.main, monkeypatch).parse_args(arguments)


def test_cli_page_lists_every_command_and_option_with_its_default(monkeypatch):
    """cli.md has a heading for each command and a row for each option with its default."""
    page = DOCS / "reference/cli.md"
    parser = parser_of(cli.main, monkeypatch)
    (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for name, command in commands.choices.items():
        options = {
            action.option_strings[-1]: str(action.default)
            for action in command._actions
            if action.option_strings and not isinstance(action, argparse._HelpAction)
        }
        rows = table(section(page, f"skipcache {name}"))
        assert {option: cells[0].strip("`") for option, cells in rows.items()} == options, name
    assert set(table(section(page, "python -m skipcache.evaluation"))) == set(evaluation.BENCHMARKS)


# Adapters


@contextmanager
def script(name: str) -> Iterator[ModuleType]:
    """A script of the docs folder, imported."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def test_table_of_models_is_up_to_date():
    """models/index.md has the tables that its script prints, and the README its counts."""
    with script("models_table") as models_table:
        printed = models_table.tables()
        (shown,) = models_table.BLOCK.findall(models_table.PAGE.read_text("utf-8"))
    assert shown == printed, "run python docs/models_table.py --write"
    counts = re.findall(r"^(\d+) classes are (?:claimed|refused)", printed, re.MULTILINE)
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    words = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert f"but for {words[int(counts[1])]} that cannot be cached: {counts[0]} classes" in readme


def test_diff_that_adds_a_family_is_short_and_does_add_it():
    """The diff shown has at most 40 lines, and says of Ovis-Image what the adapter installed does:
    its tiny model passes the kit with it.
    """
    page = DOCS / "how-to/write-an-adapter.md"
    (text,) = [fence.text for fence in fences_of(page) if fence.language == "diff"]
    assert len(text.splitlines()) <= 40
    added = {
        path: re.findall(r"^\+(?!\+\+)(.*)$", part, re.MULTILINE)
        for path, part in re.findall(r"^\+\+\+ b/(\S+)\n(.*?)(?=^--- |\Z)", text, re.M | re.S)
    }
    (entry,) = added["pyproject.toml"]
    assert entry in (ROOT / "pyproject.toml").read_text("utf-8").splitlines()
    assert entry == 'ovis_image = "skipcache_adapters.ovis_image"'
    adapter = ModuleType("ovis_image")
    exec("\n".join(added["adapters/skipcache_adapters/ovis_image.py"]), vars(adapter))
    (name,) = [claim.removeprefix("diffusers.") for claim in adapter.claims]

    imported, *lines = added["tests/tiny/group_a.py"]
    registered: dict = {}
    group = dict(vars(tiny.group_a))
    group["register"] = lambda name, make, inputs: registered.update({name: (make, inputs)})
    assert imported.strip(" ,") in group
    exec("\n".join(lines), group)
    make, inputs = registered[name]
    assert adapter.skipcache_backbone(make()) == plugins.resolve_backbone(
        tiny.TINY[name].make(), None
    )
    for check in testing.adapter_checks(make, inputs, adapter=adapter):
        try:
            check()
        except testing.CheckSkipped:
            assert check.name in ("check_interleaved_are_left_out", "check_shape_change_refreshes")


# Names, options and defaults


def test_every_public_name_has_a_row_in_the_api_page():
    """api.md has a row for each name of ``skipcache.__all__``, and for nothing else."""
    text = (DOCS / "reference/api.md").read_text("utf-8")
    listed = re.findall(r"^\| `(\w+)", text.partition("Their kinds are in")[0], re.MULTILINE)
    assert sorted(listed) == sorted(skipcache.__all__)


def test_every_error_has_a_row_in_the_api_page():
    """api.md has a row for each error and warning of ``skipcache.errors``."""
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    own = {name for name in classes if issubclass(getattr(errors, name), Exception)}
    text = (DOCS / "reference/api.md").read_text("utf-8")
    assert own
    assert own <= set(re.findall(r"^\| `(\w+)", text, re.MULTILINE))


def test_every_name_of_the_kit_has_a_row_in_the_api_page():
    """api.md has a row for each name of ``skipcache.testing``, and for each check, in order."""
    page = DOCS / "reference/api.md"
    rows = section(page, "skipcache.testing").partition("`skipcache.testing.guess`")[0]
    assert sorted(re.findall(r"^\| `(\w+)", rows, re.MULTILINE)) == sorted(testing.__all__)
    assert list(table(section(page, "The checks"))) == [check.__name__ for check in CHECKS]


def test_api_page_has_every_attribute_of_the_stats():
    """api.md has a row for each attribute of ``CacheStats``, and no other."""
    rows = section(DOCS / "reference/api.md", "What cache_stats returns").splitlines()
    listed = {
        name
        for row in rows
        if row[:3] == "| `"
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    known = {*vars(CacheStats), *CacheStats.__annotations__}
    assert listed == {name for name in known if not name.startswith("_")}


@pytest.mark.parametrize(
    "described",
    [
        skipcache.SkipCacheConfig,
        skipcache.IntervalSchedule,
        skipcache.MaskSchedule,
        skipcache.ProbeSchedule,
        skipcache.Taylor,
    ],
)
def test_configuration_page_has_every_field_with_its_default(described):
    """configuration.md has a row for each field of the class, with its default, and no more."""
    rows = table(section(DOCS / "reference/configuration.md", described.__name__))
    fields = {field.name: repr(field.default) for field in dataclasses.fields(described)}
    assert {name: cells[0].strip("`") for name, cells in rows.items()} == fields


def test_configuration_page_has_every_option_of_apply_with_its_default():
    """configuration.md has a row for each option of ``apply_skip_cache``, with the default used."""
    rows = table(section(DOCS / "reference/configuration.md", "apply_skip_cache"))
    parameters = inspect.signature(skipcache.apply_skip_cache).parameters.values()
    assert set(rows) == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    defaults = skipcache.SkipCacheConfig()
    schedule = defaults.resolve_schedule()
    used = {
        "interval": schedule.interval,
        "window": (schedule.start, schedule.stop),
        **dict(zip(("front_layers", "back_layers"), defaults.resolve_layers(100), strict=True)),
    }
    for name, value in used.items():
        assert rows[name][0].strip("`") == repr(value), name
    assert used["interval"] == config.DEFAULT_INTERVAL
    page = section(DOCS / "reference/configuration.md", "apply_skip_cache")
    for has_branches in (True, False):
        estimator = defaults.resolve_estimator(has_branches=has_branches)
        name = "hold" if estimator == skipcache.Hold() else f"taylor({estimator.order})"
        when = "model with skip branches" if has_branches else "else"
        assert re.search(rf'{when}[^.]*`"{re.escape(name)}"`|`"{name}"` for a {when}', page)


def test_defaults_page_agrees_with_the_configuration():
    """defaults.md says the defaults in use, and has the marked block for their measurement."""
    text = (DOCS / "explanation/defaults.md").read_text("utf-8")
    assert f"| `interval` | {config.DEFAULT_INTERVAL} |" in text
    assert f"| `window` | {config.DEFAULT_WINDOW} |" in text
    front, back = skipcache.SkipCacheConfig().resolve_layers(100)
    assert f"| `front_layers`, `back_layers` | {front}, {back} |" in text
    assert text.index("<!-- defaults-table -->") < text.index("<!-- /defaults-table -->")


# The site


def test_figure_shows_the_layers_that_the_stats_count(quiet_process, tmp_path):
    """The picture's script draws a real run, in which exactly the layers of the plan ran."""
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib (extra: bench)")
    with script("figures") as figures:
        run = figures.record(layers=8, steps=12)
    assert {"F", "r"} == set(run.plan)
    kept = {*range(figures.FRONT), *range(8 - figures.BACK, 8)}
    for kind, ran in zip(run.plan, run.ran, strict=True):
        expected = set(range(8)) if kind == "F" else kept
        assert {layer for layer in range(8) if ran[layer]} == expected
    figures.draw(run, tmp_path)
    assert (tmp_path / "depth-time.png").stat().st_size > 0


def test_site_builds_strictly(tmp_path):
    """``mkdocs build --strict`` succeeds, so links resolve, and no page fetches anything."""
    pytest.importorskip("mkdocs", reason="the site needs mkdocs-material (extra: docs)")
    pytest.importorskip("material", reason="the site needs mkdocs-material (extra: docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(list(DOCS.rglob("*.md")))
    external = re.compile(
        r"""<(?:script|link|img)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>"""
    )
    assert [tag for page in pages for tag in external.findall(page.read_text("utf-8"))] == []
