"""A frame is read as it was written, and nothing that is not a proper frame gets through."""

import json
import struct
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.models import Boundary
from fedsplit.plan import CodecPlan
from fedsplit.transport.frames import (
    DTYPES,
    PREFIX_BYTES,
    Frame,
    FrameError,
    Kind,
    Limits,
    claimed,
    decode,
    encode,
)
from fedsplit.transport.tensors import (
    Stream,
    TensorCoder,
    check_gradients,
    pack_inputs,
    unpack_inputs,
)

TOKEN, OTHER = bytes(range(16)), bytes(range(1, 17))
LIMITS = Limits(frame_bytes=1 << 16, header_bytes=1 << 12, tensors=6, dimensions=4, samples=8)
HEADER_AT = 12  # the header's length in the prefix

tensors = st.builds(
    lambda name, shape, seed: _tensor(DTYPES[name], shape, seed),
    st.sampled_from(list(DTYPES)),
    st.lists(st.integers(0, 4), max_size=4),
    st.integers(0, 2**31),
)


def _tensor(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, shape, generator=draw).to(dtype)


def _frame(kind: Kind = Kind.STEP, number: int = 3, token: bytes = TOKEN) -> Frame:
    coder = TensorCoder(CodecPlan(), 0)
    boundary = [torch.randn(2, 3, 4, requires_grad=True), torch.arange(5)]
    return Frame(
        kind,
        number,
        token,
        inputs=pack_inputs({"labels": torch.arange(6).reshape(2, 3)}),
        tensors=coder.pack(Stream.BOUNDARY_UP, boundary, (4, 5)),
        layout='["x"]',
        samples=(4, 5),
    )


def _read(data: bytes, limits: Limits = LIMITS) -> Frame:
    return decode(data, limits, kinds=(Kind.STEP, Kind.CLOSE), number=3, token=TOKEN)


def _with_header(change: object) -> bytes:
    """Return a proper frame whose header is replaced by `change`, or by what it returns."""
    data = encode(_frame())
    (length,) = struct.unpack_from("<I", data, HEADER_AT)
    body = data[PREFIX_BYTES + length :]
    if callable(change):
        header = json.loads(data[PREFIX_BYTES : PREFIX_BYTES + length])
        change(header)
        text = json.dumps(header).encode()
    else:
        text = change if isinstance(change, bytes) else json.dumps(change).encode()
    prefix = bytearray(data[:PREFIX_BYTES])
    struct.pack_into("<I", prefix, HEADER_AT, len(text))
    return bytes(prefix) + text + body


@given(
    inputs=st.dictionaries(st.text(max_size=8), tensors, max_size=3),
    boundary=st.lists(st.none() | tensors, max_size=3),
    layout=st.text(max_size=20),
    samples=st.lists(st.integers(0, 2**40), max_size=8),
)
@settings(max_examples=60, deadline=None)
def test_a_frame_is_read_as_it_was_written(
    inputs: dict[str, Tensor], boundary: list[Tensor | None], layout: str, samples: list[int]
) -> None:
    sender, receiver = TensorCoder(CodecPlan(), 1), TensorCoder(CodecPlan(), 1)
    packed = sender.pack(Stream.GRADIENT_DOWN, boundary, samples)
    frame = Frame(
        Kind.STEP,
        3,
        TOKEN,
        inputs=pack_inputs(inputs),
        tensors=packed,
        layout=layout,
        samples=tuple(samples),
    )
    found = _read(encode(frame))
    assert (found.layout, found.samples) == (layout, tuple(samples))
    assert found.payload_bytes == sum(item.nbytes for item in boundary if item is not None)
    read_inputs = unpack_inputs(found.inputs)
    assert list(read_inputs) == list(inputs)
    for name, tensor in inputs.items():
        assert read_inputs[name].dtype == tensor.dtype
        assert torch.equal(read_inputs[name], tensor)
    gradients = receiver.unpack(Stream.GRADIENT_DOWN, found.tensors, samples)
    assert [item is None for item in gradients] == [item is None for item in boundary]
    for got, tensor in zip(gradients, boundary, strict=True):
        if got is not None and tensor is not None:
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(got, tensor)


@given(st.integers(0, 600))
@settings(max_examples=60, deadline=None)
def test_a_truncated_or_extended_frame_is_refused(cut: int) -> None:
    data = encode(_frame())
    with pytest.raises(FrameError):
        _read(data[: min(cut, len(data) - 1)])
    with pytest.raises(FrameError, match="length"):
        _read(data + b"x" * (cut + 1))


