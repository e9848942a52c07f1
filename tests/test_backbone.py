"""Where: an adapter's description of a model is validated on its own, before any model is seen."""

from __future__ import annotations

import dataclasses

import pytest

from skipcache import (
    Backbone,
    BlockList,
    InputSize,
    SkipCacheError,
    Timestep,
    WholeCall,
    Zipped,
    is_named,
)
from skipcache.errors import AdapterError

BLOCKS = BlockList("blocks")


def message_of(build) -> str:
    with pytest.raises(AdapterError) as caught:
        build()
    assert isinstance(caught.value, SkipCacheError)
    return str(caught.value)


@pytest.mark.parametrize("path", ["", None, 3, ("blocks",)])
def test_block_list_needs_a_path(path):
    """A block list without an attribute path is refused, with what a path looks like."""
    message = message_of(lambda: BlockList(path))
    assert repr(path) in message
    assert "'transformer_blocks'" in message


@pytest.mark.parametrize("takes", [(), "hidden_states", ("x", "x")])
def test_block_list_needs_distinct_flowing_tensors(takes):
    """Taking nothing, a bare string or one name twice is refused."""
    message = message_of(lambda: BlockList("blocks", takes=takes, returns="x"))
    assert repr(takes) in message
    assert "tuple of distinct parameter names" in message


@pytest.mark.parametrize("returns", ["y", ("x", "y"), (), (None,), ("hidden_states",)])
def test_block_list_returns_only_what_it_takes(returns):
    """What a block returns has to name at least one tensor that it takes, and no other."""
    message = message_of(lambda: BlockList("blocks", takes=("x",), returns=returns))
    assert repr(returns) in message
    assert "('x',)" in message


@pytest.mark.parametrize(
    ("returns", "returned"),
    [("x", ("x",)), (("x",), ("x",)), (("c", "x"), ("c", "x")), ((None, "x"), (None, "x"))],
)
def test_returned_is_always_a_tuple(returns, returned):
    """Bare or tuple, what a block returns reads as a tuple."""
    assert BlockList("blocks", takes=("x", "c"), returns=returns).returned == returned


@pytest.mark.parametrize("lists", [(), (BLOCKS,), (BLOCKS, "temporal_blocks"), (BLOCKS, None)])
def test_zipped_needs_two_block_lists(lists):
    """Fewer than two lists, or something that is no BlockList, cannot be zipped."""
    assert "at least two BlockLists" in message_of(lambda: Zipped(lists))


@pytest.mark.parametrize("count", [0, -1, 1.0, True, None])
def test_a_layer_has_whole_blocks(count):
    """Blocks of a layer are a whole number, at least one."""
    message = message_of(lambda: BlockList("blocks", blocks_per_layer=count))
    assert f"blocks_per_layer={count!r}" in message


def test_zipped_lists_give_one_block_each():
    """A list of several blocks a layer cannot be zipped with another."""
    assert "is 1 in all" in message_of(lambda: Zipped((BLOCKS, BlockList("b", blocks_per_layer=2))))


def test_an_input_size_allows_something():
    """A size that nothing can have is refused, by the argument's name."""
    assert "'x'" in message_of(lambda: InputSize("x", 0, (), "frames"))


@pytest.mark.parametrize(
    ("noise", "clean"),
    [(1.0, 1.0), (float("nan"), 0.0), (1.0, float("nan")), (float("inf"), 0.0), (0.0, 0.0)],
)
def test_timestep_needs_two_different_finite_ends(noise, clean):
    """A time scale whose ends agree or are not finite is refused."""
    message = message_of(lambda: Timestep(noise=noise, clean=clean))
    assert "two different finite numbers" in message
    assert repr(noise) in message


@pytest.mark.parametrize(
    ("scale", "value", "expected"),
    [
        (Timestep(), 1000.0, 1.0),
        (Timestep(), 250.0, 0.25),
        (Timestep(noise=1.0), 0.25, 0.25),
        (Timestep(noise=0.0, clean=1.0), 0.25, 0.75),
        (Timestep(noise=0.0, clean=1000.0), 0.0, 1.0),
    ],
)
def test_timestep_normalises_every_convention(scale, value, expected):
    """t, t / 1000 and 1 - t all come out as 1 at pure noise and 0 at none."""
    assert scale.normalise(value) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["", None, 3])
