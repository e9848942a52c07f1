"""Binding a description to a model, and the ports through which stand-ins read and write a block's
call.
"""

from __future__ import annotations

import copy
import inspect
import itertools

import pytest
import torch
from torch import nn

from skipcache import (
    Backbone,
    BlockList,
    InputSize,
    MaskSchedule,
    Residual,
    SkipBranches,
    Taylor,
    WholeCall,
    Zipped,
    add_skip_branches,
    apply_skip_cache,
    cache_stats,
    is_skip_cached,
    remove_skip_cache,
    skip_cache_run,
)
from skipcache.errors import AdapterError, BranchError, ConfigError
from skipcache.plugins import resolve_backbone
from skipcache.runtime.blocklist import Ports
from skipcache.runtime.layout import bind
from tiny import TINY

WIDTH = 4


class Plain(nn.Module):
    """A block of one tensor that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x, shift=0.0):
        self.calls += 1
        return x + torch.tanh(self.linear(x)) + shift


class Joint(nn.Module):
    """A block of two tensors, context first in what it returns (SD3, AuraFlow); the last may drop
    it.
    """

    def __init__(self, context_pre_only: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.context_pre_only = context_pre_only
        self.calls = 0

    def forward(self, hidden_states, encoder_hidden_states, temb=None):
        self.calls += 1
        mixed = encoder_hidden_states.mean(1, keepdim=True)
        hidden = hidden_states + torch.tanh(self.linear(hidden_states)) + mixed
        if self.context_pre_only:
            return None, hidden
        return encoder_hidden_states + torch.tanh(hidden.mean(1, keepdim=True)), hidden


class OneList(nn.Module):
    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain() for _ in range(depth))

    def forward(self, x, timestep=None):
        for block in self.blocks:
            x = block(x, 0.5)
        return x


class Nested(nn.Module):
    """The list sits deeper: ``model.body.blocks``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.body = OneList()

    def forward(self, x, timestep=None):
        return self.model.body(x)


class LatteLike(nn.Module):
    """Two lists that advance together."""

    def __init__(self, spatial: int = 4, temporal: int = 4) -> None:
        super().__init__()
        self.spatial = nn.ModuleList(Plain() for _ in range(spatial))
        self.temporal = nn.ModuleList(Plain() for _ in range(temporal))

    def forward(self, x, timestep=None):
        for i, (spatial, temporal) in enumerate(zip(self.spatial, self.temporal, strict=True)):
            x = spatial(x).transpose(0, 1)
            if i == 0:
                x = x + 1.0  # a temporal embedding between the blocks
            x = temporal(x).transpose(0, 1)
        return x


class StableLike(nn.Module):
    """SD3: everything by keyword, an attribute of the block read in the loop, no context from the
    last block.
    """

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Joint(i == depth - 1) for i in range(depth))

    def forward(self, x, timestep=None):
        hidden, context = x, x[:, :2]
        seen = []
        for block in self.transformer_blocks:
            seen.append(block.context_pre_only)
            context, hidden = block(
                encoder_hidden_states=context, hidden_states=hidden, temb=torch.ones(1)
            )
        assert seen == [False] * (len(seen) - 1) + [True]
        assert context is None
        return hidden


class AuraLike(nn.Module):
    """A list that flows two tensors, then one that flows their concatenation."""

    def __init__(self, double: int = 3, single: int = 4) -> None:
        super().__init__()
        self.joint_blocks = nn.ModuleList(Joint() for _ in range(double))
        self.single_blocks = nn.ModuleList(Plain() for _ in range(single))

    def forward(self, x, timestep=None):
        hidden, context = x, x[:, :2] * 0.5
        for block in self.joint_blocks:
            context, hidden = block(hidden, encoder_hidden_states=context)
        joined = torch.cat([context, hidden], dim=1)
        for block in self.single_blocks:
            joined = block(shift=0.1, x=joined)
        return joined[:, context.shape[1] :]