@given(st.binary(max_size=400))
@settings(max_examples=100, deadline=None)
def test_random_bytes_are_refused(noise: bytes) -> None:
    with pytest.raises(FrameError):
        _read(noise)
    with pytest.raises(FrameError):
        _read(encode(_frame())[:PREFIX_BYTES] + noise)
    claimed(noise)


@given(st.integers(0, 1000), st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_a_flipped_byte_is_refused_or_changes_values_only(where: int, flip: int) -> None:
    data = bytearray(encode(_frame()))
    data[where % len(data)] ^= flip
    try:
        found = _read(bytes(data))
        coder = TensorCoder(CodecPlan(), 0)
        unpack_inputs(found.inputs)
        coder.unpack(Stream.BOUNDARY_UP, found.tensors, found.samples)
    except FedsplitError:
        return
    assert where % len(data) >= PREFIX_BYTES


def test_kind_number_and_token_must_be_the_expected_ones() -> None:
    with pytest.raises(FrameError, match="token"):
        _read(encode(_frame(token=OTHER)))
    for number in (0, 2, 4, 2**63):
        with pytest.raises(FrameError, match="number"):
            _read(encode(_frame(number=number)))
    with pytest.raises(FrameError, match="kind"):
        _read(encode(_frame(kind=Kind.EVALUATE)))


def test_the_message_never_shows_a_token() -> None:
    with pytest.raises(FrameError) as caught:
        _read(encode(_frame(token=OTHER)))
    for secret in (TOKEN, OTHER):
        assert secret.hex() not in str(caught.value)
        assert repr(secret) not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "field"),
    [
        (b"\xff\xfe", "header"),
        (b"[" * 4000, "header"),
        (b'{"samples":' + b"9" * 3500 + b"}", "header|samples"),
        ([], "header"),
        ({"surprise": 1}, "header"),
        ({"inputs": []}, "inputs"),
        ({"tensors": {}}, "tensors"),
        ({"layout": 3}, "layout"),
        ({"samples": [-1]}, "samples"),
        ({"samples": [1.5]}, "samples"),
        ({"samples": [True]}, "samples"),
        ({"samples": [0] * 9}, "samples"),
        ({"fields": {"loss": 1.0}}, "fields"),
        ({"tensors": [["float32", [1], 4]]}, "tensors"),
        ({"tensors": [["object", [1], 8, 0]]}, "dtype"),
        ({"tensors": [[7, [1], 8, 0]]}, "dtype"),
        ({"tensors": [["float32", "11", 4, 0]]}, "shape"),
        ({"tensors": [["float32", [1, -1], 4, 0]]}, "shape"),
        ({"tensors": [["float32", [1] * 5, 4, 0]]}, "shape"),
        ({"tensors": [["float32", [2**62, 2**62], 4, 0]]}, "size"),
        ({"tensors": [["float32", [0, 2**40], 0, 0]]}, "size"),
        ({"tensors": [["float32", [2**20], 4, 1]]}, "size"),
        ({"tensors": [["float32", [2], 4, 0]]}, "bytes"),
        ({"tensors": [["float32", [2], -8, 0]]}, "bytes"),
        ({"tensors": [["float32", [2], 60000, 1]]}, "bytes"),
        ({"tensors": [["float32", [2], 8, 4]]}, "flags"),
        ({"tensors": [["int64", [1], 8, 2]]}, "dtype"),
        ({"tensors": [None] * 7}, "tensors"),
        ({"tensors": [["float32", [2], 8, 0]]}, "payload"),
    ],
)
def test_a_header_that_lies_is_refused_by_name(header: object, field: str) -> None:
    with pytest.raises(FrameError, match=field):
        _read(_with_header(header))


