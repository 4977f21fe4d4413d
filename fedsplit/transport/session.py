"""The answering end of a link: frames to calls on a `Visit`, in the order that is allowed."""

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.models import Boundary
from fedsplit.transport.arriving import check_inputs, check_step
from fedsplit.transport.frames import (
    Frame,
    FrameError,
    Kind,
    Limits,
    Packed,
    claimed,
    decode,
    encode,
)
from fedsplit.transport.held import spans
from fedsplit.transport.link import Gradients, Host, LinkError, Visit
from fedsplit.transport.tensors import (
    Kept,
    Stream,
    adapter_parts,
    check_gradients,
    pack_inputs,
    remembering,
    unpack_inputs,
)

_LOG = logging.getLogger(__name__)


class Session:
    """Answers the frames of one stream. Whatever goes wrong ends this session and its turn only.

    Parameters
    ----------
    host : Host
        The tier whose turns the stream may enter.
    limits : Limits
        Upper bounds of the frames that may arrive.
    cancel : callable, optional
        Ends the stream, without blocking; called if the turn fails while the peer is to speak.
    """

    def __init__(
        self, host: Host, limits: Limits, cancel: Callable[[], None] = lambda: None
    ) -> None:
        self._host = host
        self._limits = limits
        self._cancel = cancel
        self._mutex = threading.Lock()
        self._handling = self._failed = False
        self._number = 0
        self._visit: Visit | None = None
        self._token: bytes | None = None
        self._ended = self.closed = False
        self._returned = Boundary((), "")
        self._kept: Kept = ()  # of the boundary that came
        self._samples: tuple[int, ...] = ()
        self._parts: list[dict[str, Tensor]] | None = None  # adapters still to be fetched
        self._due: tuple[Kind, ...] = (Kind.OPEN,)

    @property
    def ended(self) -> bool:
        """Whether the session takes no more frames."""
        return self._ended

    @property
    def mid_step(self) -> bool:
        """Whether a forward pass waits for its backward pass, with its activations in memory."""
        return self._due == (Kind.BACKWARD,)

    def unpacked_bytes(self, size: int) -> int:
        """Return what may be made, beyond itself, of a frame of `size` bytes that is due.

        By a codec, or by putting in the padding that was left out.
        """
        if self._visit is None:
            return 0
        limit = self._limits.frame_bytes
        if self.mid_step:
            stream = Stream.GRADIENT_UP
            shapes = [tuple(item.shape) for item in self._returned.tensors]
            made = sum(item.nbytes for item in self._returned.tensors)
        elif self._due == self._between_steps:
            stream = Stream.BOUNDARY_UP
            bounds, due = self._visit.request.bounds, self._visit.arrival.boundary
            shapes = [form.shape(bounds.samples, bounds.tokens) for form in due.forms]
            made = min(due.size_bytes(bounds.samples, bounds.tokens), limit)
        else:
            return 0
        if self._coder.is_coded(stream):
            return made + self._coder.working_bytes(stream, shapes)
        return made if size < made else 0  # one that has all of it is used as it is

    @property
    def opened(self) -> bool:
        """Whether a turn was entered."""
        return self._visit is not None

    def handle(self, data: bytes) -> bytes:
        """Return the answer to a frame: the reply, or an error frame after which nothing follows.

        `settle` is to be called once the answer is on its way.
        """
        with self._mutex:
            self._handling = True
        answer = self._answer(data)
        with self._mutex:
            self._handling = False
            failed = self._failed and not self._ended
        return self.refuse(data, "the turn was given up meanwhile") if failed else answer

    def _answer(self, data: bytes) -> bytes:
        try:
            if self._ended:
                raise LinkError("stream: has ended")
            frame = decode(
                data, self._limits, kinds=self._due, number=self._number, token=self._token
            )
            if (norm := frame.fields.get("norm")) is not None:
                self._entered().update(norm)
            reply = _ANSWERS[frame.kind](self, frame)
        except FedsplitError as error:
            return self.refuse(data, str(error))
        except Exception as error:
            # It costs this turn alone, whoever is to blame; the log has where it came from.
            _LOG.exception("a turn failed on this server")
            return self.refuse(data, f"{type(error).__name__}: {error}")
        self._number += 1
        return encode(reply)

    def settle(self) -> None:
        """Do the work that waited for the answer to leave."""
        if self._visit is None or self._ended:
            return
        try:
            self._visit.settle()
        except Exception as error:
            # The peer learns it with its next frame, which finds the turn failed.
            ours = isinstance(error, FedsplitError)
            if not ours:
                _LOG.exception("a turn failed on this server")
            self._visit.fail(str(error) if ours else f"{type(error).__name__}: {error}")

    def hang_up(self, reason: str) -> None:
        """End the session because the other end is gone; a turn that was not closed has failed."""
        self._ended = True
        if self._visit is not None:
            self._visit.fail(reason)

    def refuse(self, data: bytes, reason: str) -> bytes:
        """End the session; return the error frame that answers `data`, or the beginning of it."""
        self.hang_up(reason)
        return encode(Frame(Kind.ERROR, *claimed(data), {"reason": reason[:2000]}))

    def _turn_failed(self) -> None:
        """End the stream of a turn that failed while nobody speaks; else the answer says it."""
        with self._mutex:
            self._failed = True
            idle = not self._handling and not self._ended
        if idle:
            self._cancel()

    def _entered(self) -> Visit:
        if self._visit is None:
            raise FrameError("kind: must be OPEN, no turn was entered")
        return self._visit

    @staticmethod
    def _reply(kind: Kind, frame: Frame, **contents: Any) -> Frame:
        return Frame(kind, frame.number, frame.token, **contents)

    def _open(self, frame: Frame) -> Frame:
        visit = self._host.enter(frame.token)
        self._visit, self._token = visit, frame.token
        visit.on_failure(self._turn_failed)
        request = visit.request
        for name, mine in request.agreed().items():
            if _plain(mine) != frame.fields[name]:
                raise FrameError(f"{name}={frame.fields[name]!r}: must be {mine!r} in this turn")
        self._coder = request.coder()
        fields = remembering(self._coder)
        self._coder.agree(frame.fields.get("memory", 0))
        if not request.route.returns_home:
            step = Kind.STEP if request.train else Kind.EVALUATE
        else:
            step = Kind.FORWARD
        self._between_steps: tuple[Kind, ...] = (step, Kind.CLOSE)
        self._due = self._between_steps
        if request.adapters_on_link:
            self._due = (Kind.FETCH,)
            if request.handed_up:
                self._between_steps = (step, Kind.HAND_UP)
        held = () if request.held is None else request.held.samples
        found = spans(held, self._limits.samples)
        return self._reply(Kind.OPENED, frame, fields=fields, samples=found)

    def _fetch(self, frame: Frame) -> Frame:
        if self._parts is None:
            self._parts = list(adapter_parts(self._entered().fetch(), self._limits))
        part = self._parts.pop(0)
        if not self._parts:
            self._due = self._between_steps
        return self._reply(
            Kind.FETCH_REPLY,
            frame,
            fields={"more": len(self._parts) > 0},
            inputs=pack_inputs(part),
        )

    def _hand_up(self, frame: Frame) -> Frame:
        self._entered().hand_up(unpack_inputs(frame.inputs))
        self._due = (Kind.HAND_UP, Kind.CLOSE)
        return self._reply(Kind.HANDED_UP, frame)

    def _arrived(self, frame: Frame) -> tuple[dict[str, Tensor], Boundary]:
        """Return a mini-batch, of which all was checked before its boundary was unpacked."""
        visit = self._entered()
        held, bounds = visit.request.held, visit.request.bounds
        if held is None:
            return self._rows(frame, visit)
        count = len(frame.samples)
        if not 1 <= count <= bounds.samples:
            raise FrameError(f"samples={count}: must be 1 to {bounds.samples}")
        missing = held.missing(frame.samples)
        if missing:
            held.put(missing, *self._rows(replace(frame, samples=missing), visit))
        elif frame.inputs or frame.tensors:
            raise FrameError("boundary: must be absent of samples that are held")
        return held.take(frame.samples)

    def _rows(self, frame: Frame, visit: Visit) -> tuple[dict[str, Tensor], Boundary]:
        limit, train = self._limits.frame_bytes, visit.request.train
        kept = check_step(frame, visit.arrival, visit.request.bounds, limit)
        inputs = unpack_inputs(frame.inputs)
        check_inputs(inputs, visit.arrival)
        stream, sent = Stream.BOUNDARY_UP, (frame.tensors, frame.layout, frame.samples)
        return inputs, self._coder.unpack_boundary(stream, *sent, train, kept)

    def _step(self, frame: Frame) -> Frame:
        inputs, boundary = self._arrived(frame)
        self._kept = boundary.kept
        share = frame.fields.get("share", 1.0)
        result = self._entered().step(inputs, boundary, frame.samples, share)
        fields = {"loss": result.loss, "targets": result.n_targets}
        return self._reply(
            Kind.STEP_REPLY,
            frame,
            fields=fields | _norm(result.norm),
            # Of a boundary that was held before, nothing came.
            tensors=self._pack_gradients(result.gradients[: len(frame.tensors)], frame.samples),
        )

    def _forward(self, frame: Frame) -> Frame:
        visit = self._entered()
        inputs, boundary = self._arrived(frame)
        share = frame.fields.get("share", 1.0)
        result = visit.forward(inputs, boundary, frame.samples, share)
        if visit.request.train:
            self._kept, self._returned, self._samples = boundary.kept, result, frame.samples
            self._due = (Kind.BACKWARD,)
        return self._reply(
            Kind.FORWARD_REPLY,
            frame,
            tensors=self._coder.pack(
                Stream.BOUNDARY_DOWN, result.tensors, frame.samples, result.kept
            ),
            layout=result.layout,
        )

    def _backward(self, frame: Frame) -> Frame:
        kept = self._returned.kept
        check_gradients(frame.tensors, self._returned.tensors, kept)
        gradients = self._coder.unpack(Stream.GRADIENT_UP, frame.tensors, self._samples, kept)
        result = self._entered().backward(gradients)
        tensors = self._pack_gradients(result.gradients, self._samples)
        self._returned, self._samples = Boundary((), ""), ()
        self._due = self._between_steps
        return self._reply(Kind.BACKWARD_REPLY, frame, tensors=tensors, fields=_norm(result.norm))

    def _evaluate(self, frame: Frame) -> Frame:
        inputs, boundary = self._arrived(frame)
        result = self._entered().evaluate(inputs, boundary, frame.samples)
        fields = {
            "loss": result.loss,
            "targets": result.n_targets,
            "correct": result.n_correct,
            "classes": list(result.classes),
        }
        return self._reply(Kind.EVALUATE_REPLY, frame, fields=fields)

    def _close(self, frame: Frame) -> Frame:
        self._entered().finish()
        self._coder.keep()
        self._ended = self.closed = True
        return self._reply(Kind.CLOSED, frame)

    def _pack_gradients(
        self, gradients: Gradients, samples: tuple[int, ...]
    ) -> tuple[Packed | None, ...]:
        return self._coder.pack(Stream.GRADIENT_DOWN, gradients, samples, self._kept)


_ANSWERS: dict[Kind, Callable[[Session, Frame], Frame]] = {
    Kind.OPEN: Session._open,
    Kind.STEP: Session._step,
    Kind.FORWARD: Session._forward,
    Kind.BACKWARD: Session._backward,
    Kind.EVALUATE: Session._evaluate,
    Kind.CLOSE: Session._close,
    Kind.FETCH: Session._fetch,
    Kind.HAND_UP: Session._hand_up,
}


def _norm(norm: float | None) -> dict[str, float]:
    return {} if norm is None else {"norm": norm}


def _plain(value: object) -> object:
    """Return `value` as it looks after its way through JSON (tuples are lists there)."""
    return json.loads(json.dumps(value))
