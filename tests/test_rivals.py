"""The rivals of the benchmark: where each runs, what it leaves out, what it says where it cannot.

``WHERE`` has a line for every rival, and in it every subject: a change of diffusers or cache-dit
that makes one run, or not run any more, fails here.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import json
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from torch import nn

import pipelines
from skipcache.demo import load_pipeline
from skipcache.evaluation.bench.diffusers_rivals import (
    MagRatios,
    diffusers_cache,
    faster_cache,
    first_block_cache,
    mag_cache,
    pyramid_attention_broadcast,
    taylor_seer,
)
from skipcache.evaluation.bench.methods import Method, Unavailable
from skipcache.evaluation.bench.rivals import cache_dit_methods, db_cache, paper_methods, rivals
from skipcache.evaluation.bench.surgery import Calls, give_cache_mixin
from skipcache.evaluation.metrics import psnr
from tiny import TINY, randn

# The benchmark ignores what others' code warns of while they sample.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore:torch.meshgrid")

STEPS = 14
HAS_CACHE_DIT = importlib.util.find_spec("cache_dit") is not None
needs_cache_dit = pytest.mark.skipif(not HAS_CACHE_DIT, reason="cache-dit is not installed")


# Subjects


def flux() -> FluxPipeline:
    """One pass, in contexts that the pipeline names."""
    return FluxPipeline(
        transformer=TINY["FluxTransformer2DModel"].make(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(("vae", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")),
    )


def wan() -> WanPipeline:
    """Two passes, in contexts that the pipeline names."""
    return WanPipeline(
        transformer=TINY["WanTransformer3DModel"].make(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        **dict.fromkeys(("vae", "tokenizer", "text_encoder")),
    )


OWN_CALLS: dict[str, dict[str, Any]] = {
    "flux": {
        "prompt_embeds": randn(1, 1, 5, 12),
        "pooled_prompt_embeds": randn(2, 1, 8),
        "height": 64,
        "width": 64,
    },
    "wan": {
        "prompt_embeds": randn(1, 1, 5, 10),
        "negative_prompt_embeds": randn(2, 1, 5, 10),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "guidance_scale": 3.0,
    },
}


def make(subject: str) -> Any:
    if subject not in OWN_CALLS:
        return pipelines.build(subject)
    torch.manual_seed(0)
    pipe = {"flux": flux, "wan": wan}[subject]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, steps: int = STEPS) -> torch.Tensor:
    """The latents that a call ends with."""
    own = {FluxPipeline: "flux", WanPipeline: "wan"}
    names = [name for kind, name in own.items() if isinstance(pipe, kind)]
    if not names:
        return pipelines.sample(pipe, steps)
    generator = torch.Generator().manual_seed(0)
    return pipe(
        **OWN_CALLS[names[0]],
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
        return_dict=False,
    )[0]


@contextlib.contextmanager
def counted_work(pipe: Any) -> Iterator[list[int]]:
    """How many samples each linear layer of a block is given, in all, as the one number of a list.

    Forward hooks of a block itself tell nothing: the rivals replace the forward of a block.
    """
    work = [0]

    def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        work[0] += len(args[0])

    linears = {
        module
        for blocks in pipelines.block_lists(pipe.transformer)
        for module in blocks.modules()
        if isinstance(module, nn.Linear)
    }
    handles = [linear.register_forward_hook(count) for linear in linears]
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


# Methods, at settings that these models of random weights let reuse

METHODS: dict[str, Method] = {
    "DBCache": db_cache(1, 10.0, warmup_steps=4),
    "DBCache + TaylorSeer": db_cache(1, 10.0, warmup_steps=4, has_taylor_seer=True),
    "FirstBlockCache": first_block_cache(10.0),
    "MagCache": mag_cache(MagRatios(sample), 10.0, 3),
    "TaylorSeer, attention": taylor_seer(3, "attention"),
    "TaylorSeer, sublayers": taylor_seer(3, "sublayers"),
    "TaylorSeer, output": taylor_seer(3, "output"),
    "PyramidAttentionBroadcast": pyramid_attention_broadcast(3, 3, 3),
    "FasterCache": faster_cache(5),
    "FORA-style": paper_methods(quick=True)[0],
    "DeepCache-style": paper_methods(quick=True)[1],
}

RUNS = ""
NOT_REGISTERED = "ValueError: Model class <class '{}'> not registered."
NOT_OFFICIAL = "ValueError: {} is not officially supported by cache-dit"
NOTHING = "TaylorSeerCacheConfig found nothing to hook in {} (and said nothing)."
HUNYUAN = NOT_REGISTERED.format(
    "diffusers.models.transformers.hunyuan_transformer_2d.HunyuanDiTBlock"
)
LATTE_CLASS = NOT_REGISTERED.format("skipcache.latte_class.transformer.LatteClassBlock")
# FirstBlockCache and MagCache subtract what flows between frames from what flows within them.
LAYOUTS = RuntimeError("must match the size of tensor b")
UNBATCHED = IndexError(
    "tuple index out of range"
)  # it halves a batch, and guidance makes two calls

SUBJECTS = ("dit", "pixart", "flux", "wan", "hunyuan_dit", "latte", "latte_class")

_DB_CACHE = (
    *(RUNS,) * 5,
    NOT_OFFICIAL.format("LattePipeline"),
    NOT_OFFICIAL.format("LatteClassPipeline"),
)
WHERE: dict[str, tuple[str | Exception, ...]] = {
    "DBCache": _DB_CACHE,
    "DBCache + TaylorSeer": _DB_CACHE,
    "FirstBlockCache": (*(RUNS,) * 4, HUNYUAN, LAYOUTS, LATTE_CLASS),
    "MagCache": (*(RUNS,) * 4, HUNYUAN, LAYOUTS, LATTE_CLASS),
    "TaylorSeer, attention": (
        NOTHING.format("DiTTransformer2DModel"),
        NOTHING.format("PixArtTransformer2DModel"),
        RUNS,
        NOTHING.format("WanTransformer3DModel"),
        NOTHING.format("HunyuanDiT2DModel"),
        NOTHING.format("LatteTransformer3DModel"),
        NOTHING.format("LatteClassTransformer3DModel"),
    ),
    "TaylorSeer, sublayers": (RUNS,) * 7,
    "TaylorSeer, output": (RUNS,) * 7,
    "PyramidAttentionBroadcast": (RUNS,) * 7,
    "FasterCache": (*(RUNS,) * 3, UNBATCHED, *(RUNS,) * 3),
    "FORA-style": (*(RUNS,) * 4, "the skip branch of layer 5 of 'hunyuan_dit'", RUNS, RUNS),
    "DeepCache-style": (*(RUNS,) * 3, "leave nothing to skip", *(RUNS,) * 3),
}
"""A message says why it is unavailable; an error is what its sampling raises."""


def pairs(kind: Callable[[str | Exception], bool]) -> list[Any]:
    return [
        pytest.param(
            method,
            subject,
            marks=[needs_cache_dit] if method.startswith("DBCache") else [],
            id=f"{method}-{subject}",
        )
        for method, line in WHERE.items()
        for subject, found in zip(SUBJECTS, line, strict=True)
        if kind(found)
    ]


def found(method: str, subject: str) -> Any:
    return WHERE[method][SUBJECTS.index(subject)]


def leftovers(pipe: Any) -> dict[str, Any]:
    """What a method could leave behind on a pipeline, its class and its transformer: compared
    before and after, of a pipeline that has sampled before, as that sets attributes.
    """
    kind, model = type(pipe), pipe.transformer
    return {
        **pipelines.surroundings(pipe),
        "class": kind,
        "class keys": sorted(vars(kind)),
        "call": kind.__call__,
        "module keys": [sorted(vars(module)) for module in model.modules()],
        "module types": [type(module) for module in model.modules()],
    }


@pytest.mark.parametrize(("name", "subject"), pairs(lambda found: found == RUNS))
def test_leaves_work_out_and_leaves_nothing_behind(name, subject, capsys):
    """Where it runs it computes less, gives another picture, the same twice, and is silent; taken
    off, the pipeline is as before, and the one that was copied never noticed.
    """
    original, method = make(subject), METHODS[name]
    pipe = copy.deepcopy(original)
    with counted_work(pipe) as everything:
        uncached = sample(pipe)
    assert torch.equal(sample(original), uncached)
    before, untouched = leftovers(pipe), leftovers(original)
    with method.applied(pipe, STEPS):
        with counted_work(pipe) as work:
            first = sample(pipe)
        assert torch.equal(sample(pipe), first)  # nothing crosses from one run to the next
        assert torch.equal(sample(original), uncached)
        assert leftovers(original) == untouched
    assert torch.isfinite(first).all()
    assert not torch.equal(first, uncached)
    assert work[0] < 0.95 * everything[0]
    assert leftovers(pipe) == before
    assert torch.equal(sample(pipe), uncached)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "subject"), pairs(lambda found: isinstance(found, str) and found != RUNS)
)
def test_refusal_is_passed_on(name, subject):
    """Where it refuses a model, its own message says so, and nothing stays behind."""
    pipe = make(subject)
    uncached = sample(pipe)
    before = leftovers(pipe)
    with (
        pytest.raises(Unavailable) as refused,
        METHODS[name].applied(pipe, STEPS),
    ):
        pass
    assert found(name, subject) in str(refused.value)
    assert leftovers(pipe) == before
    assert torch.equal(sample(pipe), uncached)


@pytest.mark.parametrize(("name", "subject"), pairs(lambda found: isinstance(found, Exception)))
def test_failure_leaves_nothing_behind(name, subject):
    """Where it accepts a model that it cannot run, the error comes through, and the pipeline is
    whole.
    """
    pipe, error = make(subject), found(name, subject)
    uncached = sample(pipe)
    before = leftovers(pipe)
    with (
        pytest.raises(type(error), match=str(error)),
        METHODS[name].applied(pipe, STEPS),
    ):
        sample(pipe)
    assert leftovers(pipe) == before
    assert torch.equal(sample(pipe), uncached)


def test_every_rival_gives_sane_pictures():
    """On the trained demo model at its middle setting, none but those named is unavailable, and
    each picture is near the uncached one.
    """
    pipe = load_pipeline()

    def pictures(pipe: Any, steps: int) -> torch.Tensor:
        return pipe(
            class_labels=[9],
            num_inference_steps=steps,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            return_dict=False,
        )[0]

    uncached = pictures(pipe, 20)
    for method in rivals(quick=True, sample=pictures):
        if method.family == "cache-dit" and not HAS_CACHE_DIT:
            continue
        with method.applied(pipe, 20):
            similarity = psnr(pictures(pipe, 20), uncached)
        assert torch.as_tensor(similarity).min() > 20, method.name
    assert torch.equal(pictures(pipe, 20), uncached)


def test_cache_dit_is_missing(monkeypatch):
    """Without it the methods are made as ever, and each says which package is missing."""
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    methods = cache_dit_methods()
    assert methods
    for method in methods:
        with (
            pytest.raises(Unavailable, match="pip install cache-dit"),
            method.applied(make("dit"), STEPS),
        ):
            pass


@pytest.fixture
def install(monkeypatch, tmp_path) -> Iterator[Callable[[str], None]]:
    """Puts a module of that source in cache-dit's place."""

    def put(source: str) -> None:
        (tmp_path / "cache_dit.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "cache_dit", raising=False)

    yield put
    sys.modules.pop("cache_dit", None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ImportError('no such name', name='torch')", "cannot be imported: no such name"),
        ("raise RuntimeError('too old')", "cannot be imported: too old"),
        # Imported, its warning no error of ours, and then of another make.
        ("import warnings; warnings.warn('old')", "AttributeError: module 'cache_dit' has no"),
    ],
)
def test_cache_dit_does_not_fit(install, source, message):
    """One that is installed and cannot be used is not called missing."""
    install(source)
    with pytest.raises(Unavailable, match=message), db_cache(1, 0.1).applied(make("dit"), STEPS):
        pass


