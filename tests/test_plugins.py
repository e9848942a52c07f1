"""Adapters are found by entry point or registered, asked in order, and named when they are at
fault.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import skipcache
from skipcache import (
    Backbone,
    BlockList,
    apply_skip_cache,
    hookimpl,
    is_skip_cached,
    register_adapter,
    unregister_adapter,
)
from skipcache.errors import AdapterError, NoAdapterError, PluginWarning
from skipcache.plugins import Adapter, AdapterRegistry, default_registry

HERE = Path(__file__).parent
ADAPTERS = HERE.parent / "adapters"


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(4))

    def forward(self, x, timestep=None):
        for block in self.blocks:
            x = block(x)
        return x


def backbone_named(name: str) -> Backbone:
    return Backbone(name, (BlockList("blocks", takes=("input",), returns="input"),))


class Claimer:
    """A plugin that answers what it was made with, and notes that it was asked."""

    def __init__(self, answer: object = None, log: list | None = None) -> None:
        self.answer = answer
        self.log = [] if log is None else log

    @hookimpl
    def skipcache_backbone(self, transformer):
        self.log.append(self)
        return self.answer


class Raiser:
    @hookimpl
    def skipcache_backbone(self, transformer):
        raise KeyError("no such layer")


class Misspelt:
    @hookimpl
    def skipcache_backbon(self, transformer):
        return None


class WrongSignature:
    @hookimpl
    def skipcache_backbone(self, model):
        return None


class Unmarked:
    def skipcache_backbone(self, transformer):
        return None


class Empty:
    pass


@pytest.fixture
def registry() -> AdapterRegistry:
    return AdapterRegistry()


class FakeDistribution(importlib.metadata.Distribution):
    """A distribution without files, to give entry points a name and version."""

    def __init__(self, name: str, version: str) -> None:
        self._text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"

    def read_text(self, filename):
        return self._text if filename == "METADATA" else None

    def locate_file(self, path):
        return path


def entry_point(name: str, value: str, distribution=("somebodys", "0.9")):
    point = importlib.metadata.EntryPoint(name, value, "skipcache")
    return point._for(FakeDistribution(*distribution)) if distribution else point


@pytest.fixture
def modules(monkeypatch):
    """Importable modules of the test's making."""

    def make(name: str, **content) -> str:
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
        return name

    return make


def claiming(name: str):
    @hookimpl
    def skipcache_backbone(transformer):
        return backbone_named(name)

    return skipcache_backbone


def test_entry_points_are_loaded(modules):
    """Each entry point becomes an adapter with its distribution, version and claims."""
    modules("good_adapter", skipcache_backbone=claiming("good"), claims=("Toy", "Other"))
    registry = AdapterRegistry([entry_point("good", "good_adapter")])
    assert registry.adapters() == [Adapter("good", "somebodys 0.9", ("Toy", "Other"))]
    assert registry.backbone_of(Toy()).name == "good"


def test_entry_point_without_distribution(modules):
    """An entry point that belongs to no distribution is loaded all the same."""
    modules("good_adapter", skipcache_backbone=claiming("good"))
    registry = AdapterRegistry([entry_point("good", "good_adapter", distribution=None)])
    assert registry.adapters() == [Adapter("good", "unknown distribution")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "ModuleNotFoundError"),
        ({}, "implements no hook"),
        ({"skipcache_backbone": WrongSignature().skipcache_backbone}, "cannot be registered"),
        ({"skipcache_backbon": Misspelt().skipcache_backbon}, "skipcache_backbon"),
    ],
)
def test_broken_entry_point_is_named_and_the_rest_load(modules, content, reason):
    """A plugin that cannot be loaded becomes a warning that names it, and those around it work."""
    modules("good_adapter", skipcache_backbone=claiming("good"))
    modules("other_adapter", skipcache_backbone=claiming("other"))
    if content is not None:
        modules("broken_adapter", **content)
    points = [
        entry_point("good", "good_adapter"),
        entry_point("broken", "broken_adapter", ("brokenware", "3.1")),
        entry_point("other", "other_adapter"),
    ]
    with pytest.warns(PluginWarning, match=r"'broken' of brokenware 3\.1") as caught:
        registry = AdapterRegistry(points)
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    *loaded, failed = registry.adapters()
    assert [adapter.name for adapter in loaded] == ["good", "other"]
    assert (failed.name, failed.origin) == ("broken", "brokenware 3.1")
    assert reason in failed.failure
    assert registry.backbone_of(Toy(), "good").name == "good"
    assert registry.backbone_of(Toy()).name == "other"


