"""The conformance kit: it passes what is right, and each planted fault is caught by its check."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import textwrap
import unittest

import pytest
import torch
from torch import nn

from pipelines import transformer_of
from skipcache import Backbone, BlockList, Timestep, Zipped, hookimpl
from skipcache.cli import main
from skipcache.errors import ConfigError, SkipCacheError
from skipcache.testing import AdapterCase, Check, CheckFailure, CheckSkipped, adapter_checks
from skipcache.testing.checks import CHECKS, CHECKS_IN_PLACE
from tiny import TINY

FLOW = ("hidden_states", "encoder_hidden_states")
SWAPPED = ("encoder_hidden_states", "hidden_states")
FLUX = Backbone(
    name="flux",
    lists=(
        BlockList("transformer_blocks", FLOW, SWAPPED),
        BlockList("single_transformer_blocks", FLOW, SWAPPED),
    ),
    timestep=Timestep(noise=1.0),
    hidden_size=16,
)
LATTE = Backbone(
    name="latte",
    lists=(Zipped((BlockList("transformer_blocks"), BlockList("temporal_transformer_blocks"))),),
    hidden_size=16,
)


def case_of(kind: str, backbone: Backbone) -> AdapterCase:
    tiny = TINY[kind]
    return AdapterCase(tiny.make, tiny.inputs, functools.partial(tiny.inputs, batch=2), backbone)


def flux_with(*lists: BlockList, **changes) -> AdapterCase:
    changes |= {"lists": lists} if lists else {}
    return case_of("FluxTransformer2DModel", dataclasses.replace(FLUX, **changes))


class Forgetful(nn.Module):
    """A transformer whose layers hand on a second tensor in an attribute, past what flows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SideStep() for _ in range(5))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        side = hidden_states.mean(dim=1, keepdim=True)
        for block in self.blocks:
            hidden_states, side = block(hidden_states, side)
        return hidden_states + side


class SideStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states: torch.Tensor, side: torch.Tensor):
        return hidden_states + self.one(hidden_states).tanh() + side, side + self.other(side).tanh()


def forgetful_inputs(seed: int, batch: int = 1) -> dict:
    draw = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 8, generator=draw),
        "timestep": torch.full((batch,), 500.0),
    }


def forgetful(*lists: BlockList, **options) -> AdapterCase:
    backbone = Backbone("forgetful", lists, hidden_size=8, **options)
    return AdapterCase(Forgetful, forgetful_inputs, adapter=backbone)


class Deaf(Forgetful):
    """Its gate is shut: no layer changes the output."""

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return hidden_states + 0 * super().forward(hidden_states, timestep)


class Counting(Forgetful):
    """Keeps something of one call for the next, in Python."""

    calls = 0

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(hidden_states, timestep) + self.calls


class Stateful(Forgetful):
    """The block that ends the span leaves a number that the last one needs."""

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        side, left = hidden_states.mean(dim=1, keepdim=True), 0.0
        for block in self.blocks:
            hidden_states, side = block(hidden_states, side)
            left = left + float(hidden_states.norm()) * (0.5 if block is not self.blocks[4] else 1)
        return hidden_states + side + left


BOTH = BlockList("blocks", ("hidden_states", "side"), ("hidden_states", "side"))

# What is wrong -> the case, and the check that is to say so.
FAULTS = {
    "returned tensors in the wrong order": (
        flux_with(BlockList("transformer_blocks", FLOW, FLOW), FLUX.lists[1]),
        "check_flow_is_named",
    ),
    "one tensor too few declared as returned": (
        flux_with(BlockList("transformer_blocks", FLOW, ("hidden_states",)), FLUX.lists[1]),
        "check_flow_is_named",
    ),
    "a bare tensor declared where a tuple comes": (
        flux_with(BlockList("transformer_blocks"), BlockList("single_transformer_blocks")),
        "check_flow_is_named",
    ),
    "a list missing": (flux_with(FLUX.lists[0]), "check_no_list_is_missing"),
    "lists in the wrong order": (flux_with(*reversed(FLUX.lists)), "check_order_of_layers"),
    "layers not zipped": (
        case_of("LatteTransformer3DModel", dataclasses.replace(LATTE, lists=LATTE.lists[0].lists)),
        "check_order_of_layers",
    ),
    "layers zipped the wrong way round": (
        case_of(
            "LatteTransformer3DModel",
            dataclasses.replace(LATTE, lists=(Zipped(LATTE.lists[0].lists[::-1]),)),
        ),
        "check_order_of_layers",
    ),
    "zipped lists that run one after the other": (
        flux_with(Zipped(FLUX.lists)),
        "check_order_of_layers",
    ),
    "a tensor that flows is not named": (
        forgetful(BlockList("blocks", ("hidden_states",), ("hidden_states", None))),
        "check_flow_is_named",
    ),
    "time on another scale": (flux_with(timestep=Timestep()), "check_time_is_read"),
    "time in another argument": (flux_with(timestep=Timestep("guidance")), "check_time_is_read"),
    "no such list to run always": (
        flux_with(always_run=("refiners",)),
        "check_no_list_is_missing",
    ),
    "another width": (flux_with(hidden_size=24), "check_zero_branch_is_exact"),
    "weights that shut every layer out": (
        AdapterCase(Deaf, forgetful_inputs, adapter=Backbone("deaf", (BOTH,))),
        "check_output_is_telling",
    ),
    "a model that remembers its calls": (
        AdapterCase(Counting, forgetful_inputs, adapter=Backbone("counting", (BOTH,))),
        "check_output_is_telling",
    ),
    "something flows past the blocks": (
        AdapterCase(Stateful, forgetful_inputs, adapter=Backbone("stateful", (BOTH,))),
        "check_same_input_reuse_is_exact",
    ),
    "inputs that do not depend on the seed": (
        AdapterCase(Forgetful, lambda seed: forgetful_inputs(0), adapter=Backbone("f", (BOTH,))),
        "check_output_is_telling",
    ),
}