@needs_cache_dit
def test_other_pipelines_of_the_class_are_left_alone():
    """cache-dit replaces a class's ``__call__``; here it gets a class of its own to do so."""
    pipe, call = make("dit"), DiTPipeline.__call__
    with METHODS["DBCache"].applied(pipe, STEPS):
        assert type(pipe) is not DiTPipeline
        assert type(pipe).__name__ == "DiTPipeline"
        assert DiTPipeline.__call__ is call
        assert not hasattr(DiTPipeline, "_is_cached")


@needs_cache_dit
def test_model_that_is_too_shallow_for_its_default():
    """Its default computes eight blocks; a model of six has none to leave out."""
    with (
        pytest.raises(Unavailable, match=r"first 8 blocks .* no more than 6: nothing is left"),
        db_cache(8, 0.08).applied(make("dit"), STEPS),
    ):
        pass


@pytest.mark.parametrize("quick", [True, False])
def test_grid(quick):
    """Every method once a setting; a quick grid has one of each; all can be written as JSON."""
    methods = rivals(quick)
    keys = [(method.family, method.name, method.setting) for method in methods]
    assert len(set(keys)) == len(keys)
    assert {family for family, _, _ in keys} == {"cache-dit", "diffusers", "skipcache"}
    names = [name for _, name, _ in keys]
    assert (len(set(names)) == len(names)) == quick
    json.dumps([dict(method.options) for method in methods])
    assert all(m.spoils_pipeline == (m.family != "skipcache") for m in methods)