X = BlockList("blocks", takes=("x",), returns="x")
JOINT_TAKES = ("hidden_states", "encoder_hidden_states")
JOINT_RETURNS = ("encoder_hidden_states", "hidden_states")
ONE = Backbone("one", (X,))
NESTED = Backbone("nested", (BlockList("model.body.blocks", ("x",), "x"),))
LATTE = Backbone(
    "latte_like", (Zipped((BlockList("spatial", ("x",), "x"), BlockList("temporal", ("x",), "x"))),)
)
STABLE = Backbone("stable_like", (BlockList("transformer_blocks", JOINT_TAKES, JOINT_RETURNS),))
AURA = Backbone(
    "aura_like",
    (
        BlockList("joint_blocks", JOINT_TAKES, JOINT_RETURNS),
        BlockList("single_blocks", ("x",), "x"),
    ),
)


def replaced(name: str, value: object) -> nn.Module:
    model = OneList()
    if value is None:
        delattr(model, name)
    else:
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("backbone", "model", "parts"),
    [
        (Backbone("toy", (BlockList("layers"),)), OneList(), ["'layers' is nothing"]),
        (Backbone("toy", (BlockList("a.b.c"),)), OneList(), ["'a.b.c' is nothing"]),
        (Backbone("toy", (X,)), replaced("blocks", None), ["'blocks' is nothing"]),
        (
            Backbone("toy", (X,)),
            replaced("blocks", nn.Sequential(Plain())),
            ["a Sequential", "nn.ModuleList"],
        ),
        (Backbone("toy", (X,)), replaced("blocks", Plain()), ["a Plain", "nn.ModuleList"]),
        (Backbone("toy", (X,)), replaced("blocks", nn.ModuleList()), ["'blocks' is empty"]),
        (
            Backbone("toy", (BlockList("blocks"),)),
            OneList(),
            ["Plain.forward", "['x', 'shift']", "['hidden_states']"],
        ),
        (LATTE, LatteLike(4, 3), ["differ in length", "'spatial': 4", "'temporal': 3"]),
        (Backbone("toy", (X,), native_skips=((0, 5),)), OneList(), ["(0, 5)", "last of 5 layers"]),
    ],
)
def test_bind_says_what_does_not_fit(backbone, model, parts):
    """A description that is wrong about the model is an AdapterError naming adapter, model and
    place.
    """
    with pytest.raises(AdapterError) as caught:
        bind(backbone, model)
    for part in [repr(backbone.name), repr(type(model).__name__), *parts]:
        assert part in str(caught.value)


def test_a_failed_bind_leaves_the_model_alone():
    """Applying with a wrong description raises, and leaves the model exactly as it was."""
    model = LatteLike(4, 3)
    before = dict(model.__dict__), [type(m) for m in model.modules()]
    with pytest.raises(AdapterError):
        apply_skip_cache(model, adapter=LATTE)
    assert (dict(model.__dict__), [type(m) for m in model.modules()]) == before
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("backbone", "model", "depth", "firsts"),
    [
        (ONE, OneList(7), 7, [0]),
        (NESTED, Nested(), 5, [0]),
        (LATTE, LatteLike(), 4, [0, 0]),
        (STABLE, StableLike(), 5, [0]),
        (AURA, AuraLike(3, 4), 7, [0, 3]),
    ],
)
def test_bind_counts_layers(backbone, model, depth, firsts):
    """Depth counts layers over all lists in a row, a zipped group counting once."""
    bound = bind(backbone, model)
    assert bound.depth == depth
    assert [entry.first_layer for entry in bound.lists] == firsts


@pytest.mark.parametrize(
    ("front", "back", "is_allowed"),
    [(1, 1, True), (2, 2, True), (2, 1, True), (1, 2, False), (0, 1, False), (2, 3, False)],
)
def test_native_skips_stay_inside_what_runs(front, back, is_allowed):
    """A native skip that starts inside the span and ends behind it is refused, with what
    to change.
    """
    backbone = Backbone("u_shaped", (X,), native_skips=((0, 5), (1, 4), (2, 3)))
    bound = bind(backbone, OneList(6))
    if is_allowed:
        bound.check_layers(front, back, needs_shallow=False)
        return
    with pytest.raises(ConfigError, match="back_layers no larger than front_layers") as caught:
        bound.check_layers(front, back, needs_shallow=False)
    assert f"back_layers={back}" in str(caught.value)
    assert "'u_shaped'" in str(caught.value)


