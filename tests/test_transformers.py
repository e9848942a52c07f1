"""The conformance kit over every transformer of diffusers, with the adapters that come with
skipcache.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from pathlib import Path

import diffusers.models.transformers as host
import pytest
from diffusers import ModelMixin
from torch import nn

from skipcache import Backbone, Zipped
from skipcache.errors import AdapterError
from skipcache.plugins import default_registry, resolve_backbone
from skipcache.testing import AdapterCase, Check
from skipcache.testing.checks import CHECKS
from skipcache.testing.guess import guess_backbone
from tiny import TINY

# Of Mochi and of models with flex attention, on the CPU.
pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:\\s*flex_attention called without torch.compile"),
]

TRACED = Path(__file__).parents[2] / "shared" / "reference" / "diffusers-transformers.md"


@functools.cache
def case_of(name: str) -> AdapterCase:
    tiny = TINY[name]
    other = functools.partial(tiny.inputs, batch=2) if tiny.batches else None
    return AdapterCase(tiny.make, tiny.inputs, other)


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("function", CHECKS, ids=lambda function: function.__name__)
def test_conformance(name, function):
    """Every transformer passes every check, with the installed adapter that claims it."""
    Check(function.__name__, function, case_of(name))()


def claimed() -> set[str]:
    claims = [claim for adapter in default_registry().adapters() for claim in adapter.claims]
    return {
        claim.split()[0].rpartition(".")[2] for claim in claims if claim.startswith("diffusers")
    }


def refused() -> dict[str, str]:
    return {
        name: reason
        for adapter in default_registry().adapters()
        for name, reason in adapter.refusals.items()
    }


def transformers_of_the_host() -> set[str]:
    """Every class of diffusers.models.transformers that is a whole model."""
    found = set()
    for module in pkgutil.iter_modules(host.__path__):
        for name, kind in vars(importlib.import_module(f"{host.__name__}.{module.name}")).items():
            is_own = getattr(kind, "__module__", "").endswith(f".{module.name}")
            if is_own and isinstance(kind, type) and issubclass(kind, ModelMixin):
                found.add(name)
    return found


def test_every_transformer_of_the_host_is_claimed_or_refused():
    """None is forgotten: an adapter claims it, and a tiny one is checked above, or one says in a
    sentence why it cannot be cached.
    """
    names = transformers_of_the_host()
    assert len(names) > 70
    assert not names - claimed() - refused().keys()
    assert not claimed() & refused().keys()
    assert claimed() <= TINY.keys()
    assert all(re.fullmatch(r"[A-Z].*\.", reason) for reason in refused().values())


@pytest.mark.skipif(not TRACED.exists(), reason="the list of traced transformers is not here")
def test_every_traced_transformer_is_claimed_or_refused():
    """All traced in the reference list; those on which another cache was exact are claimed."""
    text = TRACED.read_text()
    names = re.findall(r"^## (\w+)", text, re.MULTILINE)
    assert len(names) > 50
    assert set(names) <= claimed() | refused().keys()
    exact = re.findall(r"^## (\w+)[^#]*?FirstBlockCache same", text, re.MULTILINE)
    exact += re.findall(r"^## (\w+)[^#]*?MagCache same", text, re.MULTILINE)
    assert len(set(exact)) >= 13
    assert set(exact) - {"TransformerTemporalModel"} <= claimed()


@pytest.mark.parametrize("name", sorted(refused()))
def test_refusal_is_told_when_applied(name):
    """Who applies a cache to a class that cannot be cached reads why."""
    model = type(name, (nn.Module,), {})()
    with pytest.raises(AdapterError, match=re.escape(refused()[name][:40])):
        resolve_backbone(model, None)


# What the guess does not find, and why.
NOT_GUESSED = {
    "HunyuanDiT2DModel": "its skips go past what flows from block to block",
    "WanVACETransformer3DModel": "the control branch has more weights than the blocks",
    "WanAnimateTransformer3DModel": "the face adapters between the blocks",
    "MotifVideoTransformer3DModel": "the decoder begins anew at the noisy video",
}


def said_by(backbone: Backbone) -> list:
    """Of each list: its path, the tensors that flow, as a set, and what a block returns."""
    return [
        [
            (spec.path, set(spec.takes), spec.returns, spec.blocks_per_layer)
            for spec in (entry.lists if isinstance(entry, Zipped) else (entry,))
        ]
        for entry in backbone.lists
    ]


@pytest.mark.parametrize("name", sorted(TINY.keys() - NOT_GUESSED.keys()))
def test_guess_reproduces_the_adapter(name):
    """One traced forward finds what the adapter says: lists, order, tensors and width."""
    transformer, own = TINY[name].make(), case_of(name).backbone
    found = guess_backbone(transformer, TINY[name].inputs(0))
    assert said_by(found) == said_by(own)
    assert own.hidden_size in (None, found.hidden_size) or set(own.lists[0].takes) != {
        found.lists[0].takes[0]
    }


@pytest.mark.parametrize("name", NOT_GUESSED)
def test_guess_refuses_rather_than_be_wrong(name):
    """Where the trace does not tell enough, nothing is proposed that fails a check."""
    with pytest.raises(AdapterError, match="cannot be guessed"):
        guess_backbone(TINY[name].make(), TINY[name].inputs(0))