def test_options_are_what_the_documentation_calls_them():
    """The options in the results are fields of the configurations, but for what they say of the
    calls.
    """
    import diffusers

    kinds = {
        "FirstBlockCache": "FirstBlockCacheConfig",
        "MagCache": "MagCacheConfig",
        "TaylorSeer, sublayers": "TaylorSeerCacheConfig",
        "PyramidAttentionBroadcast": "PyramidAttentionBroadcastConfig",
    }
    for name, kind in kinds.items():
        known = inspect.signature(getattr(diffusers, kind)).parameters
        own = {"cache_context", "current_timestep"}
        assert set(METHODS[name].options) - own <= set(known), name


# What diffusers' caches are told about a call


class Model(nn.Module):
    """Notes the context that each call runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.context: str | None = None
        self.contexts: list[str | None] = []

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        self.context = name
        try:
            yield
        finally:
            self.context = None

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor | None = None) -> None:
        self.contexts.append(self.context)
        if hidden_states.isnan().any():
            raise ValueError("not a number")


def test_context_of_each_call():
    """Passes of a step are told apart where the pipeline does not; its own names are kept."""
    model, latents = Model(), torch.zeros(1)
    calls = Calls(types.SimpleNamespace(), model)
    with calls.watched():
        for timestep in (900, 900, 500, 500):
            model(latents, timestep=torch.tensor([timestep]))
        model(latents, torch.tensor([300, 300]))
        with model.cache_context("cond"):
            model(latents, torch.tensor([300]))
        model(latents)
        assert model.context is None
    passes = ["pass 0", "pass 1", "pass 0", "pass 1", "pass 0", "cond", "pass 0"]
    assert model.contexts == passes
    assert "cache_context" not in vars(model)
    model(latents)
    assert model.contexts[-1] is None


def test_context_is_left_when_a_call_fails():
    """An error inside the transformer leaves no context open."""
    model = Model()
    with Calls(types.SimpleNamespace(), model).watched():
        with pytest.raises(ValueError, match="not a number"):
            model(torch.tensor([float("nan")]), torch.tensor(1))
        assert model.context is None


def test_current_timestep():
    """It is the pipeline's where that has one, else what the transformer was called with."""
    model, pipe = Model(), types.SimpleNamespace()
    calls = Calls(pipe, model)
    with pytest.raises(RuntimeError, match="no call has told any"):
        calls.current_timestep()
    with calls.watched():
        model(torch.zeros(2), timestep=torch.tensor([700, 700]))
        assert calls.current_timestep() == 700
        with model.cache_context("cond"):
            model(torch.zeros(2), torch.tensor(650))
            assert calls.current_timestep() == 650
        pipe.current_timestep = torch.tensor(42)
        assert calls.current_timestep() == 42