def test_residual_needs_one_form_of_feature():
    """residual cannot compare a two-tensor feature with a concatenated one, and says what can be
    used.
    """
    with pytest.raises(ConfigError, match="estimator='hold' or 'taylor'"):
        apply_skip_cache(AuraLike(), adapter=AURA, estimator="residual")
    apply_skip_cache(AuraLike(), adapter=AURA, estimator="residual", front_layers=3)


NAMES = ("a", "b", "c")


@pytest.mark.parametrize("takes", [p for n in (1, 2, 3) for p in itertools.permutations(NAMES, n)])
@pytest.mark.parametrize("by_position", range(4))
def test_ports_find_tensors_passed_in_any_way(takes, by_position):
    """Ports read and write the flow whether it comes by position or by keyword, in any order."""
    values = {name: torch.full((2,), float(i)) for i, name in enumerate(NAMES)}
    args = tuple(values[name] for name in NAMES[:by_position])
    kwargs = {name: values[name] for name in reversed(NAMES[by_position:])}
    ports = Ports(tuple((name, NAMES.index(name)) for name in takes), (0,), is_bare=True)
    flow = ports.read(args, kwargs)
    assert [id(t) for t in flow] == [id(values[name]) for name in takes]

    fresh = tuple(torch.full((2,), 10.0 + i) for i in range(len(takes)))
    new_args, new_kwargs = ports.write(args, kwargs, fresh)

    def block(a, b, c):
        return {"a": a, "b": b, "c": c}

    expected = {**values, **dict(zip(takes, fresh, strict=True))}
    received = block(*new_args, **new_kwargs)
    assert all(received[name] is expected[name] for name in NAMES)
    assert args == tuple(values[name] for name in NAMES[:by_position])
    assert all(kwargs[name] is values[name] for name in kwargs)


@pytest.mark.parametrize(
    ("returns", "is_bare", "expected"),
    [
        ((0,), True, "x"),
        ((1,), True, "c"),
        ((0,), False, ("x",)),
        ((0, 1), False, ("x", "c")),
        ((1, 0), False, ("c", "x")),
        ((None, 0), False, (None, "x")),
        ((0, None, 1), False, ("x", None, "c")),
    ],
)
@pytest.mark.parametrize("by_keyword", [True, False])
def test_hand_through_has_the_shape_that_the_block_returns(returns, is_bare, expected, by_keyword):
    """A skipped block gives its input, bare or as a tuple, in the returned order, None where None
    belongs.
    """
    ports = Ports((("x", 0), ("c", 1)), returns, is_bare)
    if by_keyword:
        found = ports.hand_through((), {"c": "c", "temb": 0, "x": "x"})
    else:
        found = ports.hand_through(("x", "c"), {"temb": 0})
    assert found == expected


def test_ports_read_none_for_a_tensor_that_is_not_passed():
    """A flowing tensor that the model leaves to its default reads as None and writes by keyword."""
    ports = Ports((("x", 0), ("c", 1)), (0, 1), is_bare=False)
    assert ports.read(("x",), {}) == ("x", None)
    assert ports.read((), {"x": "x", "c": None}) == ("x", None)
    assert ports.hand_through(("x",), {}) == ("x", None)
    assert ports.write(("x",), {}, ("y", None)) == (("y",), {"c": None})


MODELS = {
    "one": (ONE, OneList),
    "nested": (NESTED, Nested),
    "latte_like": (LATTE, LatteLike),
    "stable_like": (STABLE, StableLike),
    "aura_like": (AURA, AuraLike),
}
SPANS = [
    (name, front, back)
    for name, (backbone, make) in MODELS.items()
    for depth in [bind(backbone, make()).depth]
    for front in range(depth - 1)
    for back in range(1, depth - front)
]


def calls_of(model: nn.Module) -> list[int]:
    return [m.calls for m in model.modules() if hasattr(m, "calls")]


