"""Rows of samples that a server holds: in memory, in a file, and none but right ones."""

import os
from collections.abc import Sequence

import pytest
import torch

from fedsplit.errors import FedsplitError
from fedsplit.models import Boundary
from fedsplit.transport import Held
from fedsplit.transport.frames import FrameError
from fedsplit.transport.held import read_spans, spans

SHAPE = (3, 5)
ROW = 4 * 15 + 8 * 3


def rows(samples: Sequence[int], width: int = 5) -> tuple[dict[str, torch.Tensor], Boundary]:
    """What samples are at a cut: a number of their own in each place."""
    value = torch.tensor([float(sample) for sample in samples])
    boundary = value[:, None, None].expand(len(samples), 3, width).clone()
    return {"labels": value.long()[:, None].expand(-1, 3)}, Boundary((boundary,), "1")


@pytest.mark.parametrize("memory", [0, 2 * ROW, 100 * ROW], ids=["file", "both", "memory"])
def test_what_was_put_is_taken_in_any_order(memory: int) -> None:
    held = Held(9, memory)
    held.begin("one")
    for part in ([4, 2], [7], [0, 1]):
        assert held.missing([*part, *part]) == tuple(part)
        held.put(part, *rows(part))
    assert held.samples == (0, 1, 2, 4, 7)
    assert held.missing([9, 7]) == (9,)
    for wanted in ([7, 0, 4], [2]):
        inputs, boundary = held.take(wanted)
        expected_inputs, expected = rows(wanted)
        assert torch.equal(inputs["labels"], expected_inputs["labels"])
        assert torch.equal(boundary.tensors[0], expected.tensors[0])
        assert boundary.layout == "1"
    assert held.file_bytes == max(5 * ROW - memory, 0)


def test_what_was_made_with_something_else_is_forgotten() -> None:
    held = Held(9, ROW)
    held.begin("one")
    held.put([1, 2], *rows([1, 2]))
    held.begin("one")
    assert held.samples == (1, 2)
    held.begin("two")
    assert held.samples == ()
    assert held.file_bytes == 0
    held.put([3], *rows([3], width=6))


def test_a_changed_file_is_noticed() -> None:
    held = Held(9, 0)
    held.put([1, 2], *rows([1, 2]))
    os.pwrite(held._file.fileno(), b"\x01", 2)
    assert held.take([2])[1].tensors[0].shape == (1, *SHAPE)
    with pytest.raises(FedsplitError, match="sample 1: its row in the file is not what was"):
        held.take([1])


def test_others_than_the_first_form_and_too_many_are_refused() -> None:
    held = Held(3, 1000)
    held.put([1], *rows([1]))
    with pytest.raises(FrameError, match=r"of one size in all mini-batches .*padding=fixed"):
        held.put([2], *rows([2], width=6))
    with pytest.raises(FrameError, match="a row for each sample"):
        held.put([2, 3], *rows([2]))
    with pytest.raises(FrameError, match="samples=4: must be at most 3"):
        held.put([2, 3, 4], *rows([2, 3, 4]))


@pytest.mark.parametrize("samples", [(), (0,), (0, 1, 2, 5, 6, 9), tuple(range(1000))])
def test_spans_are_read_as_they_were_written(samples: tuple[int, ...]) -> None:
    assert read_spans(spans(samples, 1 << 14)) == set(samples)


def test_spans_that_are_too_many_leave_the_last_out() -> None:
    assert read_spans(spans((0, 2, 3, 8, 10), 4)) == {0, 2, 3}


@pytest.mark.parametrize("edges", [(1,), (5, 2), (0, 1 << 40)])
def test_spans_of_no_sense_are_refused(edges: tuple[int, ...]) -> None:
    with pytest.raises(FrameError, match="samples"):
        read_spans(edges)