def test_mixin_is_given_to_one_model_only():
    """The class keeps its name, and other models of it stay without."""
    from diffusers.models.cache_utils import CacheMixin

    model, other = (pipelines.transformer_of("dit") for _ in range(2))
    give_cache_mixin(model)
    assert isinstance(model, CacheMixin)
    assert type(model).__name__ == type(other).__name__
    assert not isinstance(other, CacheMixin)
    known = pipelines.transformer_of("latte")
    kind = type(known)
    give_cache_mixin(known)
    assert type(known) is kind


# MagCache's calibration


@pytest.mark.parametrize("subject", ["dit", "wan"])
def test_ratios_are_measured_once_for_a_model_and_its_copies(subject):
    """One calibration run for all settings, of as many ratios as steps; guidance in two passes
    prints two lists, of which the documentation says to take the first.
    """
    runs = []

    def counted(pipe: Any, steps: int) -> None:
        runs.append(steps)
        sample(pipe, steps)

    pipe, ratios = make(subject), MagRatios(counted)
    state = torch.get_rng_state()
    measured = ratios.of(pipe, 6)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(measured) == 6
    assert measured[0] == 1.0
    assert ratios.of(copy.deepcopy(pipe), 6) == measured
    assert runs == [6]
    assert len(ratios.of(pipe, 8)) == 8
    other = make(subject)
    with torch.no_grad():
        next(other.transformer.parameters()).add_(0.1)
    ratios.of(other, 6)
    assert runs == [6, 8, 6]


def test_ratios_of_a_pipeline_that_calls_less_often():
    """MagCache prints nothing before its last step: that is said, and no ratios are made up."""
    pipe = make("dit")
    with pytest.raises(Unavailable, match="calibration of 10 steps printed no ratios"):
        MagRatios(lambda pipe, steps: sample(pipe, 4)).of(pipe, 10)


def test_default_calibration_calls_by_class():
    """Without a sampler of the benchmark's, a call with a class label or a prompt is made."""
    method = next(m for m in rivals(quick=True) if m.name == "MagCache")
    pipe = load_pipeline()
    with method.applied(pipe, 4):
        pass


def test_diffusers_without_a_cache(monkeypatch):
    """A release that lacks a cache makes it unavailable, and says so."""
    import diffusers

    monkeypatch.setattr(diffusers, "FirstBlockCacheConfig", None)
    with (
        pytest.raises(Unavailable, match="has no FirstBlockCacheConfig"),
        first_block_cache(0.1).applied(make("dit"), STEPS),
    ):
        pass


def test_pipeline_without_a_transformer():
    """A U-Net's pipeline has nothing that these caches could be put on."""
    with (
        pytest.raises(Unavailable, match="SimpleNamespace has no transformer"),
        diffusers_cache(types.SimpleNamespace(), lambda transformer, calls: None),
    ):
        pass
