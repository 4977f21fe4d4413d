"""What codecs remember over turns is the same at both ends, whatever became of earlier turns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.codec import Loopback, Remembered
from fedsplit.plan import CodecPlan, Route
from fedsplit.transport import OpenRequest, new_token
from fedsplit.transport.tensors import Stream, TensorCoder

RESIDUAL = {"name": "topk", "keep": 0.3, "bits": 8, "rounding": "nearest"}
TEMPORAL = {
    "name": "temporal", "key": {"name": "bf16"}, "residual": RESIDUAL, "key_every": 100,
    "memory_mb": 0.002, "over_turns": True,
}  # fmt: skip
PLAN = CodecPlan(TEMPORAL, {"name": "identity"})
ROUTE = Route.two_tier(4, 2)
SHAPE = (4, 8)  # 64 bytes a row: 31 fit


def begin(*ends: Remembered, plan: CodecPlan = PLAN, route: Route = ROUTE) -> list[TensorCoder]:
    """Return both ends' codecs at the beginning of a turn."""
    coders = [OpenRequest(new_token(), route, 1, plan, remembered=end).coder() for end in ends]
    first, second = (coder.memory for coder in coders)
    coders[0].agree(second)
    coders[1].agree(first)
    return coders


def rows(at: int) -> torch.Tensor:
    """Return 40 samples' rows, which move a little from turn to turn."""
    draw = torch.Generator().manual_seed(0)
    found = torch.randn((40, *SHAPE), generator=draw)
    return found + 0.05 * at * torch.randn((40, *SHAPE), generator=draw)


turns = st.lists(
    st.tuples(
        st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=8), min_size=1, max_size=3),
        st.booleans(),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


@given(turns)
@settings(max_examples=60, deadline=None)
def test_both_ends_decode_the_same_whatever_either_of_them_lost(turns):
    device, server = Remembered(), Remembered()
    for at, (batches, device_keeps, server_keeps) in enumerate(turns):
        sender, receiver = begin(device, server)
        for samples in batches:
            sent = rows(at)[samples]
            packed = sender.pack(Stream.BOUNDARY_UP, (sent,), samples)
            (received,) = receiver.unpack(Stream.BOUNDARY_UP, packed, samples)
            assert (received - sent).norm() < 0.5 * sent.norm()
        if device_keeps:
            sender.keep()
        if server_keeps:
            receiver.keep()
        if device_keeps and server_keeps:
            (kept,), (also,) = device.streams.values(), server.streams.values()
            assert [(s, e.age) for s, e in kept] == [(s, e.age) for s, e in also]
            assert all(torch.equal(a.row, b.row) for (_, a), (_, b) in zip(kept, also, strict=True))
            assert len(kept) <= 31


def test_turns_of_a_codec_are_one_codec_that_never_ended():
    """As many bytes and the same values as one pair of codecs over all turns."""
    whole, device, server = Loopback(TEMPORAL, 0), Remembered(), Remembered()
    for at in range(4):
        sender, receiver = begin(device, server)
        samples = range(at, at + 20)
        before = whole.n_bytes
        expected = whole.send(rows(at)[samples], samples)
        packed = sender.pack(Stream.BOUNDARY_UP, (rows(at)[samples],), samples)
        (received,) = receiver.unpack(Stream.BOUNDARY_UP, packed, samples)
        assert torch.equal(received, expected)
        assert packed[0].payload.nbytes == whole.n_bytes - before
        sender.keep()
        receiver.keep()


@given(scale=st.sampled_from((1e-30, 1e-3, 1.0, 1e20)), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_without_loss_in_its_parts_a_difference_has_none_but_rounding(scale, seed):
    plain = {"name": "identity"}
    loop = Loopback({**TEMPORAL, "key": plain, "residual": plain}, 0)
    draw = torch.Generator().manual_seed(seed)
    last = torch.zeros(4, *SHAPE)
    for _ in range(3):
        sent = scale * torch.randn((4, *SHAPE), generator=draw)
        received = loop.send(sent, range(4))
        largest = torch.maximum(sent.abs(), last.abs())
        assert ((received - sent).abs() <= 2**-22 * largest).all()
        last = received


@pytest.mark.parametrize(
    "other",
    [
        {"route": Route.two_tier(4, 1)},
        {"plan": CodecPlan({**TEMPORAL, "key_every": 9}, {"name": "identity"})},
    ],
    ids=["cut", "codec"],
)
def test_rows_of_another_cut_or_codec_are_of_no_use(other):
    device, server = Remembered(), Remembered()
    for changes in ({}, other):
        sender, receiver = begin(device, server, **changes)
        assert sender.memory == receiver.memory == 0
        packed = sender.pack(Stream.BOUNDARY_UP, (rows(0),), range(40))
        receiver.unpack(Stream.BOUNDARY_UP, packed, range(40))
        sender.keep()
        receiver.keep()
    assert begin(device, server, **other)[0].memory > 0


def test_errors_stay_with_their_sender():
    """The other end remembers none, and nothing has to agree."""
    inner = {"name": "topk", "keep": 0.2}
    plan = CodecPlan({"name": "error_feedback", "inner": inner, "over_turns": True}, inner)
    device, server = Remembered(), Remembered()
    sender, receiver = begin(device, server, plan=plan)
    packed = sender.pack(Stream.BOUNDARY_UP, (rows(0),), range(40))
    (received,) = receiver.unpack(Stream.BOUNDARY_UP, packed, range(40))
    sender.keep()
    receiver.keep()
    assert server.streams == {}
    (entries,) = device.streams.values()
    left = torch.stack([entry.row for _, entry in entries]).float()
    assert torch.allclose(left, rows(0) - received, atol=0.02)
    again, _ = begin(device, server, plan=plan)
    packed = again.pack(Stream.BOUNDARY_UP, (torch.zeros(40, *SHAPE),), range(40))
    (more,) = receiver.unpack(Stream.BOUNDARY_UP, packed, range(40))
    assert more.abs().sum() > 0
