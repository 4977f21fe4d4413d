"""The calling end of a link, over any way to exchange a frame for a frame."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.models import Boundary, Crossing
from fedsplit.models.ranks import trained
from fedsplit.transport.arriving import check_boundary, tokens_of
from fedsplit.transport.frames import ADAPTERS, Frame, FrameError, Kind, Limits, decode, encode
from fedsplit.transport.held import read_spans
from fedsplit.transport.link import (
    BackwardReply,
    EvalReply,
    Gradients,
    LinkError,
    LinkStats,
    OpenRequest,
    StepReply,
)
from fedsplit.transport.tensors import (
    Stream,
    adapter_parts,
    check_gradients,
    pack_inputs,
    remembering,
    take_adapters,
    unpack_inputs,
)


class FrameLink(ABC):
    """A `Link` that turns calls into frames; subclasses carry the frames.

    Parameters
    ----------
    limits : Limits
        Upper bounds of the frames that may arrive.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._stats = LinkStats()
        self._number = 0
        self._request: OpenRequest | None = None
        # Of a U shape's mini-batch: what went up, and where tokens of what came back do.
        self._sent, self._returned = Boundary((), ""), Boundary((), "")
        self._samples: Sequence[int] = ()
        self._norm: float | None = None  # to go with the next frame that may carry it

    @abstractmethod
    def _send(self, frame: bytes) -> Callable[[], bytes]:
        """Send `frame`; return how to wait for its answer, or `LinkError` if there is none.

        Answers are waited for in the order of their frames.
        """

    @abstractmethod
    def _hang_up(self) -> None:
        """Drop the connection; nothing if there is none."""

    def _part(self) -> None:
        """Let go of the connection in good order: the other end has closed the stream."""
        self._hang_up()

    def open(self, request: OpenRequest, returning: Crossing | None = None) -> frozenset[int]:
        """See `Link.open`."""
        if self._request is not None:
            raise LinkError("open: this link was opened before, each turn needs a link of its own")
        if request.route.returns_home and returning is None:
            raise LinkError(f"returning: must be given, route={request.route} returns home")
        self._request, self._returning = request, returning
        self._token = bytes.fromhex(request.token)
        self._coder = request.coder()
        fields = request.agreed() | remembering(self._coder)
        reply = self._ask(Kind.OPEN, Kind.OPENED, fields=fields)
        self._coder.agree(reply.fields.get("memory", 0))
        return read_spans(reply.samples)

    def fetch(self, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Link.fetch`."""
        taken: dict[str, Tensor] = {}
        more = True
        while more:
            reply = self._ask(Kind.FETCH, Kind.FETCH_REPLY)
            more = reply.fields["more"]
            if more and not reply.inputs:
                raise FrameError("adapters=0: must be at least one while more are to come")
            take_adapters(unpack_inputs(reply.inputs), expected, taken)
        if missing := trained(expected).keys() - taken.keys():
            raise FrameError(f"adapters={len(taken)}: must include {min(missing)!r}")
        return taken

    def hand_up(self, adapters: Mapping[str, Tensor]) -> None:
        """See `Link.hand_up`."""
        for part in adapter_parts(adapters, self._limits):
            self._ask(Kind.HAND_UP, Kind.HANDED_UP, inputs=pack_inputs(part))

    def step(
        self,
        inputs: Mapping[str, Tensor],
        boundary: Boundary,
        samples: Sequence[int],
        share: float = 1.0,
    ) -> StepReply:
        """See `Steps.step`."""
        return self.begin_step(inputs, boundary, samples, share)()

    def begin_step(
        self,
        inputs: Mapping[str, Tensor],
        boundary: Boundary,
        samples: Sequence[int],
        share: float = 1.0,
    ) -> Callable[[], StepReply]:
        """See `Link.begin_step`."""
        sent = Kind.STEP, Kind.STEP_REPLY, inputs, boundary, samples, share
        answered = self._begin_boundary(*sent)

        def reply() -> StepReply:
            frame = answered()
            gradients = self._gradients(frame, boundary, samples)
            loss, norm = float(frame.fields["loss"]), frame.fields.get("norm")
            return StepReply(gradients, loss, frame.fields["targets"], norm)

        return reply

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        boundary: Boundary,
        samples: Sequence[int],
        share: float = 1.0,
    ) -> Boundary:
        """See `Steps.forward`."""
        kinds = Kind.FORWARD, Kind.FORWARD_REPLY
        reply = self._begin_boundary(*kinds, inputs, boundary, samples, share)()
        assert self._returning is not None  # else the other end refuses
        shape = len(samples), tokens_of(inputs)
        # What was left out on the way there is left out on the way back.
        kept = self._returning.kept(boundary.where)
        try:
            check_boundary(reply.tensors, reply.layout, self._returning, *shape, kept)
        except FrameError:
            self._hang_up()
            raise
        self._sent, self._samples = boundary, samples
        came, train = (reply.tensors, reply.layout, samples), self._opened().train
        self._returned = self._coder.unpack_boundary(Stream.BOUNDARY_DOWN, *came, train, kept)
        return self._returned

    def backward(self, gradients: Gradients) -> BackwardReply:
        """See `Steps.backward`."""
        self._opened()
        kept = self._returned.kept
        tensors = self._coder.pack(Stream.GRADIENT_UP, gradients, self._samples, kept)
        reply = self._ask(Kind.BACKWARD, Kind.BACKWARD_REPLY, tensors=tensors)
        returned = self._gradients(reply, self._sent, self._samples)
        return BackwardReply(returned, reply.fields.get("norm"))

    def update(self, norm: float) -> None:
        """See `Steps.update`."""
        self._norm = norm

    def evaluate(
        self, inputs: Mapping[str, Tensor], boundary: Boundary, samples: Sequence[int]
    ) -> EvalReply:
        """See `Steps.evaluate`."""
        kinds = Kind.EVALUATE, Kind.EVALUATE_REPLY
        reply = self._begin_boundary(*kinds, inputs, boundary, samples)()
        fields = reply.fields
        counts = tuple(fields["classes"])
        if not all(type(count) is int and count >= 0 for count in counts):
            self._hang_up()
            raise FrameError("classes: must be whole numbers from 0")
        return EvalReply(float(fields["loss"]), fields["targets"], fields["correct"], counts)

    def close(self) -> LinkStats:
        """See `Link.close`."""
        self._ask(Kind.CLOSE, Kind.CLOSED, fields=self._told())
        self._coder.keep()
        self._part()
        return self._stats

    def abort(self) -> None:
        """See `Link.abort`."""
        self._hang_up()

    def _opened(self) -> OpenRequest:
        if self._request is None:
            raise LinkError("link: must be opened first")
        return self._request

    def _begin_boundary(
        self,
        kind: Kind,
        answer: Kind,
        inputs: Mapping[str, Tensor],
        boundary: Boundary,
        samples: Sequence[int],
        share: float = 1.0,
    ) -> Callable[[], Frame]:
        self._opened()
        fields = self._told() | ({"share": share} if share != 1 else {})
        sent = boundary.tensors, samples, boundary.kept
        tensors = self._coder.pack(Stream.BOUNDARY_UP, *sent)
        return self._begin(
            kind,
            answer,
            fields=fields,
            inputs=pack_inputs(inputs),
            tensors=tensors,
            layout=boundary.layout,
            samples=tuple(samples),
        )

    def _told(self) -> dict[str, float]:
        """Return the norm that is still to be said, once."""
        norm, self._norm = self._norm, None
        return {} if norm is None else {"norm": norm}

    def _gradients(self, reply: Frame, sent: Boundary, samples: Sequence[int]) -> Gradients:
        check_gradients(reply.tensors, sent.tensors, sent.kept)
        return self._coder.unpack(Stream.GRADIENT_DOWN, reply.tensors, samples, sent.kept)

    def _ask(self, kind: Kind, answer: Kind, **contents: Any) -> Frame:
        return self._begin(kind, answer, **contents)()

    def _begin(self, kind: Kind, answer: Kind, **contents: Any) -> Callable[[], Frame]:
        """Send a frame; return how to wait for its answer."""
        self._opened()
        frame = Frame(kind, self._number, self._token, **contents)
        data = encode(frame)
        number, n_bytes, payload_bytes = self._number, len(data), frame.payload_bytes
        self._number += 1
        answered = self._send(data)

        def reply() -> Frame:
            try:
                received = answered()
                found = decode(
                    received,
                    self._limits,
                    kinds=(answer, Kind.ERROR),
                    number=number,
                    token=self._token,
                )
            except FedsplitError:
                self._hang_up()
                raise
            if {kind, answer} & ADAPTERS:
                self._stats += LinkStats(up_adapter_bytes=n_bytes, down_adapter_bytes=len(received))
            else:
                self._stats += LinkStats(n_bytes, len(received), payload_bytes, found.payload_bytes)
            if found.kind is Kind.ERROR:
                self._hang_up()
                raise LinkError(f"the next tier refused: {found.fields['reason']}")
            return found

        return reply
