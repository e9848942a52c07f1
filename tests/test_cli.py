import importlib.metadata
import sys

import pytest
import torch

import skipcache
from skipcache import Backbone, BlockList, hookimpl, plugins
from skipcache.cli import main
from skipcache.errors import RecipeFileError
from skipcache.plugins import AdapterRegistry
from skipcache.recipes.recipe import Recipe
from skipcache.testing import AdapterCase
from skipcache.testing.checks import CHECKS_IN_PLACE


def test_version(capsys):
    """``--version`` prints the version of the installed distribution."""
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"skipcache {skipcache.__version__}"
    assert importlib.metadata.version("skipcache") == skipcache.__version__


def test_adapters_lists_origin_and_claims(capsys):
    """Every adapter is listed with the distribution and version it came from and what it claims."""
    assert main(["adapters"]) == 0
    printed = capsys.readouterr().out
    assert f"dit_xl  (skipcache {skipcache.__version__})" in printed
    assert "DiTTransformer2DModel" in printed


def test_adapters_lists_what_failed_to_load(monkeypatch, capsys):
    """A plugin that cannot be imported is listed with the reason, and the exit status is 1."""
    broken = importlib.metadata.EntryPoint("broken", "skipcache_no_such_module", "skipcache")
    found = [*importlib.metadata.entry_points(group="skipcache"), broken]
    monkeypatch.setattr(plugins, "_default", None)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)
    assert main(["adapters"]) == 1
    printed = capsys.readouterr().out
    assert "broken" in printed
    assert (
        "FAILED TO LOAD: ModuleNotFoundError: No module named 'skipcache_no_such_module'" in printed
    )
    assert "dit_xl" in printed


def test_no_command_is_an_error(capsys):
    """Without a command the usage is shown."""
    with pytest.raises(SystemExit):
        main([])
    assert "COMMAND" in capsys.readouterr().err


def test_adapters_lists_refusals(monkeypatch, capsys):
    """What an adapter says cannot be cached is listed with its reason, below what it claims."""

    class Plugin:
        claims = ("foo.Foo",)
        refusals = {"Bar": "It has no layers."}  # noqa: RUF012

        @hookimpl
        def skipcache_backbone(self, transformer):
            return None

    registry = AdapterRegistry()
    registry.register(Plugin(), "foo")
    monkeypatch.setattr(plugins, "_default", registry)
    assert main(["adapters"]) == 0
    printed = capsys.readouterr().out
    assert printed == "foo  (registered)\n  foo.Foo\n  not Bar: It has no layers.\n"


MODEL = """
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states):
        return hidden_states + self.linear(hidden_states).tanh()

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states

def inputs(seed):
    draw = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(1, 3, 8, generator=draw)
    return {"hidden_states": hidden_states, "timestep": torch.tensor([500.0])}
"""

FACTORY = """
number = 7

def late():
    from model_of_a_test import Model, inputs
    return Model(), inputs(0)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a model and a factory in it."""
    (tmp_path / "model_of_a_test.py").write_text(MODEL)
    (tmp_path / "factory_of_a_test.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in ("model_of_a_test", "factory_of_a_test"):
        sys.modules.pop(name, None)


def test_factory_that_imports_when_called(folder, capsys):
    """A factory in the working directory finds the modules beside it, whenever it imports them."""
    assert main(["suggest", "factory_of_a_test:late", "--name", "mine"]) == 0
    printed = capsys.readouterr().out
    assert 'name="mine"' in printed
    assert 'BlockList("blocks")' in printed


@pytest.mark.parametrize("command", ["check", "suggest"])
def test_what_is_no_function_is_refused(folder, capsys, command):
    """A name that stands for neither a function nor a case is one line and status 1."""
    assert main([command, "factory_of_a_test:number"]) == 1
    assert "'factory_of_a_test:number' is int" in capsys.readouterr().err


def test_check_leaves_a_model_in_place_as_it_was(folder, monkeypatch, capsys):
    """Of a case that is not copied only the checks that change nothing are run, also with an
    adapter chosen on the command line.
    """
    monkeypatch.syspath_prepend(str(folder))
    import model_of_a_test as made

    class Plugin:
        @hookimpl
        def skipcache_backbone(self, transformer):
            return Backbone("mine", (BlockList("blocks"),), hidden_size=8)

    model = made.Model().eval()
    made.case = AdapterCase(lambda: model, made.inputs, in_place=True)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    registry = AdapterRegistry()
    registry.register(Plugin(), "mine")
    monkeypatch.setattr(plugins, "_default", registry)
    for more in ([], ["--adapter", "mine"]):
        assert main(["check", "model_of_a_test:case", *more]) == 0
        printed = capsys.readouterr().out
        assert printed.count("passed ") == len(CHECKS_IN_PLACE)
        assert printed.endswith(f"{len(CHECKS_IN_PLACE)} passed, 0 skipped, 0 FAILED\n")
    assert list(weights) == list(model.state_dict())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


CALIBRATE = ["calibrate", "demo", "--steps", "6", "--samples", "4", "--speedup", "1.5", "--device"]


def test_measurements_outlive_a_recipe_that_cannot_be_saved(tmp_path, monkeypatch, capsys):
    """They stay until the recipe is there, so that the next try goes on from them."""
    out = tmp_path / "recipe"
    command = [*CALIBRATE, "cpu", "--batch-size", "2", "--out", str(out)]
    save = Recipe.save_pretrained

    def fail(recipe, folder):
        raise RecipeFileError(f"{folder} cannot be written: no space left on device")

    monkeypatch.setattr(Recipe, "save_pretrained", fail)
    assert main(command) == 1
    assert "no space left" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["calibration.safetensors"]
    monkeypatch.setattr(Recipe, "save_pretrained", save)
    assert main(command) == 0
    assert {path.name for path in out.iterdir()} == {"recipe.json", "recipe.safetensors"}
    assert "Use it: apply_skip_cache" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "goes_on"), [("calibrate", True), ("explain", False)])
def test_ctrl_c_is_one_line(command, goes_on, monkeypatch, capsys):
    """No traceback; the exit status is that of an interrupt."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("skipcache.evaluation.bench.subjects.load_subject", interrupt)
    monkeypatch.setattr(Recipe, "from_pretrained", interrupt)
    assert main([command, "demo"]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert "stopped" in line
    assert ("same command goes on where it was" in line) == goes_on
