"""A boundary carries tensors, and gradients back, in whatever structure a block returned them."""

import json
from collections import OrderedDict, defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten
from transformers.modeling_outputs import BaseModelOutput

from fedsplit.errors import FedsplitError
from fedsplit.models import Boundary

leaves = st.one_of(st.none(), st.integers(0, 4).map(lambda size: torch.arange(float(size))))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
        st.dictionaries(st.integers(-9, 9), inner, max_size=3),
    ),
    max_leaves=8,
)


@given(trees)
@settings(max_examples=60, deadline=None)
def test_unpack_returns_what_was_packed(tree: object) -> None:
    boundary = Boundary.pack(tree)
    restored = Boundary(boundary.tensors, json.loads(json.dumps(boundary.layout))).unpack()
    expected, got = tree_flatten(tree), tree_flatten(restored)
    assert got[1] == expected[1]
    for before, after in zip(expected[0], got[0], strict=True):
        assert before is after


def _node(kind: str, context: object, *children: object) -> str:
    """Return a layout of torch's own making, which names types to import and call."""
    node = {"type": kind, "context": json.dumps(context), "children_spec": list(children)}
    return json.dumps({"tree": [1, node], "filled": [True]})


LEAF = {"type": None, "context": None, "children_spec": []}
HOSTILE = {
    "nothing": "",
    "no JSON": "nonsense",
    "null": "null",
    "text": '"tuple"',
    "true": "true",
    "a fraction": "1.0",
    "another number": "2",
    "an empty list": "[]",
    "an unknown container": '["set",1]',
    "a container that is no text": "[[],1]",
    "a path": '["os.abort",1]',
    "numbered without keys": '["numbered"]',
    "numbered by text": '["numbered",["3"],1]',
    "numbered by truth": '["numbered",[true],1]',
    "numbered twice": '["numbered",[3,3],1,0]',
    "more numbers than items": '["numbered",[3,4],1]',
    "more items than numbers": '["numbered",[3],1,0]',
    "a defaultdict that imports": _node(
        "collections.defaultdict",
        {"default_factory_module": "os", "default_factory_name": "abort", "dict_context": []},
    ),
    "an enum that imports": _node("collections.OrderedDict", ["os", "abort"], LEAF),
    "a named tuple that imports": _node("collections.namedtuple", {"class_name": "os.abort"}),
    "a data class that imports": _node("dataclasses.dataclass", {"class_name": "os.abort"}, LEAF),
    "an enum in the context": json.dumps(
        [1, {"type": "builtins.dict", "context": {"__enum__": True, "fqn": "os:abort"}}]
    ),
    "torch's own form of a tensor": json.dumps({"tree": [1, LEAF], "filled": [True]}),
    "nine levels": '["list",' * 9 + "1" + "]" * 9,
    "as deep as JSON goes": '["list",' * 20_000 + "1" + "]" * 20_000,
    "brackets without end": "[" * 60_000,
    "a thousand nodes": json.dumps(["list", 1, *[0] * 1100]),
    "a long number": "1" * 5000,
}


@pytest.mark.parametrize("layout", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_layout_that_is_none_is_refused_in_one_line_and_runs_nothing(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.abort", lambda: pytest.fail("a layout was executed"))
    with pytest.raises(FedsplitError, match="layout") as caught:
        Boundary((torch.zeros(2),), layout).unpack()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "value",
    [
        OrderedDict(x=torch.zeros(1)),
        defaultdict(list, x=torch.zeros(1)),
        BaseModelOutput(torch.zeros(1)),
        {3: torch.zeros(1), "x": torch.zeros(1)},
        {3.0: torch.zeros(1)},
        {True: torch.zeros(1)},
    ],
    ids=lambda value: type(value).__name__,
)
def test_tensors_in_other_containers_do_not_cross(value: object) -> None:
    with pytest.raises(FedsplitError, match="lists, tuples or dicts"):
        Boundary.pack(value)


def test_a_layout_for_another_number_of_tensors_is_refused() -> None:
    two = Boundary.pack((torch.zeros(1), torch.zeros(1)))
    for tensors in (two.tensors[:1], two.tensors * 2):
        with pytest.raises(FedsplitError, match="layout"):
            Boundary(tensors, two.layout).unpack()


def test_gradients_cross_as_if_there_were_no_cut() -> None:
    weight = torch.tensor([2.0, -1.0], requires_grad=True)
    sent = Boundary.pack((weight.sin(), None, weight * 3))
    received = sent.leaf()
    (received.tensors[0] * received.tensors[1]).sum().backward()
    sent.backward(received.gradients())
    crossed = weight.grad
    weight.grad = None
    (weight.sin() * (weight * 3)).sum().backward()
    assert crossed is not None
    assert torch.equal(crossed, weight.grad)


def test_tensors_outside_any_graph_are_passed_over() -> None:
    Boundary.pack(torch.zeros(3)).backward([torch.ones(3)])


def test_wrong_gradients_are_refused() -> None:
    boundary = Boundary.pack(torch.zeros(3, requires_grad=True) * 2)
    with pytest.raises(FedsplitError, match="one for each"):
        boundary.backward([])
    with pytest.raises(FedsplitError, match="shape"):
        boundary.backward([torch.ones(4)])