def results_of(case: AdapterCase) -> dict[str, str]:
    found = {}
    for function in CHECKS:
        if function.__name__ == "check_compiles_fullgraph":
            continue
        try:
            Check(function.__name__, function, case)()
            found[function.__name__] = "passed"
        except CheckSkipped as skipped:
            found[function.__name__] = f"skipped: {skipped}"
        except Exception as error:
            found[function.__name__] = f"failed: {error}"
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught_by_its_check(fault):
    """A wrong adapter, or a model that cannot be cached so, fails the check that names it."""
    case, name = FAULTS[fault]
    check = next(function for function in CHECKS if function.__name__ == name)
    with pytest.raises((CheckFailure, SkipCacheError)):
        Check(name, check, case)()


@pytest.mark.parametrize(
    "case",
    [case_of("FluxTransformer2DModel", FLUX), case_of("LatteTransformer3DModel", LATTE)],
    ids=["flux", "latte"],
)
def test_right_adapter_passes(case):
    """What is right fails nothing, so that the faults above are what is caught."""
    results = results_of(case)
    assert not [name for name, result in results.items() if result.startswith("failed")], results
    assert results["check_same_input_reuse_is_exact"] == "passed"


def test_forgetful_passes_when_described_rightly():
    """So does the model written here, with both of its tensors named."""
    results = results_of(forgetful(BOTH))
    failed = {k: v for k, v in results.items() if v.startswith("failed")}
    assert not failed