@pytest.mark.parametrize(
    ("kind", "contents", "field"),
    [
        (Kind.CLOSE, {"inputs": pack_inputs({"labels": torch.zeros(1)})}, "inputs"),
        (Kind.CLOSE, {"tensors": (None,)}, "tensors"),
        (Kind.STEP_REPLY, {"fields": {"loss": "1", "targets": 1}}, "loss"),
        (Kind.STEP_REPLY, {"fields": {"loss": True, "targets": 1}}, "loss"),
        (Kind.STEP_REPLY, {"fields": {"loss": float("nan"), "targets": 1}}, "header"),
        (Kind.STEP_REPLY, {"fields": {"loss": 1.0, "targets": 1.5}}, "targets"),
        (Kind.STEP_REPLY, {"fields": {"loss": 1.0}}, "fields"),
        (Kind.ERROR, {"fields": {"reason": None}}, "reason"),
    ],
)
def test_each_kind_carries_its_own_contents_only(
    kind: Kind, contents: dict[str, object], field: str
) -> None:
    data = encode(Frame(kind, 3, TOKEN, **contents))
    with pytest.raises(FrameError, match=field):
        decode(data, LIMITS, kinds=(kind,), number=3, token=TOKEN)


def test_limits_hold_before_memory_is_taken() -> None:
    huge = Limits(frame_bytes=1 << 40)
    announced = _with_header({"tensors": [["float32", [2**30], 2**32, 0]]})
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match="length"):
            _read(bytes(LIMITS.frame_bytes + 1))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(200):
            with pytest.raises(FrameError, match="bytes"):
                _read(announced, huge)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 1 << 20
    assert after - before < 1 << 18


def test_a_tensor_of_a_type_that_does_not_travel_is_refused_by_the_sender() -> None:
    with pytest.raises(FrameError, match="dtype"):
        encode(Frame(Kind.STEP, 0, TOKEN, inputs=pack_inputs({"x": torch.zeros(1).cfloat()})))


def test_contiguous_tensors_are_packed_without_a_copy() -> None:
    tensor = torch.randn(4, 5)
    (packed,) = TensorCoder(CodecPlan(), 0).pack(Stream.BOUNDARY_UP, [tensor], (0,))
    tensor[0, 0] = 42.0
    assert packed is not None
    assert torch.frombuffer(bytearray(packed.payload), dtype=torch.float32)[0] == 42.0


@given(st.integers(1, 3), st.booleans(), st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_boundary_keeps_its_nesting_and_its_gradient_wishes(
    count: int, in_list: bool, train: bool
) -> None:
    leaves = [torch.randn(2, 2, requires_grad=bool(index % 2)) for index in range(count)]
    output = leaves if in_list else tuple(leaves)
    boundary = Boundary.pack(output)
    packed = TensorCoder(CodecPlan(), 0).pack(Stream.BOUNDARY_UP, boundary.tensors, ())
    frame = Frame(Kind.STEP, 3, TOKEN, tensors=packed, layout=boundary.layout)
    found = _read(encode(frame))
    received = TensorCoder(CodecPlan(), 0).unpack_boundary(
        Stream.BOUNDARY_UP, found.tensors, found.layout, (), train
    )
    restored = received.unpack()
    assert type(restored) is type(output)
    assert len(restored) == count
    for got, sent in zip(restored, leaves, strict=True):
        assert torch.equal(got, sent)
        assert got.requires_grad == (sent.requires_grad and train)
        assert got.is_leaf


def test_boundaries_must_be_whole_and_coded_as_agreed() -> None:
    plain, squeezed = CodecPlan(), CodecPlan({"name": "bf16"}, {"name": "bf16"})
    tensor = [torch.randn(2, 3)]
    coder = TensorCoder(plain, 0)
    with pytest.raises(FrameError, match="present"):
        coder.unpack_boundary(Stream.BOUNDARY_UP, (None,), "", (), True)
    with pytest.raises(FrameError, match="at least one"):
        coder.unpack_boundary(Stream.BOUNDARY_UP, (), "", (), True)
    with pytest.raises(FrameError, match="coded"):
        coder.unpack(
            Stream.BOUNDARY_UP, TensorCoder(squeezed, 0).pack(Stream.BOUNDARY_UP, tensor, ()), ()
        )
    with pytest.raises(FrameError, match="coded"):
        TensorCoder(squeezed, 0).unpack(
            Stream.BOUNDARY_UP, coder.pack(Stream.BOUNDARY_UP, tensor, ()), ()
        )


def test_gradients_must_fit_their_boundary() -> None:
    sent = [torch.zeros(2, 3)]
    check_gradients((None,), sent)
    check_gradients((torch.ones(2, 3),), sent)
    for wrong in ((), (torch.ones(3, 2),), (torch.ones(2, 3).double(),), (None, None)):
        with pytest.raises(FrameError, match="gradients"):
            check_gradients(wrong, sent)
