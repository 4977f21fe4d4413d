"""One message on the link: a fixed prefix, a compact JSON header, raw tensor buffers.

A frame is data from outside. `decode` checks all of it (magic, version, turn token, number, kind,
sizes, types, shapes) against `Limits` and against what the receiver expects before it touches a
tensor, and names the field that is wrong. Nothing is unpickled.
"""

import enum
import hmac
import json
import math
import struct
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fedsplit.errors import FedsplitError

MAGIC = b"FSPL"
VERSION = 2
TOKEN_BYTES = 16
_PREFIX = struct.Struct("<4sHHIIQQ16s")  # magic, version, kind, 0, header, payload, number, token
PREFIX_BYTES = _PREFIX.size
_ALIGNMENT = 16  # of the payload within the frame: headers are padded with spaces

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class FrameError(FedsplitError):
    """A frame that is not what the receiver may use; the message names the field."""


class Kind(enum.IntEnum):
    """What a frame asks or answers."""

    OPEN = 1
    OPENED = 2
    STEP = 3
    STEP_REPLY = 4
    FORWARD = 5
    FORWARD_REPLY = 6
    BACKWARD = 7
    BACKWARD_REPLY = 8
    EVALUATE = 9
    EVALUATE_REPLY = 10
    CLOSE = 11
    CLOSED = 12
    ERROR = 13
    FETCH = 14
    FETCH_REPLY = 15
    HAND_UP = 16
    HANDED_UP = 17
    PRESENT = 18
    WELCOME = 19
    TELL = 20
    LEAVE = 21
    GOODBYE = 22


_NUMBER = (int, float)
_LARGEST = sys.float_info.max
_FIELDS: Mapping[Kind, Mapping[str, type | tuple[type, ...]]] = {
    Kind.OPEN: {
        "route": str,
        "position": int,
        "codec": dict,
        "seed": int,
        "train": bool,
        "adapters_on_link": bool,
    },
    Kind.FETCH_REPLY: {"more": bool},
    Kind.STEP_REPLY: {"loss": _NUMBER, "targets": int},
    Kind.EVALUATE_REPLY: {
        "loss": _NUMBER,
        "targets": int,
        "correct": (int, type(None)),
        "classes": list,
    },
    Kind.ERROR: {"reason": str},
    Kind.PRESENT: {"who": str},
    Kind.TELL: {"words": dict},
    Kind.LEAVE: {"reason": str},
}
# What codecs that remember earlier turns, steps of several mini-batches and clipped ones say too.
_OPTIONAL: Mapping[Kind, Mapping[str, float]] = {
    Kind.OPEN: {"memory": 2.0**63},
    Kind.OPENED: {"memory": 2.0**63},
    Kind.STEP: {"share": 1.0, "norm": math.inf},
    Kind.FORWARD: {"share": 1.0, "norm": math.inf},
    Kind.CLOSE: {"norm": math.inf},
    Kind.STEP_REPLY: {"norm": math.inf},
    Kind.BACKWARD_REPLY: {"norm": math.inf},
}
# What carries adapters; they are named like inputs, and travel as they are.
ADAPTERS = frozenset({Kind.FETCH_REPLY, Kind.HAND_UP})
_WITH_BOUNDARY = {Kind.STEP, Kind.FORWARD, Kind.EVALUATE}
_WITH_INPUTS = {*_WITH_BOUNDARY, *ADAPTERS}
_WITH_TENSORS = {
    *_WITH_BOUNDARY,
    Kind.STEP_REPLY,
    Kind.FORWARD_REPLY,
    Kind.BACKWARD,
    Kind.BACKWARD_REPLY,
}


@dataclass(frozen=True)
class Limits:
    """Upper bounds of a frame, checked before anything is allocated.

    Parameters
    ----------
    frame_bytes : int
        Whole frame, and each tensor once unpacked.
    header_bytes : int
        JSON header.
    tensors, dimensions, samples : int
        Tensors in a frame, dimensions of a tensor, samples in a mini-batch.
    """

    frame_bytes: int = 1 << 28
    header_bytes: int = 1 << 18
    tensors: int = 64
    dimensions: int = 8
    samples: int = 1 << 14


