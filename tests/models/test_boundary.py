"""A boundary carries tensors, and gradients back, in whatever structure a block returned them."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten

from fedsplit.errors import FedsplitError
from fedsplit.models import Boundary

leaves = st.one_of(st.none(), st.integers(0, 4).map(lambda size: torch.arange(float(size))))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
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


@pytest.mark.parametrize(
    "layout", ["", "{}", "[]", "null", '{"tree": 1, "filled": [true]}', '{"filled": 3}', "nonsense"]
)
def test_damaged_layout_is_refused(layout: str) -> None:
    with pytest.raises(FedsplitError, match="layout"):
        Boundary((torch.zeros(2),), layout).unpack()


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