def test_checks_in_place_leave_the_model_as_it_was():
    """Run on the very model, without copies, they change no weight, class, hook or attribute."""
    model = TINY["FluxTransformer2DModel"].make()
    tiny, state = TINY["FluxTransformer2DModel"], torch.get_rng_state()
    before = {path: (type(m), sorted(m.__dict__)) for path, m in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    case = AdapterCase(lambda: model, tiny.inputs, adapter=FLUX, in_place=True)
    for check in CHECKS_IN_PLACE:
        check(case)
    assert before == {path: (type(m), sorted(m.__dict__)) for path, m in model.named_modules()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    case.run(model, tiny.inputs(0))
    assert torch.equal(torch.get_rng_state(), expected)
    torch.set_rng_state(state)


# The generator, as pytest and unittest use it.


def test_generator_names_every_check():
    """One named check each, in order; the name is what pytest shows."""
    checks = adapter_checks(Forgetful, forgetful_inputs, adapter=Backbone("f", (BOTH,)))
    assert [str(check) for check in checks] == [function.__name__ for function in CHECKS]
    assert len(checks) >= 15
    assert issubclass(CheckSkipped, unittest.SkipTest)


FORGETFUL = Backbone("f", (BOTH,), hidden_size=8)


@pytest.mark.parametrize(
    "check", adapter_checks(Forgetful, forgetful_inputs, adapter=FORGETFUL), ids=str
)
def test_kit_as_a_parametrisation(check):
    """The use that the documentation shows."""
    check()


def test_expected_failure_is_skipped_with_its_reason():
    """A failure that the adapter's author knows is no failure, and is told."""
    checks = adapter_checks(
        Counting,
        forgetful_inputs,
        adapter=Backbone("counting", (BOTH,)),
        expected_failures={"check_output_is_telling": "it counts its calls"},
    )
    check = next(c for c in checks if c.name == "check_output_is_telling")
    with pytest.raises(CheckSkipped, match="it counts its calls"):
        check()


def test_expected_failure_that_passes_fails():
    """An expectation that is no longer true is to be taken out."""
    checks = adapter_checks(
        Forgetful,
        forgetful_inputs,
        adapter=Backbone("f", (BOTH,)),
        expected_failures={"check_layers_run": "none does"},
    )
    with pytest.raises(CheckFailure, match="Take it out of expected_failures"):
        next(c for c in checks if c.name == "check_layers_run")()


def test_unknown_expected_failure_is_refused():
    """A misspelt name says which is nearest."""
    with pytest.raises(ConfigError, match="check_layers_run"):
        adapter_checks(Forgetful, forgetful_inputs, expected_failures={"check_layer_run": "?"})


def test_too_few_layers_are_said():
    """A model without a layer to leave out is told so, not an index error."""
    shallow = functools.partial(transformer_of, "dit", layers=2)
    backbone = Backbone("d", (BlockList("transformer_blocks"),))
    case = AdapterCase(shallow, forgetful_inputs, adapter=backbone)
    with pytest.raises(CheckFailure, match="at least four"):
        _ = case.spans


def test_native_skips_limit_the_spans():
    """Only fronts and backs that do not cut a skip in two are tried."""
    pairs = tuple((i, 5 - i) for i in range(2))
    backbone = Backbone("h", (BlockList("blocks"),), native_skips=pairs)
    hunyuan = functools.partial(transformer_of, "hunyuan_dit")
    case = AdapterCase(hunyuan, forgetful_inputs, adapter=backbone)
    assert (1, 1) in case.spans
    assert (1, 2) not in case.spans


# From a shell.

FACTORY = """
import torch
from torch import nn
from test_testing import BOTH, Forgetful, forgetful_inputs
from skipcache import Backbone, BlockList
from skipcache.testing import AdapterCase

def good():
    backbone = Backbone("good", (BOTH,), hidden_size=8)
    return AdapterCase(Forgetful, forgetful_inputs, adapter=backbone)

def bad():
    one = BlockList("blocks", ("hidden_states",), ("hidden_states", None))
    return AdapterCase(Forgetful, forgetful_inputs, adapter=Backbone("bad", (one,)))

def pair():
    torch.manual_seed(0)
    return Forgetful(), forgetful_inputs(0)

def wrong():
    return 7
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "factories_of_a_test.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    yield "factories_of_a_test"
    sys.modules.pop("factories_of_a_test", None)


def test_command_reports_a_good_adapter(factories, capsys):
    """One line a check, a reason under each that was skipped, a sum, and status 0."""
    assert main(["check", f"{factories}:good"]) == 0
    printed = capsys.readouterr().out
    assert "adapter 'good', 5 layers" in printed
    assert "passed  check_same_input_reuse_is_exact" in printed
    assert (
        "skipped check_shape_change_refreshes\n        make_other_inputs is not given." in printed
    )
    assert printed.strip().splitlines()[-1].endswith(", 0 FAILED")


def test_command_reports_a_bad_adapter(factories, capsys):
    """The failure is told under the check's name, the rest still runs, and the status is 1."""
    assert main(["check", f"{factories}:bad"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED  check_flow_is_named" in printed
    assert "check_compiles_fullgraph" in printed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("factories_of_a_test", "not of the form MODULE:FACTORY"),
        ("no_such_module_here:f", "cannot be imported"),
        ("factories_of_a_test:none", "cannot be imported"),
        ("factories_of_a_test:wrong", "returned int"),
    ],
)
@pytest.mark.parametrize("command", ["check", "suggest"])
def test_commands_refuse_what_is_no_factory(factories, capsys, name, message, command):
    """What does not name a factory, or returns something else, is one line and status 1."""
    assert main([command, name]) == 1
    assert message in capsys.readouterr().err


def test_suggested_source_is_an_adapter(factories, capsys, tmp_path):
    """What ``suggest`` prints is a module whose hook claims the model, and the kit passes on it."""
    assert main(["suggest", f"{factories}:pair", "--name", "mine"]) == 0
    source = capsys.readouterr().out
    path = tmp_path / "suggested.py"
    path.write_text(source)
    scope: dict = {}
    exec(compile(source, str(path), "exec"), scope)

    class Plugin:
        @hookimpl
        def skipcache_backbone(self, transformer):
            return scope["skipcache_backbone"](transformer)

    case = AdapterCase(Forgetful, forgetful_inputs, adapter=Plugin())
    assert case.backbone.name == "mine"
    assert case.backbone.lists == (BOTH,)
    assert not [r for r in results_of(case).values() if r.startswith("failed")]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,I", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert textwrap.dedent(source) == source