def test_asking_for_a_broken_adapter_says_why_it_is_missing():
    """Naming an adapter that failed to load gives the reason that it failed."""
    with pytest.warns(PluginWarning):
        registry = AdapterRegistry([entry_point("broken", "no_such_module")])
    with pytest.raises(NoAdapterError, match="'broken' failed to load: ModuleNotFoundError"):
        registry.backbone_of(Toy(), "broken")


def test_duplicate_entry_points_are_reported(modules):
    """Of two entry points of one name the first is used, and the second reported with
    both origins.
    """
    modules("first_adapter", skipcache_backbone=claiming("first"))
    modules("second_adapter", skipcache_backbone=claiming("second"))
    points = [
        entry_point("same", "first_adapter", ("one", "1.0")),
        entry_point("same", "second_adapter", ("two", "2.0")),
    ]
    with pytest.warns(PluginWarning) as caught:
        registry = AdapterRegistry(points)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert all(part in message for part in ("'same'", "two 2.0", "one 1.0"))
    assert registry.backbone_of(Toy()).name == "first"


def test_duplicate_name_is_refused(registry):
    """A second plugin under a taken name is an AdapterError, and the first stays in use."""
    registry.register(Claimer(backbone_named("first")), "same")
    with pytest.raises(AdapterError, match="'same' is already there, from registered"):
        registry.register(Claimer(backbone_named("second")), "same")
    assert registry.backbone_of(Toy()).name == "first"


@pytest.mark.parametrize(
    ("plugin", "parts"),
    [
        (Misspelt(), ["'bad'", "skipcache_backbon"]),
        (WrongSignature(), ["'bad'", "model"]),
        (Unmarked(), ["'bad'", "implements no hook", "skipcache_backbone(transformer)"]),
        (Empty(), ["'bad'", "implements no hook", "skipcache.hookimpl"]),
    ],
)
def test_plugins_that_cannot_work_are_refused(registry, plugin, parts):
    """A misspelt hook, a wrong signature or no hook at all is an AdapterError, and leaves
    no trace.
    """
    registry.register(Claimer(), "other")
    with pytest.raises(AdapterError) as caught:
        registry.register(plugin, "bad")
    assert all(part in str(caught.value) for part in parts)
    assert [adapter.name for adapter in registry.adapters()] == ["other"]
    registry.register(Claimer(backbone_named("good")), "bad")
    assert registry.backbone_of(Toy()).name == "good"


def test_the_same_plugin_twice_is_refused(registry):
    """One plugin object cannot be registered under two names."""
    plugin = Claimer(backbone_named("one"))
    registry.register(plugin, "one")
    with pytest.raises(AdapterError, match="'two'"):
        registry.register(plugin, "two")
    assert registry.backbone_of(Toy(), "one").name == "one"


def test_names_of_registered_plugins(registry, modules):
    """Without a name a plugin is called after its module, class or function, without the
    packages.
    """
    module = types.ModuleType("some.package.my_adapter")
    module.skipcache_backbone = claiming("x")
    assert registry.register(module) == "my_adapter"
    assert registry.register(Claimer()) == "Claimer"


def test_the_last_registered_is_asked_first(registry):
    """Adapters are asked from the last registered on, until one answers, and no further."""
    log: list[Claimer] = []
    old = Claimer(backbone_named("old"), log)
    middle = Claimer(backbone_named("middle"), log)
    new = Claimer(None, log)
    for name, plugin in (("old", old), ("middle", middle), ("new", new)):
        registry.register(plugin, name)
    assert registry.backbone_of(Toy()).name == "middle"
    assert log == [new, middle]
    registry.unregister("middle")
    assert registry.backbone_of(Toy()).name == "old"


def test_only_the_named_adapter_is_asked(registry):
    """With a name, that adapter alone is asked, whoever else would answer."""
    log: list[Claimer] = []
    first, second = (Claimer(backbone_named(name), log) for name in ("first", "second"))
    registry.register(first, "first")
    registry.register(second, "second")
    assert registry.backbone_of(Toy(), "first").name == "first"
    assert log == [first]


def test_nobody_claims_the_model(registry):
    """Where no adapter answers, the error names the model, what is installed and what to do."""
    registry.register(Claimer(), "b")
    registry.register(Claimer(), "a")
    with pytest.raises(NoAdapterError) as caught:
        registry.backbone_of(Toy())
    message = str(caught.value)
    assert all(part in message for part in ("'Toy'", __name__, "Installed: a, b.", "adapter=..."))
    with pytest.raises(NoAdapterError, match="adapter 'a' does not claim 'Toy'"):
        registry.backbone_of(Toy(), "a")
    with pytest.raises(NoAdapterError, match="Installed: none"):
        AdapterRegistry().backbone_of(Toy())


