"""Adapters that do not fit a frame travel in parts."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.transport.frames import FrameError, Limits
from fedsplit.transport.tensors import adapter_parts

_LIMITS = Limits(frame_bytes=80, tensors=3)
ROOM_BYTES = _LIMITS.frame_bytes // 2


@settings(deadline=None)
@given(st.lists(st.integers(0, ROOM_BYTES // 4), max_size=12))
def test_parts_are_all_of_them_in_order_and_as_full_as_a_frame_allows(sizes: list[int]) -> None:
    adapters = {f"adapter {i}": torch.full((size,), float(i)) for i, size in enumerate(sizes)}
    parts = list(adapter_parts(adapters, _LIMITS))
    assert [name for part in parts for name in part] == list(adapters)
    held = [sum(tensor.nbytes for tensor in part.values()) for part in parts]
    assert all(size <= ROOM_BYTES for size in held)
    assert all(len(part) <= _LIMITS.tensors for part in parts)
    for size, (before, after) in zip(held, pairwise(parts), strict=False):
        first = next(iter(after.values())).nbytes
        assert size + first > ROOM_BYTES or len(before) == _LIMITS.tensors


def test_one_that_fits_no_frame_is_refused_by_name() -> None:
    with pytest.raises(FrameError, match=r"adapter 'wide' bytes=44: must be at most 40"):
        list(adapter_parts({"wide": torch.zeros(11)}, _LIMITS))


def test_nothing_is_one_empty_part() -> None:
    assert list(adapter_parts({}, _LIMITS)) == [{}]
