"""Tensors to the bytes of a frame and back: raw, or through the codec of their stream."""

import enum
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from fedsplit.codec import Codec, Remembered, make_codec
from fedsplit.codec.base import raw_bytes
from fedsplit.models import Boundary
from fedsplit.models.boundary import spread
from fedsplit.models.ranks import factor_of, fits
from fedsplit.plan import CodecPlan
from fedsplit.seeds import derive_seed
from fedsplit.transport.frames import FrameError, Limits, Packed

T = TypeVar("T")
Kept = tuple[Tensor | None, ...]
"""See `Boundary.kept`."""

_RAW = make_codec({"name": "identity"}, 0)
_BETWEEN = ":"  # stream and place of a tensor


def pack_inputs(inputs: Mapping[str, Tensor]) -> dict[str, Packed]:
    """Return masks, labels and the like as they go on the wire, uncompressed."""
    return {
        name: Packed(tensor.dtype, tuple(tensor.shape), memoryview(_RAW.encode(tensor)))
        for name, tensor in inputs.items()
    }


def unpack_inputs(packed: Mapping[str, Packed]) -> dict[str, Tensor]:
    """Return the tensors that `pack_inputs` packed; they share memory with the frame.

    Raises
    ------
    FrameError
        If one claims to be compressed or to want a gradient.
    """
    for name, item in packed.items():
        if item.coded or item.needs_grad:
            raise FrameError(f"{name} flags: must be 0, inputs travel as they are")
    return {
        name: _RAW.decode(item.payload, item.shape, item.dtype) for name, item in packed.items()
    }


def adapter_parts(adapters: Mapping[str, Tensor], limits: Limits) -> Iterator[dict[str, Tensor]]:
    """Yield `adapters` in parts that fit a frame each: one empty part if there are none.

    Raises
    ------
    FrameError
        If a single one does not fit.
    """
    room = limits.frame_bytes // 2  # the rest is for the header
    part: dict[str, Tensor] = {}
    free = room
    for name, tensor in adapters.items():
        if tensor.nbytes > room:
            raise FrameError(f"adapter {name!r} bytes={tensor.nbytes}: must be at most {room}")
        if tensor.nbytes > free or len(part) == limits.tensors:
            yield part
            part, free = {}, room
        part[name] = tensor
        free -= tensor.nbytes
    yield part


def take_adapters(
    part: Mapping[str, Tensor], expected: Mapping[str, Tensor], taken: dict[str, Tensor]
) -> None:
    """Add a part of the adapters to those `taken`, with the types that are expected.

    Raises
    ------
    FrameError
        If one is not expected or came before, has another shape, or holds other than finite
        floating point numbers where such are expected.
    """
    for name, tensor in part.items():
        if name not in expected:
            raise FrameError(f"adapter {name!r:.200}: must be one of this turn's device")
        if name in taken:
            raise FrameError(f"adapter {name!r}: must come once")
        wanted = expected[name]
        # Nobody says beforehand of how many components a residual is.
        apart = factor_of(name) is not None and fits(name, tensor, wanted)
        if tensor.shape != wanted.shape and not apart:
            raise FrameError(
                f"adapter {name!r} shape={tuple(tensor.shape)}: must be {tuple(wanted.shape)}"
            )
        if tensor.is_floating_point() != wanted.is_floating_point():
            raise FrameError(f"adapter {name!r} dtype={tensor.dtype}: must be like {wanted.dtype}")
        converted = tensor.to(wanted.dtype)
        if not converted.isfinite().all():
            raise FrameError(f"adapter {name!r}: must be finite")
        taken[name] = converted


class Stream(enum.Enum):
    """The four streams of tensors between two tiers; a boundary may go down only in a U shape."""

    BOUNDARY_UP = "boundary up"
    BOUNDARY_DOWN = "boundary down"
    GRADIENT_UP = "gradient up"
    GRADIENT_DOWN = "gradient down"

    @property
    def upward(self) -> bool:
        """Whether the stream leads away from the device."""
        return self.value.endswith("up")