def test_unknown_adapter_name_suggests_the_nearest(registry):
    """Naming or unregistering an adapter that is not there lists those that are, the
    nearest first.
    """
    registry.register(Claimer(), "hunyuan_dit")
    with pytest.raises(NoAdapterError, match="Did you mean 'hunyuan_dit'"):
        registry.backbone_of(Toy(), "hunyuan")
    with pytest.raises(NoAdapterError, match="Allowed: hunyuan_dit"):
        registry.unregister("xyz")


def test_a_raising_plugin_is_named():
    """What a plugin raises arrives as an AdapterError with its name, origin, the model and the
    cause.
    """
    registry = AdapterRegistry()
    registry.register(Raiser(), "raiser", "raiserware 2.0")
    with pytest.raises(AdapterError) as caught:
        registry.backbone_of(Toy())
    message = str(caught.value)
    assert all(part in message for part in ("'raiser'", "raiserware 2.0", "'Toy'", "KeyError"))
    assert isinstance(caught.value.__cause__, KeyError)
    assert not isinstance(caught.value, NoAdapterError)


@pytest.mark.parametrize("answer", ["transformer_blocks", True, {}, Backbone, 0])
def test_a_nonsense_answer_is_named(answer):
    """An answer that is no Backbone is an AdapterError with the plugin's name, origin and the
    answer.
    """
    registry = AdapterRegistry()
    registry.register(Claimer(answer), "nonsense", "nonsenseware 1.0")
    with pytest.raises(AdapterError) as caught:
        registry.backbone_of(Toy())
    message = str(caught.value)
    assert all(part in message for part in ("'nonsense'", "nonsenseware 1.0", repr(answer)))
    assert "skipcache.Backbone, or None" in message


def test_register_and_unregister_adapter():
    """A registered adapter serves apply_skip_cache by itself and by name, until it is taken out
    again.
    """
    model = Toy()
    with pytest.raises(NoAdapterError, match="'Toy'"):
        apply_skip_cache(model)
    name = register_adapter(Claimer(backbone_named("mine")), "mine")
    try:
        assert name == "mine"
        assert "mine" in [adapter.name for adapter in default_registry().adapters()]
        assert is_skip_cached(apply_skip_cache(model))
        assert is_skip_cached(apply_skip_cache(Toy(), adapter="mine"))
        with pytest.raises(AdapterError, match="already there"):
            register_adapter(Claimer(), "mine")
    finally:
        unregister_adapter("mine")
    with pytest.raises(NoAdapterError):
        apply_skip_cache(Toy())
    with pytest.raises(NoAdapterError, match="'mine'"):
        unregister_adapter("mine")


def test_registered_adapter_goes_before_installed_ones():
    """An adapter of one's own is asked before the installed ones, also for a model that
    they know.
    """

    class DiT(Toy):
        x_embedder = final_layer = None

    own = backbone_named("own")
    assert default_registry().backbone_of(DiT()).name == "dit_xl"
    register_adapter(Claimer(own), "own")
    try:
        assert default_registry().backbone_of(DiT()) is own
        assert default_registry().backbone_of(DiT(), "dit_xl").name == "dit_xl"
    finally:
        unregister_adapter("own")


@pytest.mark.parametrize("adapter", [backbone_named("given"), Claimer(backbone_named("given"))])
def test_adapter_given_as_object(adapter):
    """adapter= takes a Backbone or a plugin, for this call alone."""
    assert is_skip_cached(apply_skip_cache(Toy(), adapter=adapter))
    names = [found.name for found in default_registry().adapters()]
    assert "given" not in names
    assert "Claimer" not in names


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (3, "Pass the name of an adapter, a Backbone, or a plugin"),
        (Empty(), "Pass the name of an adapter, a Backbone, or a plugin"),
        (Unmarked(), "implements no hook"),
        (Claimer("nonsense"), "must return a skipcache.Backbone"),
        (Claimer(None), "does not claim 'Toy'"),
        ("dit_xll", "Did you mean 'dit_xl'"),
        ("dit_xl", "'dit_xl' does not claim 'Toy'"),
    ],
)
def test_adapter_that_cannot_be_used(adapter, message):
    """An adapter= that is no adapter, or not this model's, is an AdapterError, and the model is as
    before.
    """
    model = Toy()
    with pytest.raises(AdapterError, match=message):
        apply_skip_cache(model, adapter=adapter)
    assert not is_skip_cached(model)