@pytest.mark.parametrize(("name", "front", "back"), SPANS)
def test_every_span_of_every_layout(name, front, back):
    """A reuse of the same input gives the same bits, runs only front and back, and carries a change
    across them.
    """
    torch.manual_seed(0)
    backbone, make = MODELS[name]
    model = make().eval()
    plain = copy.deepcopy(model)
    apply_skip_cache(
        model,
        adapter=backbone,
        front_layers=front,
        back_layers=back,
        schedule=MaskSchedule((0,), steps=9),
        estimator="hold",
    )
    depth = bind(backbone, model).depth
    x, other = torch.randn(2, 6, WIDTH), torch.randn(2, 6, WIDTH)
    with torch.no_grad(), skip_cache_run(model):
        expected = plain(x)
        assert torch.equal(model(x), expected)
        assert calls_of(model) == calls_of(plain)
        assert torch.equal(model(x), expected)
        reused = model(other)
    ran = sum(calls_of(model)) - 3 * sum(calls_of(plain))
    per_layer = 2 if name == "latte_like" else 1
    assert ran == -2 * (depth - front - back) * per_layer
    assert torch.equal(reused, expected)  # the back starts at the held feature alone
    stats = cache_stats(model)
    assert stats.plan == "Frr"
    assert stats.layers_run == depth + 2 * (front + back)