class TensorCoder:
    """One end's codecs: an instance for each stream and tensor, so that their memories stay apart.

    Parameters
    ----------
    plan : CodecPlan
        Codec settings of either direction.
    seed : int
        Seed of the turn, the same at both ends.
    remembered : Remembered, optional
        What this end's codecs remember of the device's earlier turns; `keep` brings it up to date.
    of : str
        What this turn's rows are of; what is remembered of something else is left alone.
    """

    def __init__(
        self, plan: CodecPlan, seed: int, remembered: Remembered | None = None, of: str = ""
    ) -> None:
        self._plan = plan
        self._seed = seed
        self._codecs: dict[tuple[Stream, int], Codec] = {}
        self._remembered, self._of = remembered, of
        if remembered is not None and remembered.of == of:
            for name, entries in remembered.streams.items():
                stream, _, index = name.partition(_BETWEEN)
                memory = self._codec(Stream[stream], int(index)).lasting
                if memory is not None:
                    memory.restore(entries)
        self.memory = self._digest()
        """What the memories are that both ends share, as a number below 2^63; 0 for nothing."""

    def agree(self, theirs: object) -> None:
        """Forget what both ends share unless the other end's `memory` is the same.

        So they hold the same rows whatever became of earlier turns: a lost answer, a node or a
        server that started afresh, a peer that lies. It costs that device's turn some bytes.
        """
        if theirs != self.memory:
            self._codecs = {at: codec for at, codec in self._codecs.items() if not codec.mirrored}

    def keep(self) -> None:
        """Put what the codecs remember beyond this turn, which is done, in place of what was."""
        if self._remembered is not None:
            self._remembered.of = self._of
            self._remembered.streams = {
                f"{stream.name}{_BETWEEN}{index}": codec.lasting.entries
                for (stream, index), codec in self._codecs.items()
                if codec.lasting
            }

    def _digest(self) -> int:
        found = hashlib.sha256()
        shared = [at for at, codec in self._codecs.items() if codec.mirrored and codec.lasting]
        for stream, index in sorted(shared, key=lambda at: (at[0].value, at[1])):
            memory = self._codecs[stream, index].lasting
            for sample, entry in memory.entries if memory is not None else ():
                about = stream.value, index, sample, entry.age, tuple(entry.row.shape)
                found.update(repr(about).encode())
                found.update(raw_bytes(entry.row))
        return int.from_bytes(found.digest()[:8], "big") >> 1 if shared else 0

    def pack(
        self,
        stream: Stream,
        tensors: Sequence[Tensor | None],
        samples: Sequence[int],
        kept: Kept = (),
    ) -> tuple[Packed | None, ...]:
        """Return `tensors`, or what is `kept` of them, as they go on the wire; None stays None."""
        return tuple(
            None if tensor is None else self._pack(stream, index, tensor, samples, where)
            for index, (tensor, where) in enumerate(_marked(tensors, kept))
        )

    def unpack(
        self,
        stream: Stream,
        packed: Sequence[Packed | None],
        samples: Sequence[int],
        kept: Kept = (),
    ) -> tuple[Tensor | None, ...]:
        """Return the tensors that the other end packed, without gradient requirements.

        They are zero where nothing is `kept` of them.

        Raises
        ------
        FrameError
            If a tensor is compressed where this stream is not, or the other way round.
        FedsplitError
            If a payload is not what the stream's codec makes.
        """
        for index, item in enumerate(packed):
            if item is not None:
                self._check_coded(stream, index, item)
        return tuple(
            None if item is None else self._unpack(stream, index, item, samples, where)
            for index, (item, where) in enumerate(_marked(packed, kept))
        )

    def is_coded(self, stream: Stream) -> bool:
        """Return whether floating-point tensors of a stream are compressed."""
        return self._settings(stream).get("name") != "identity"

    def working_bytes(self, stream: Stream, shapes: Sequence[Sequence[int]]) -> int:
        """Return the memory that unpacking tensors of these shapes takes at most, beside them."""
        largest = max((math.prod(shape) for shape in shapes), default=0)
        return int(largest * make_codec(self._settings(stream), 0).working_bytes)

    def unpack_boundary(
        self,
        stream: Stream,
        packed: Sequence[Packed | None],
        layout: str,
        samples: Sequence[int],
        train: bool,
        kept: Kept = (),
    ) -> Boundary:
        """Return a boundary as leaves of a new graph that wants the gradients its sender wants.

        Raises
        ------
        FrameError
            If there is no tensor, or one is missing; otherwise as `unpack`.
        """
        if not packed:
            raise FrameError("tensors=0: must be at least one in a boundary")
        leaves = []
        for item, tensor in zip(packed, self.unpack(stream, packed, samples, kept), strict=True):
            if item is None or tensor is None:
                raise FrameError("tensors: must all be present in a boundary")
            leaves.append(tensor.detach().requires_grad_(train and item.needs_grad))
        return Boundary(tuple(leaves), layout, kept)

    def _settings(self, stream: Stream) -> Mapping[str, object]:
        return self._plan.uplink if stream.upward else self._plan.downlink

    def _codec(self, stream: Stream, index: int) -> Codec:
        key = (stream, index)
        if key not in self._codecs:
            seed = derive_seed(self._seed, "codec", stream.value, index)
            self._codecs[key] = make_codec(self._settings(stream), seed)
        return self._codecs[key]

    def _pack(
        self,
        stream: Stream,
        index: int,
        tensor: Tensor,
        samples: Sequence[int],
        where: Tensor | None,
    ) -> Packed:
        rows = tensor.detach()
        if where is not None:
            rows = rows[where.to(rows.device)]
        payload = self._codec(stream, index).encode(rows, _owners(samples, where))
        coded = tensor.is_floating_point() and self.is_coded(stream)
        shape = tuple(rows.shape)
        return Packed(tensor.dtype, shape, memoryview(payload), coded, tensor.requires_grad)

    def _unpack(
        self,
        stream: Stream,
        index: int,
        item: Packed,
        samples: Sequence[int],
        where: Tensor | None,
    ) -> Tensor:
        codec = self._codec(stream, index)
        rows = codec.decode(item.payload, item.shape, item.dtype, _owners(samples, where))
        return rows if where is None else spread(rows, where)

    def _check_coded(self, stream: Stream, index: int, item: Packed) -> None:
        coded = item.dtype.is_floating_point and self.is_coded(stream)
        if item.coded != coded:
            raise FrameError(
                f"tensors[{index}] coded={item.coded}: must be {coded} ({stream.value})"
            )