def test_installed_adapters_all_load():
    """Every installed adapter loads without a warning, under the name of its module."""
    points = importlib.metadata.entry_points(group="skipcache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters = AdapterRegistry(list(points)).adapters()
    built_in = [p for p in points if p.value.startswith("skipcache_adapters.")]
    assert "dit_xl" in [p.name for p in built_in]
    assert [p.value for p in built_in] == [f"skipcache_adapters.{p.name}" for p in built_in]
    assert all(adapter.claims and adapter.failure is None for adapter in adapters)
    expected = f"skipcache {importlib.metadata.version('skipcache')}"
    assert {a.origin for a in adapters if a.name in {p.name for p in built_in}} == {expected}


def modules_of_adapters() -> list[Path]:
    return sorted(ADAPTERS.rglob("*.py"))


@pytest.mark.parametrize("path", modules_of_adapters(), ids=lambda path: path.stem)
def test_adapters_import_public_names_only(path):
    """An adapter imports from skipcache itself, public names only, so anybody's adapter can do the
    same.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
            assert not [name for name in imported if name.split(".")[0] == "skipcache"]
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert not module.startswith("skipcache."), f"{path.name} imports from {module}"
            if module == "skipcache":
                assert {alias.name for alias in node.names} <= set(skipcache.__all__)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """The environment of a process that has somebody else's adapter installed."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    done = subprocess.run(
        [*command, str(HERE / "third_party_adapter")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}


def run_with(environment: dict[str, str], code: str) -> object:
    """Runs the code in a fresh process, warnings being errors, and reads the JSON that it
    prints.
    """
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_third_party_adapter_is_listed(installed):
    """An installed distribution's adapter is listed with distribution, version and claims."""
    found = run_with(
        installed,
        "import json, skipcache.plugins as p\n"
        "print(json.dumps([[a.name, a.origin, a.claims, a.failure]"
        " for a in p.default_registry().adapters()]))",
    )
    assert ["toy", "skipcache-toy-adapter 1.2.3", ["ToyTransformer"], None] in found
    assert "dit_xl" in [name for name, *_ in found]


def test_third_party_adapter_serves_its_model(installed):
    """A model of another distribution is cached with one line, and runs exactly as scheduled."""
    plan, layers_run, names = run_with(
        installed,
        "import json, torch\n"
        "import skipcache\n"
        "from skipcache_toy_adapter import ToyTransformer\n"
        "model = skipcache.apply_skip_cache(ToyTransformer(), interval=3, window=(1.0, 0.0))\n"
        "with torch.no_grad(), skipcache.skip_cache_run(model):\n"
        "    for t in (0.9, 0.7, 0.5, 0.3, 0.1):\n"
        "        model(torch.zeros(1, 2, 4), torch.tensor([t]))\n"
        "stats = skipcache.cache_stats(model)\n"
        "print(json.dumps([stats.plan, stats.layers_run, list(stats.streams)]))",
    )
    assert plan == "FrrFr"
    assert layers_run == 2 * 5 + 3 * 2
    assert names == ["0"]


def test_third_party_adapter_is_absent_here():
    """Without the distribution its model is nobody's, so the two tests above prove discovery."""
    assert "toy" not in [adapter.name for adapter in default_registry().adapters()]
    with pytest.raises(NoAdapterError), torch.no_grad():
        default_registry().backbone_of(type("ToyTransformer", (Toy,), {})())


# Classes that cannot be cached.


class Refuser(Claimer):
    refusals = {"Toy": "It thinks in circles."}  # noqa: RUF012


def test_refused_class_is_told_why(registry):
    """A class that no adapter claims and one refuses is no class that nobody knows: the error has
    the sentence why, for its subclasses too.
    """
    registry.register(Claimer(), "a")
    registry.register(Refuser(), "b")

    class Own(Toy):
        pass

    for model in (Toy(), Own()):
        with pytest.raises(AdapterError, match="Toy cannot be cached, says 'b': It th") as caught:
            registry.backbone_of(model)
        assert caught.type is AdapterError  # which "auto" does not take for a reason to guess
    with pytest.raises(NoAdapterError):
        registry.backbone_of(nn.Identity())


def test_claim_goes_before_refusal(registry):
    """Whoever claims the model can describe it, whatever another one says."""
    registry.register(Claimer(backbone_named("brave")), "a")
    registry.register(Refuser(), "b")
    assert registry.backbone_of(Toy()).name == "brave"


@pytest.mark.parametrize("refusals", ["Toy", ("Toy",), {"Toy": None}, {1: "No."}])
def test_refusals_are_sentences_by_class_name(registry, refusals):
    """Anything but a mapping of names to sentences is refused when registered."""
    plugin = Claimer()
    plugin.refusals = refusals
    with pytest.raises(AdapterError, match=r"adapter 'a': refusals is .*maps class names"):
        registry.register(plugin, "a")
    registry.register(Claimer(), "a")  # the name is free still


def test_refused_class_is_not_guessed():
    """``adapter="auto"`` does not try what an adapter says cannot work."""
    register_adapter(Refuser(), "refuser")
    try:
        with pytest.raises(AdapterError, match="It thinks in circles"):
            apply_skip_cache(Toy(), adapter="auto")
    finally:
        unregister_adapter("refuser")
