"""How large the messages of a link are, apart from the boundaries that they carry."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch

from fedsplit.plan import Route
from fedsplit.profiles import Message, Messages, ModelProfile, TensorForm
from fedsplit.transport.frames import TOKEN_BYTES, Frame, Kind, Packed, encode
from fedsplit.transport.link import OpenRequest

_WITH_SAMPLES = {Kind.STEP, Kind.FORWARD}
_TOKEN = bytes(TOKEN_BYTES)
# Values of usual length: a message is a few bytes longer or shorter with others.
_SAMPLE, _SEED, _LOSS, _TARGETS = 1234, 1 << 62, 1 / 3, 1000
_NORM: dict[str, object] = {"norm": 1 / 3}
_SAY_NORM = {Kind.STEP, Kind.FORWARD, Kind.STEP_REPLY, Kind.BACKWARD_REPLY}


def with_messages(
    profile: ModelProfile, batch: int, *, clips: bool = False, accumulate: int = 1
) -> ModelProfile:
    """Return `profile` with the sizes of messages, as `encode` makes them of its `crossing`.

    Exact, but for the number of digits of losses, sample indices and the like, for mini-batches of
    `batch` samples. Where gradients are clipped, the norm goes with one of `accumulate`
    mini-batches; several of an update say their share of its targets.
    """
    crossing = profile.crossing
    at_home, onward = crossing.inputs, crossing.inputs | crossing.labels
    fields = {"loss": _LOSS, "targets": _TARGETS}
    share = {"share": 1 / 3} if accumulate > 1 else {}

    def message(
        kind: Kind,
        inputs: Mapping[str, TensorForm],
        carries: Literal["boundary", "gradient"] | None,
        **contents: object,
    ) -> Message:
        is_boundary = carries == "boundary"
        tensor = _packed(crossing.boundary, batch, is_boundary) if carries else None
        frame = Frame(
            kind,
            1,
            _TOKEN,
            inputs={name: _packed(form, batch) for name, form in inputs.items()},
            tensors=(tensor,),
            layout=crossing.layout if is_boundary else "",
            samples=(_SAMPLE,) * batch if kind in _WITH_SAMPLES else (),
            fields=contents,
        )
        n_bytes: float = len(encode(frame)) - frame.payload_bytes
        if clips and kind in _SAY_NORM:
            longer = replace(frame, fields={**contents, **_NORM})
            n_bytes += (len(encode(longer)) - len(encode(frame))) / accumulate
        per_sample = sum(form.itemsize * math.prod(form.shape) for form in inputs.values())
        return Message(n_bytes - batch * per_sample, per_sample)

    route = Route.two_tier(profile.n_blocks, min(1, profile.n_blocks))
    request = OpenRequest(_TOKEN.hex(), route, 1, seed=_SEED)
    enter = Frame(Kind.OPEN, 0, _TOKEN, request.agreed())
    entered, leave, left = (
        Frame(kind, 1, _TOKEN) for kind in (Kind.OPENED, Kind.CLOSE, Kind.CLOSED)
    )
    return replace(
        profile,
        messages=Messages(
            step=message(Kind.STEP, onward, "boundary", **share),
            step_reply=message(Kind.STEP_REPLY, {}, "gradient", **fields),
            forward=message(Kind.FORWARD, at_home, "boundary", **share),
            forward_reply=message(Kind.FORWARD_REPLY, {}, "boundary"),
            backward=message(Kind.BACKWARD, {}, "gradient"),
            backward_reply=message(Kind.BACKWARD_REPLY, {}, "gradient"),
            bare_step_reply=message(Kind.STEP_REPLY, {}, None, **fields),
            bare_backward_reply=message(Kind.BACKWARD_REPLY, {}, None),
            turn_up=len(encode(enter)) + len(encode(leave)),
            turn_down=len(encode(entered)) + len(encode(left)),
        ),
    )


def _packed(form: TensorForm, batch: int, needs_grad: bool = False) -> Packed:
    shape = (batch, *form.shape)
    payload = memoryview(bytes(form.itemsize * math.prod(shape)))
    return Packed(getattr(torch, form.dtype), shape, payload, needs_grad=needs_grad)
