"""Averages of adapters: exact, in double precision, and the same wherever they are taken."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.execution import weighted_mean

weights = st.lists(st.integers(1, 10_000), min_size=1, max_size=6)


@given(weights, st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_means_of_means_are_the_mean_of_all(sizes: list[int], seed: int, cut: int) -> None:
    """First at edges, weighted by samples, then over the edges: the flat weighted mean."""
    draw = torch.Generator().manual_seed(seed)
    sets = [{"a": torch.randn(3, 2, generator=draw, dtype=torch.float64)} for _ in sizes]
    flat = sum(size * one["a"] for size, one in zip(sizes, sets, strict=True)) / sum(sizes)
    parts = [part for part in (slice(0, cut), slice(cut, None)) if sizes[part]]
    edges = [weighted_mean(sets[part], sizes[part]) for part in parts]
    found = weighted_mean(edges, [sum(sizes[part]) for part in parts])["a"]
    torch.testing.assert_close(found, flat, rtol=1e-14, atol=1e-14)


def test_a_mean_is_rounded_once() -> None:
    values = torch.tensor([1.0, 2**-24, 2**-24]).float()
    sets = [{"a": value.reshape(1)} for value in values]
    # In single precision the small ones would be lost one by one.
    assert weighted_mean(sets, [1, 1, 1])["a"].item() == torch.tensor((1 + 2**-23) / 3).item()
    halves = [{"a": torch.tensor([1.0], dtype=torch.bfloat16)} for _ in range(2)]
    assert weighted_mean(halves, [1, 2])["a"].dtype == torch.bfloat16


def test_a_single_set_comes_back_as_it_is() -> None:
    value = torch.randn(4)
    assert weighted_mean([{"a": value}], [3])["a"] is value


def test_what_cannot_be_averaged_is_refused() -> None:
    one, other = {"a": torch.ones(1)}, {"b": torch.ones(1)}
    for sets, sizes, complaint in (
        ([], [], "sets=0: must be at least 1"),
        ([one, one], [1], "weights=1: must be 2"),
        ([one, one], [1, 0], "above 0"),
        ([one, other], [1, 1], "must be in every set"),
    ):
        with pytest.raises(FedsplitError, match=complaint):
            weighted_mean(sets, sizes)