def test_backbone_needs_a_name(name):
    """A backbone without an id is refused."""
    assert "'dit_xl'" in message_of(lambda: Backbone(name, (BLOCKS,)))


@pytest.mark.parametrize("lists", [(), None, BLOCKS, [BLOCKS], ("blocks",), (BLOCKS, None)])
def test_backbone_needs_a_tuple_of_lists(lists):
    """The lists of a backbone are a tuple of BlockList or Zipped, at least one, and the error says
    so.
    """
    message = message_of(lambda: Backbone("toy", lists))
    assert "'toy'" in message
    assert "tuple of BlockList or Zipped" in message


@pytest.mark.parametrize("timestep", ["timestep", 1000, Timestep])
def test_backbone_timestep_is_a_timestep_or_none(timestep):
    """The time of a backbone is a Timestep or None, nothing else."""
    assert "not a Timestep" in message_of(lambda: Backbone("toy", (BLOCKS,), timestep=timestep))
    assert Backbone("toy", (BLOCKS,), timestep=None).timestep is None


@pytest.mark.parametrize("skip", [(3, 3), (3, 2), (-1, 2)])
def test_native_skip_goes_forward(skip):
    """A native skip that does not lead to a later layer is refused by name."""
    message = message_of(lambda: Backbone("toy", (BLOCKS,), native_skips=((0, 5), skip)))
    assert str(skip) in message
    assert "later one" in message


def test_descriptions_are_frozen_and_comparable():
    """Two equal descriptions are equal and hashable, and none can be changed."""
    first, second = (
        Backbone("toy", (BlockList("a"), Zipped((BlockList("b"), BlockList("c")))))
        for _ in range(2)
    )
    assert first == second
    assert hash(first) == hash(second)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.name = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        BLOCKS.path = "other"


@pytest.mark.parametrize("value", [None, (), ["extract"], {"mode": 1}])
def test_a_whole_call_is_told_by_a_plain_value(value):
    """A value that cannot be compared at once is refused, by the argument's name."""
    assert "'mode'" in message_of(lambda: WholeCall("mode", value))


@pytest.mark.parametrize(
    ("takes", "joins"), [(("x", "c"), ("c", "x")), (("x",), "cx"), (("x", "c"), ("x",))]
)
def test_joins_are_names_for_one_tensor(takes, joins):
    """Only one flowing tensor can be others joined, and these are told by a tuple of names."""
    message = message_of(lambda: BlockList("blocks", takes, takes, joins=joins))
    assert repr(joins) in message
    assert repr(takes) in message


BOTH = BlockList("double", ("x", "c"), ("c", "x"))


@pytest.mark.parametrize(
    ("earlier", "later", "expected"),
    [
        (BOTH, BOTH, ()),
        (BOTH, BlockList("single", ("x",), "x", joins=("c", "x")), (1, 0)),
        (BOTH, BlockList("single", ("x",), "x", joins=("x", "c")), (0, 1)),
        (BOTH, BlockList("single", ("x",), "x", joins=("c", "audio")), None),
        (BOTH, BlockList("single", ("x",), "x"), None),
        (BOTH, BlockList("more", ("x", "c"), ("x", "c")), ()),
        (BOTH, BlockList("more", ("c", "x"), ("c", "x")), None),
        (BlockList("single", ("x",), "x", joins=("c", "x")), BOTH, None),
    ],
)
def test_form_of_an_earlier_list(earlier, later, expected):
    """What flows in two lists is the same, or is joined in the order that the later list names, or
    cannot be compared.
    """
    assert later.form_from(earlier) == expected


def test_is_named_goes_by_class_names():
    """A class counts by its own name and those that it derives from, wherever they are defined."""

    class Foo:
        pass

    class Bar(Foo):
        pass

    assert is_named(Bar(), "Bar")
    assert is_named(Bar(), "Other", "Foo")
    assert not is_named(Foo(), "Bar")
    assert not is_named(Bar(), "Fo")