@dataclass(frozen=True)
class Packed:
    """A tensor on the wire: its type and shape, and the bytes that stand for it.

    `coded` says that a codec made the bytes; otherwise they are the tensor's own. `needs_grad`
    says that its sender waits for a gradient.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    payload: memoryview
    coded: bool = False
    needs_grad: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of the unpacked tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Frame:
    """A message: kind, running number and turn token, and what the kind carries."""

    kind: Kind
    number: int
    token: bytes
    fields: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Packed] = field(default_factory=dict)
    tensors: tuple[Packed | None, ...] = ()
    layout: str = ""
    samples: tuple[int, ...] = ()

    @property
    def payload_bytes(self) -> int:
        """Bytes that stand for boundary tensors or gradients."""
        return sum(tensor.payload.nbytes for tensor in self.tensors if tensor is not None)


def encode(frame: Frame) -> bytes:
    """Return `frame` as one block of bytes."""
    packed = [*frame.inputs.values(), *(item for item in frame.tensors if item is not None)]
    header: dict[str, object] = {}
    if frame.inputs:
        header["inputs"] = {name: _describe(item) for name, item in frame.inputs.items()}
    if frame.tensors:
        header["tensors"] = [item and _describe(item) for item in frame.tensors]
    if frame.layout:
        header["layout"] = frame.layout
    if frame.samples:
        header["samples"] = frame.samples
    if frame.fields:
        header["fields"] = dict(frame.fields)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    payload_bytes = sum(item.payload.nbytes for item in packed)
    prefix = _PREFIX.pack(
        MAGIC, VERSION, frame.kind, 0, len(text), payload_bytes, frame.number, frame.token
    )
    return b"".join([prefix, text, *(item.payload for item in packed)])


def _describe(item: Packed) -> list[object]:
    _check(item.dtype in _NAMES, "dtype", item.dtype, f"one of {', '.join(DTYPES)}")
    flags = item.coded + 2 * item.needs_grad
    return [_NAMES[item.dtype], list(item.shape), item.payload.nbytes, flags]


def claimed(data: bytes) -> tuple[int, bytes]:
    """Return the number and token that a frame claims, unchecked: what a refusal echoes."""
    if len(data) < PREFIX_BYTES:
        return 0, bytes(TOKEN_BYTES)
    *_, number, token = _PREFIX.unpack_from(data)
    return number, token


def frame_size(data: bytes) -> int:
    """Return the bytes of the frame that `data` begins, as its prefix claims, unchecked."""
    *_, header_bytes, payload_bytes, _, _ = _PREFIX.unpack_from(data)
    return PREFIX_BYTES + int(header_bytes) + int(payload_bytes)


def decode(
    data: bytes,
    limits: Limits,
    *,
    kinds: Collection[Kind],
    number: int,
    token: bytes | None,
) -> Frame:
    """Read a frame that must be one of `kinds`, carry `number` and belong to the turn `token`.

    Parameters
    ----------
    data : bytes
        What arrived.
    limits : Limits
        Upper bounds.
    kinds : collection of Kind
        What the receiver's state allows.
    number : int
        Running number that is due.
    token : bytes or None
        The turn's token; None if the receiver does not know the turn yet (it must then look the
        frame's token up itself).

    Returns
    -------
    Frame
        Its payloads are views of `data`.

    Raises
    ------
    FrameError
        If anything about the frame is not as it must be.
    """
    view = memoryview(data)
    _check(view.nbytes >= PREFIX_BYTES, "length", view.nbytes, f"at least {PREFIX_BYTES} bytes")
    _check(view.nbytes <= limits.frame_bytes, "length", view.nbytes, f"<= {limits.frame_bytes}")
    magic, version, code, reserved, header_bytes, payload_bytes, found, sender = _PREFIX.unpack(
        view[:PREFIX_BYTES]
    )
    _check(magic == MAGIC, "magic", magic, f"{MAGIC!r}")
    _check(version == VERSION, "version", version, f"{VERSION}")
    _check(reserved == 0, "reserved", reserved, "0")
    if token is not None and not hmac.compare_digest(sender, token):
        raise FrameError("token: must be that of the turn which opened this stream")
    allowed = ", ".join(kind.name for kind in kinds)
    _check(code in kinds, "kind", code, f"one of {allowed} at this point")
    _check(found == number, "number", found, f"{number}, the next in order")
    _check(header_bytes <= limits.header_bytes, "header", header_bytes, f"<= {limits.header_bytes}")
    total = PREFIX_BYTES + header_bytes + payload_bytes
    _check(view.nbytes == total, "length", view.nbytes, f"{total} as the prefix says")
    body = PREFIX_BYTES + header_bytes
    header = _read_header(view[PREFIX_BYTES:body])
    return _Reader(limits, view[body:]).frame(Kind(code), found, sender, header)


def _check(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise FrameError(f"{name}={value!r:.80}: must be {allowed}")


def _read_header(text: memoryview) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        header = json.loads(bytes(text), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"header: must be JSON ({error!s:.80})") from None
    known = {"inputs", "tensors", "layout", "samples", "fields"}
    if not isinstance(header, dict) or not header.keys() <= known:
        raise FrameError(f"header: must be a mapping with keys among {', '.join(sorted(known))}")
    return header


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


class _Reader:
    """Turns a checked prefix and a JSON header into a frame, consuming the payload in order."""

    def __init__(self, limits: Limits, payload: memoryview) -> None:
        self._limits = limits
        self._payload = payload
        self._offset = 0

    def frame(self, kind: Kind, number: int, token: bytes, header: dict[str, Any]) -> Frame:
        limits = self._limits
        inputs = header.get("inputs", {})
        tensors = header.get("tensors", [])
        layout = header.get("layout", "")
        samples = header.get("samples", [])
        fields = header.get("fields", {})
        _check(isinstance(inputs, dict), "inputs", inputs, "a mapping")
        _check(isinstance(tensors, list), "tensors", tensors, "a list")
        _check(isinstance(layout, str), "layout", layout, "text")
        _check(isinstance(samples, list), "samples", samples, "a list")
        _check(isinstance(fields, dict), "fields", fields, "a mapping")
        _check(not inputs or kind in _WITH_INPUTS, "inputs", len(inputs), f"none in {kind.name}")
        _check(not tensors or kind in _WITH_TENSORS, "tensors", len(tensors), f"none: {kind.name}")
        count = len(inputs) + len(tensors)
        _check(count <= limits.tensors, "tensors", count, f"at most {limits.tensors}")
        _check(len(samples) <= limits.samples, "samples", len(samples), f"<= {limits.samples}")
        _check(all(_is_count(item) for item in samples), "samples", samples, "counts")
        self._check_fields(kind, fields)
        read_inputs = {name: self._packed(item, name) for name, item in inputs.items()}
        read_tensors = tuple(
            None if item is None else self._packed(item, f"tensors[{index}]")
            for index, item in enumerate(tensors)
        )
        left = self._payload.nbytes - self._offset
        _check(left == 0, "payload", left, "used up by the tensors of the header")
        return Frame(kind, number, token, fields, read_inputs, read_tensors, layout, tuple(samples))

    @staticmethod
    def _check_fields(kind: Kind, fields: dict[str, Any]) -> None:
        schema, optional = _FIELDS.get(kind, {}), _OPTIONAL.get(kind, {})
        known = {*schema, *(fields.keys() & optional.keys())}
        _check(fields.keys() == known, "fields", sorted(fields), f"{sorted(schema)}")
        for name in known - schema.keys():
            value, most = fields[name], optional[name]
            number = isinstance(value, _NUMBER) and not isinstance(value, bool)
            _check(number and 0 <= value <= min(most, _LARGEST), name, value, f"0 to {most:g}")
        for name, types in schema.items():
            value = fields[name]
            wrong_bool = isinstance(value, bool) and types is not bool
            _check(isinstance(value, types) and not wrong_bool, name, value, f"{types}")
            if isinstance(value, float):
                _check(math.isfinite(value), name, value, "finite")

    def _packed(self, item: object, name: str) -> Packed:
        limits = self._limits
        if not isinstance(item, list) or len(item) != 4:
            raise FrameError(f"{name}: must be [dtype, shape, bytes, flags]")
        dtype_name, shape, nbytes, flags = item
        _check(isinstance(dtype_name, str), f"{name} dtype", dtype_name, "text")
        _check(dtype_name in DTYPES, f"{name} dtype", dtype_name, f"one of {', '.join(DTYPES)}")
        _check(isinstance(shape, list), f"{name} shape", shape, "a list")
        rank = len(shape)
        _check(rank <= limits.dimensions, f"{name} shape", rank, f"<= {limits.dimensions} axes")
        _check(all(_is_count(size) for size in shape), f"{name} shape", shape, "counts")
        _check(_is_count(nbytes), f"{name} bytes", nbytes, "a count")
        _check(type(flags) is int and flags in range(4), f"{name} flags", flags, "0 to 3")
        coded, needs_grad = bool(flags & 1), bool(flags & 2)
        dtype = DTYPES[dtype_name]
        if needs_grad or coded:
            _check(dtype.is_floating_point, f"{name} dtype", dtype_name, "floating point")
        # Axes of size 0 must not hide huge other axes.
        size = math.prod(max(axis, 1) for axis in shape) * dtype.itemsize
        _check(size <= limits.frame_bytes, f"{name} size", size, f"<= {limits.frame_bytes} bytes")
        if not coded:
            exact = math.prod(shape) * dtype.itemsize
            _check(nbytes == exact, f"{name} bytes", nbytes, f"{exact} for its shape")
        start, self._offset = self._offset, self._offset + nbytes
        _check(self._offset <= self._payload.nbytes, f"{name} bytes", nbytes, "within the payload")
        payload = self._payload[start : self._offset]
        return Packed(dtype, tuple(shape), payload, coded, needs_grad)
