"""The import graph and the public surface: what importing skipcache costs, and what its names
promise.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import skipcache

PACKAGE = Path(skipcache.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lowest first; a module may import from layers at or below its own (architecture.md, section 7).
LAYERS = [
    {
        "errors",
        "config",
        "backbone",
        "presets",
        "schedules",
        "estimators",
        "branches",
        "recipes",
        "targets",
        "latte_class",
    },
    {"hookspecs", "plugins", "runtime"},
    {"api"},
    {
        "retrofit",
        "fit",
        "recorder",
        "walks",
        "official",
        "calibrate",
        "listening",
        "measure",
        "refine",
        "sampler",
        "explain",
    },  # of branches and recipes: they need the functions of api
    {"training", "evaluation", "testing", "demo"},
    {"cli", "__main__"},
]
# The front door opens onto the guess, which stands on the checks, and these on the front door.
UPWARD = {("api", "skipcache.testing.auto")}
PROTOCOLS = {
    "skipcache.schedules": {"AdaptiveSchedule", "Miss", "Progress", "Schedule"},
    "skipcache.estimators": {"Estimator", "PlannedEstimator", "Refresh", "Tensors"},
}


def imports_of(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import in the file, wherever it stands; name is empty for ``import
    module``.
    """
    found = []
    package = ["skipcache", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found += [(module, alias.name) for alias in node.names]
    return found


def part_of(module: str) -> str:
    """The first name below skipcache: ``skipcache.runtime.clock`` is part of ``runtime``. Of
    branches and recipes, those that stand above api are parts of their own.
    """
    names = [*module.split("."), "", ""]
    is_higher = names[1] in {"branches", "recipes"} and names[2] in LAYERS[3]
    return names[2] if is_higher else names[1]


def own_part(path: Path) -> str:
    return part_of(".".join(["skipcache", *path.relative_to(PACKAGE).with_suffix("").parts]))


def own_imports(path: Path) -> list[tuple[str, str]]:
    """Imports of skipcache's own modules; ``from skipcache import plugins`` counts as the
    module.
    """
    found = []
    for module, name in imports_of(path):
        is_module = (PACKAGE / name / "__init__.py").exists() or (PACKAGE / f"{name}.py").exists()
        if module == "skipcache" and name and is_module:
            found.append((f"skipcache.{name}", ""))
        elif module.split(".")[0] == "skipcache":
            found.append((module, name))
    return found


def layer_of(part: str) -> int:
    if not part:
        return 3  # public names from the package itself: for whoever stands above api
    return next((i for i, layer in enumerate(LAYERS) if part in layer), len(LAYERS))


TORCH = {"torch", "numpy"}


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [("import skipcache", set()), ("from skipcache import *", TORCH)],  # some names are modules
)
def test_import_is_light(statement, allowed):
    """Importing skipcache imports nothing heavy and loads no plugin; all public names together
    import torch and nothing more.
    """
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    roots = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert "skipcache" in roots
    heavy = {
        "torch",
        "diffusers",
        "transformers",
        "matplotlib",
        "accelerate",
        "numpy",
        "safetensors",
    }
    assert not roots & heavy - allowed
    assert "skipcache_adapters" not in roots


def test_public_names_are_sorted_and_there():
    """__all__ is sorted, without repetition, and every name in it exists."""
    assert list(skipcache.__all__) == sorted(set(skipcache.__all__))
    assert [name for name in skipcache.__all__ if not hasattr(skipcache, name)] == []
    assert skipcache.__version__


def test_nothing_public_is_left_out():
    """Every name that the package imports from its modules is in __all__."""
    found = imports_of(PACKAGE / "__init__.py")
    names = {name for module, name in found if module.startswith("skipcache.")}
    assert names == set(skipcache.__all__)


@pytest.mark.parametrize("name", skipcache.__all__)
def test_public_names_have_docstrings(name):
    """Every public name has a docstring of its own."""
    thing = getattr(skipcache, name)
    doc = thing.__doc__ if inspect.isclass(thing) else inspect.getdoc(thing)
    assert doc
    assert not doc.startswith(f"{name}(")  # what a dataclass makes up for itself


PUBLIC_FUNCTIONS = [n for n in skipcache.__all__ if inspect.isfunction(getattr(skipcache, n))]


@pytest.mark.parametrize("name", PUBLIC_FUNCTIONS)
def test_public_functions_document_their_arguments(name):
    """Every argument of a public function is listed under Args, and nothing else is."""
    function = getattr(skipcache, name)
    doc = inspect.getdoc(function)
    assert "\nArgs:\n" in doc
    section = re.split(r"\n(?=\S)", doc.split("\nArgs:\n", 1)[1])[0]
    listed = re.findall(r"^ {4}\**(\w+):", section, flags=re.MULTILINE)
    parameters = list(inspect.signature(function).parameters)
    expected = [p for p in parameters if p != "unknown"]  # collects misspelt options to refuse them
    assert listed == expected


def test_the_package_has_modules_to_check():
    """The checks below look at the real tree."""
    assert {own_part(path) for path in MODULES} >= {"__init__", "api", "runtime", "schedules"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_imports_an_adapter(path):
    """Nothing in skipcache imports an adapter."""
    assert not [m for m, _ in imports_of(path) if m.split(".")[0] == "skipcache_adapters"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_layering(path):
    """Every module imports from its own layer or a lower one only, but for one import."""
    part = own_part(path)
    if part == "__init__":
        return
    level = layer_of(part)
    assert level < len(LAYERS), f"{part} has no place in the layering"
    above = {m for m, _ in own_imports(path) if layer_of(part_of(m)) > level}
    assert not {(part, module) for module in above} - UPWARD


RUNTIME = [path for path in MODULES if own_part(path) == "runtime"]


@pytest.mark.parametrize("path", RUNTIME, ids=lambda p: p.name)
def test_runtime_stands_on_its_own(path):
    """The hot path imports torch and the leaf modules only, and of the policies only their
    protocols.
    """
    for module, name in own_imports(path):
        assert part_of(module) in LAYERS[0] - {"config"} | {"runtime"}, module
        if module in PROTOCOLS:
            assert name in PROTOCOLS[module], f"{module}.{name}"
    outside = {m.split(".")[0] for m, _ in imports_of(path)} - {"skipcache"}
    assert outside <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_leaf_modules_import_leaf_modules(path):
    """errors, config, backbone, schedules, estimators and branches import one another and nothing
    above.
    """
    if own_part(path) in LAYERS[0]:
        assert {part_of(module) for module, _ in own_imports(path)} <= LAYERS[0]


def test_schedules_never_mention_torch():
    """schedules.py has no import of torch, not even a deferred one."""
    roots = {module.split(".")[0] for module, _ in imports_of(PACKAGE / "schedules.py")}
    assert not roots & {"torch", "numpy", "diffusers"}