@pytest.mark.parametrize("estimator", [Residual(), Taylor(1)], ids=repr)
def test_estimates_of_two_tensors_at_once(estimator):
    """Every flowing tensor is estimated, not only the first: a refresh on a line is continued by
    taylor.
    """
    torch.manual_seed(0)
    model = StableLike().eval()
    plain = copy.deepcopy(model)
    schedule = MaskSchedule((0, 1), steps=9)
    apply_skip_cache(model, adapter=STABLE, schedule=schedule, estimator=estimator, back_layers=2)
    torch.manual_seed(1)
    xs = [torch.randn(1, 6, WIDTH) for _ in range(3)]
    with torch.no_grad(), skip_cache_run(model):
        outputs = [model(x) for x in xs]

    def entering(x: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, context = x, x[:, :2]
        for block in list(plain.transformer_blocks)[:layer]:
            context, hidden = block(hidden, context)
        return hidden, context

    with torch.no_grad():
        shallow, deep = ([entering(x, layer) for x in xs] for layer in (1, 3))
        if estimator == Residual():
            guess = [deep[1][i] + (shallow[2][i] - shallow[1][i]) for i in range(2)]
        else:
            guess = [2 * deep[1][i] - deep[0][i] for i in range(2)]
        hidden, context = guess
        for block in list(plain.transformer_blocks)[3:]:
            context, hidden = block(hidden, context)
        assert torch.allclose(outputs[2], hidden, atol=1e-5)
        assert not torch.allclose(outputs[2], plain(xs[2]), atol=1e-3)


# Several blocks a layer, taken off one list by slices.


class Alternating(nn.Module):
    """Two blocks are one layer, and the forward takes them by slices."""

    def __init__(self, blocks: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain() for _ in range(blocks))

    def forward(self, x, timestep=None, residuals=None, is_open=True):
        for i in range(0, len(self.blocks), 2):
            first, second = self.blocks[i : i + 2]
            x = second(first(x, 0.5).flip(0)).flip(0)
        return x


PAIRS = BlockList("blocks", ("x",), "x", blocks_per_layer=2)


@torch.no_grad()
@pytest.mark.parametrize(("front", "back"), [(0, 1), (1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_of_two_blocks(front, back, compiled):
    """Depth, front and back count layers of two blocks; features are kept and put in between
    layers, never inside one. Compiled as a whole, too.
    """
    torch.manual_seed(0)
    model = Alternating()
    x = torch.randn(2, 3, WIDTH)
    plain = model(x)
    run = torch.compile(model, backend="eager") if compiled else model
    options = {"front_layers": front, "back_layers": back, "estimator": "hold"}
    schedule = MaskSchedule((0,), steps=3)
    apply_skip_cache(model, adapter=Backbone("toy", (PAIRS,)), schedule=schedule, **options)
    assert model.blocks[1] is next(iter(model.blocks[1:2]))  # outside a forward, the real ones
    with skip_cache_run(model):
        outputs = [run(x) for _ in range(3)]
        assert all(torch.equal(output, plain) for output in outputs)
    assert cache_stats(model).plan == "Frr"
    assert cache_stats(model).layers_run == 4 + 2 * (front + back)
    if not compiled:
        for i, block in enumerate(model.blocks):
            is_deep = front <= i // 2 < 4 - back
            assert block.calls == (2 if is_deep else 4)  # the plain forward is one of them


def test_blocks_that_do_not_make_layers():
    """Seven blocks are not layers of two: refused when applied."""
    with pytest.raises(AdapterError, match="7 blocks do not make layers of 2"):
        apply_skip_cache(Alternating(7), adapter=Backbone("toy", (PAIRS,)))


# Sizes that the model was made for.

SIZES = (
    InputSize("x", 1, (3, 5), "tokens", unless_false="is_open"),
    InputSize("residuals", None, (2,), "residuals"),
)


@torch.no_grad()
@pytest.mark.parametrize(
    ("tokens", "more", "kwargs", "says"),
    [
        (3, (), {}, None),
        (5, ([1, 2],), {}, None),
        (4, (), {}, "x has 4 tokens, and this 'toy' model was made for 3 or 5"),
        (4, (), {"is_open": False}, None),
        (4, (None, False), {}, None),
        (4, (), {"is_open": True}, "x has 4 tokens"),
        (3, (), {"residuals": [1]}, "residuals has 1 residuals, .* made for 2"),
        (3, ([],), {}, "residuals has 0 residuals"),
        (3, (), {"residuals": 7}, None),
    ],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_input_sizes(tokens, more, kwargs, says, by_name):
    """Given by position or by name, another size is refused before a block runs; what has no such
    size, and what another argument lifts the rule for, passes.
    """
    model = Alternating()
    apply_skip_cache(model, adapter=Backbone("toy", (PAIRS,), input_sizes=SIZES))
    names = ("x", "timestep", "residuals", "is_open")
    args = (torch.zeros(2, tokens, WIDTH), torch.tensor(500.0), *more)
    if by_name:
        args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
    if says is None:
        assert model(*args, **kwargs).shape == (2, tokens, WIDTH)
    else:
        with pytest.raises(ConfigError, match=says):
            model(*args, **kwargs)
        assert sum(block.calls for block in model.blocks) == 0


def test_sizes_of_a_call_that_is_no_step():
    """Sizes are checked in a call that only fills a cache too: it would fail in the model alike."""
    model = Alternating()
    backbone = Backbone(
        "toy", (PAIRS,), input_sizes=SIZES, whole_calls=(WholeCall("residuals", "fill"),)
    )
    apply_skip_cache(model, adapter=backbone)
    with pytest.raises(ConfigError, match="x has 4 tokens"):
        model(torch.zeros(2, 4, WIDTH), torch.tensor(500.0), "fill")


# One tensor that is two of the list before, joined.

JOINED = Backbone(
    "joined", (AURA.lists[0], BlockList("single_blocks", ("x",), "x", joins=JOINT_RETURNS))
)


def hand_through(block: nn.Module, returned: tuple[str, ...]) -> None:
    """Makes the block one that changes nothing."""
    names = list(inspect.signature(type(block).forward).parameters)[1:]

    def forward(*args, **kwargs):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return tuple(given[name] for name in returned)

    block.forward = forward


def sampled(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output if isinstance(output, torch.Tensor) else output[0]


def joining(name: str):
    """The model whose last two-stream layer changes nothing, its backbone, its inputs by seed, and
    how many two-stream layers it has.
    """
    if name == "toy":
        torch.manual_seed(0)
        model, backbone = AuraLike(), JOINED
        draws = [{"x": torch.randn(2, 6, WIDTH)} for _ in range(2)]
    else:
        model = TINY[name].make()
        backbone, draws = resolve_backbone(model, None), [TINY[name].inputs(i) for i in range(2)]
    double = backbone.lists[0]
    blocks = getattr(model, double.path)
    hand_through(blocks[-1], double.returned)
    return model, backbone, draws, len(blocks)


JOINING = ("toy", "Flux2Transformer2DModel", "ChromaTransformer2DModel")


@pytest.mark.parametrize("name", JOINING)
def test_residual_across_two_lists(name):
    """Where the layers left out change nothing, the two tensors that entered them, joined as the
    adapter says, are what leaves them: so the residual is zero and a reuse of other inputs exact,
    which ``hold`` is not.
    """
    model, backbone, draws, double = joining(name)
    expected = [sampled(model, inputs) for inputs in draws]
    depth = bind(backbone, model).depth
    worst = {}
    for estimator in ("residual", "hold"):
        apply_skip_cache(
            model,
            adapter=backbone,
            front_layers=double - 1,
            back_layers=depth - double,
            schedule=MaskSchedule((0,), steps=2),
            estimator=estimator,
        )
        with skip_cache_run(model):
            found = [sampled(model, inputs) for inputs in draws]
        assert cache_stats(model).plan == "Fr"
        assert torch.equal(found[0], expected[0])
        worst[estimator] = float((found[1] - expected[1]).abs().max())
    assert worst["residual"] < 1e-5 < 0.1 < worst["hold"]


@pytest.mark.parametrize("name", JOINING)
def test_skip_branch_across_two_lists(name):
    """A skip taken in the two-stream layers and merged in a single-stream one is both of its
    tensors, joined: here just what enters the merging layer.
    """
    model, backbone, draws, double = joining(name)
    width = WIDTH if name == "toy" else backbone.hidden_size
    merging = getattr(model, backbone.lists[1].path)[0]
    entered: list[torch.Tensor] = []

    def note(block, args, kwargs):
        entered.append(kwargs.get(backbone.lists[1].takes[0], args[0] if args else None))

    handle = merging.register_forward_pre_hook(note, with_kwargs=True)
    plain = sampled(model, draws[0])
    branches = SkipBranches(width, bind(backbone, model).depth, pairs=((double - 2, double),))
    for parameter in branches.parameters():
        nn.init.normal_(parameter, std=0.3)
    add_skip_branches(model, branches, adapter=backbone)
    merged = sampled(model, draws[0])
    handle.remove()
    with torch.no_grad():
        due = branches.by_target()[double](entered[0], entered[0])
    assert torch.equal(entered[1], due)
    assert not torch.equal(merged, plain)


def test_skip_of_two_forms_is_refused():
    """A source cannot lead to a two-stream layer and to a single-stream one."""
    branches = SkipBranches(WIDTH, 7, pairs=((0, 2), (0, 4)))
    with pytest.raises(BranchError, match="layer 0 is the source of several"):
        add_skip_branches(AuraLike(), branches, adapter=JOINED)


# Where the flow begins anew.


@pytest.mark.parametrize("per_layer", [1, 2])
def test_residual_is_refused_across_a_break(per_layer):
    """Layers on both sides of the block where other tensors begin are not compared; blocks are
    counted, not layers.
    """
    spec = BlockList("blocks", ("x",), "x", blocks_per_layer=per_layer, breaks=(3 * per_layer,))
    bound = bind(Backbone("toy", (spec,)), OneList(5 * per_layer))
    allowed = {
        (front, back)
        for front in range(5)
        for back in range(1, 5 - front)
        if is_allowed(bound, front, back)
    }
    # Resumed at layer 1 or 2, or left off at 3: on one side of the break.
    assert allowed == {(0, 4), (0, 3), (1, 3), (3, 1)}


def is_allowed(bound, front: int, back: int) -> bool:
    try:
        bound.check_layers(front, back, needs_shallow=True)
    except ConfigError:
        return False
    return True


def test_break_inside_a_layer():
    """A break at the second block of a layer is one for what enters the next layer."""
    spec = BlockList("blocks", ("x",), "x", blocks_per_layer=2, breaks=(3,))
    bound = bind(Backbone("toy", (spec,)), OneList(8))
    assert is_allowed(bound, 0, 3)
    assert not is_allowed(bound, 0, 2)
    assert not is_allowed(bound, 1, 2)
    assert is_allowed(bound, 2, 1)


def test_motif_refuses_residual_when_applied():
    """Motif-Video's decoder begins at the noisy video: residual across that is an error of
    ``apply``, and the model is left alone; before it and behind it, and with hold, all is well.
    """
    model = TINY["MotifVideoTransformer3DModel"].make()
    depth = bind(resolve_backbone(model, None), model).depth
    begin = depth - model.num_decoder_layers
    for back in (1, depth - begin):
        with pytest.raises(ConfigError, match="estimator='hold' or 'taylor'"):
            apply_skip_cache(model, estimator="residual", back_layers=back)
        assert not is_skip_cached(model)
    apply_skip_cache(model, estimator="residual", back_layers=depth - begin + 1)
    apply_skip_cache(model, estimator="residual", front_layers=begin, back_layers=1)
    apply_skip_cache(model, estimator="hold")


# Modules between the blocks.


class Interleaving(nn.Module):
    """After every second block a side module, taken by index, adds to what flows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain() for _ in range(6))
        self.sides = nn.ModuleList(Plain() for _ in range(3))

    def forward(self, x, timestep=None):
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i % 2 == 1:
                x = self.sides[i // 2](x, 1.0).to(x.device) + x
        return x


SIDES = Backbone("sides", (X,), interleaved=(BlockList("sides", ("x",), "x"),))


@torch.no_grad()
@pytest.mark.parametrize(
    ("front", "back", "ran"),
    [(1, 1, (1, 1, 3)), (0, 1, (1, 1, 3)), (2, 2, (3, 1, 3)), (3, 1, (3, 1, 3))],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_interleaved_modules(front, back, ran, compiled):
    """On a reuse those between the layers left out do not run, those before and behind them do, and
    the same input gives the same output; compiled as a whole, too. Taken off, nothing is left.
    """
    torch.manual_seed(0)
    model = Interleaving()
    keys = {name: sorted(vars(m)) for name, m in model.named_modules()}
    x = torch.randn(2, 3, WIDTH)
    plain = model(x)
    run = torch.compile(model, backend="eager") if compiled else model
    apply_skip_cache(
        model,
        adapter=SIDES,
        front_layers=front,
        back_layers=back,
        schedule=MaskSchedule((0,), steps=3),
        estimator="hold",
    )
    assert type(model.sides[0]) is Plain  # outside a forward the real ones
    for module in model.modules():
        if isinstance(module, Plain):
            module.calls = 0
    with skip_cache_run(model):
        for _ in range(3):
            torch.testing.assert_close(run(x), plain)
    assert cache_stats(model).plan == "Frr"
    if not compiled:
        assert tuple(side.calls for side in model.sides) == ran
    remove_skip_cache(model)
    if not compiled:  # torch.compile notes things of its own
        assert {name: sorted(vars(m)) for name, m in model.named_modules()} == keys
    assert torch.equal(model(x), plain)


@torch.no_grad()
def test_interleaved_modules_of_a_copy():
    """A copy leaves out its own, and runs its own weights."""
    model, x = Interleaving(), torch.randn(2, 3, WIDTH)
    expected = copy.deepcopy(model)(x)
    schedule = MaskSchedule((0,), steps=2)
    apply_skip_cache(model, adapter=SIDES, schedule=schedule, estimator="hold")
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    with skip_cache_run(twin):
        assert all(torch.equal(twin(x), expected) for _ in range(2))
    assert [side.calls for side in twin.sides] == [1, 1, 2]
    assert [side.calls for side in model.sides] == [0, 0, 0]


@torch.no_grad()
def test_face_adapters_of_wan_animate():
    """Between the layers that a reuse leaves out, the face adapters are left out too, the one in
    the front runs, and a reuse of the same input is exact.
    """
    tiny = TINY["WanAnimateTransformer3DModel"]
    model = tiny.make()
    expected = sampled(model, tiny.inputs(0))
    apply_skip_cache(model, schedule=MaskSchedule((0,), steps=3), estimator="hold")
    ran: list[int] = []
    for i, adapter in enumerate(model.face_adapter):
        adapter.register_forward_hook(lambda *_, i=i: ran.append(i))
    with skip_cache_run(model):
        assert all(torch.equal(sampled(model, tiny.inputs(0)), expected) for _ in range(3))
    assert cache_stats(model).plan == "Frr"
    assert ran == [0, 1, 0, 0]  # one after the first of four layers, one after the third