def remembering(coder: TensorCoder) -> dict[str, int]:
    """Return what an end says of its memories as the turn opens: nothing where there are none."""
    return {"memory": coder.memory} if coder.memory else {}


def _marked(items: Sequence[T], kept: Kept) -> Iterator[tuple[T, Tensor | None]]:
    return zip(items, kept or (None,) * len(items), strict=True)


def _owners(samples: Sequence[int], where: Tensor | None) -> Sequence[int]:
    """Return the sample of each row that travels: all of a tensor's, or the tokens kept of it."""
    if where is None:
        return samples
    counts = where.sum(1).tolist()
    # Of a device that only infers, samples that are held have no rows; no codec there remembers.
    return [sample for sample, n in zip(samples, counts, strict=False) for _ in range(n)]


def check_gradients(
    gradients: Sequence[Packed | None], tensors: Sequence[Tensor], kept: Kept = ()
) -> None:
    """Refuse gradients, before they are unpacked, that do not fit what is `kept` of `tensors`.

    Raises
    ------
    FrameError
        If their number, a shape or a type differs.
    """
    if len(gradients) != len(tensors):
        raise FrameError(f"gradients={len(gradients)}: must be {len(tensors)}, one a tensor")
    for index, (gradient, (tensor, where)) in enumerate(
        zip(gradients, _marked(tensors, kept), strict=True)
    ):
        shape = tuple(tensor.shape)
        if where is not None:
            shape = (int(where.sum()), *shape[2:])
        if gradient is not None and (gradient.shape != shape or gradient.dtype != tensor.dtype):
            raise FrameError(
                f"gradients[{index}]={tuple(gradient.shape)} {gradient.dtype}: must be "
                f"{shape} {tensor.dtype}, as its boundary tensor"
            )
