"""A frame against what its receiver knows must come, before anything of it is unpacked."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedsplit.models import Arrival, Crossing
from fedsplit.transport.frames import Frame, FrameError, Packed
from fedsplit.transport.link import TurnBounds


def tokens_of(inputs: Mapping[str, Tensor] | Mapping[str, Packed]) -> int:
    """Return the tokens of a mini-batch's samples; images count as one."""
    mask = inputs.get("attention_mask")
    return 1 if mask is None or len(mask.shape) < 2 else mask.shape[1]


def check_step(frame: Frame, arrival: Arrival, bounds: TurnBounds, frame_bytes: int) -> None:
    """Refuse a mini-batch that is not what must arrive.

    Parameters
    ----------
    frame : Frame
        Nothing of its payload is touched.
    arrival : Arrival
        Names, types and shapes of the inputs, and the boundary.
    bounds : TurnBounds
        Samples and tokens at most.
    frame_bytes : int
        What the boundary may take once it is unpacked.

    Raises
    ------
    FrameError
        If it is another number of samples or tokens, an input is missing, not known or of another
        form, or so is the boundary.
    """
    samples, tokens = len(frame.samples), tokens_of(frame.inputs)
    _check(1 <= samples <= bounds.samples, "samples", samples, f"1 to {bounds.samples}")
    _check(1 <= tokens <= bounds.tokens, "tokens", tokens, f"1 to {bounds.tokens}")
    for name in frame.inputs:
        known = ", ".join(arrival.inputs)
        _check(name in arrival.inputs, "input", name, f"one of {known} in this turn")
    for name, form in arrival.inputs.items():
        if name not in frame.inputs:
            _check(form.optional, "inputs", sorted(frame.inputs), f"with {name}")
            continue
        item = frame.inputs[name]
        _check(not (item.coded or item.needs_grad), f"{name} flags", "1 or 2", "0, as it is")
        _check_form(name, item, form.shape(samples, tokens), form.dtype)
    check_boundary(frame.tensors, frame.layout, arrival.boundary, samples, tokens)
    unpacked = sum(item.size_bytes for item in frame.tensors if item is not None)
    _check(unpacked <= frame_bytes, "boundary bytes", unpacked, f"at most {frame_bytes}")


def check_inputs(inputs: Mapping[str, Tensor], arrival: Arrival) -> None:
    """Refuse inputs with a value out of range.

    Raises
    ------
    FrameError
        If one has.
    """
    for name, values in inputs.items():
        form = arrival.inputs[name]
        if not form.holds(values):
            span = int(values.min()), int(values.max())
            also = "" if form.ignored is None else f", or {form.ignored}"
            raise FrameError(f"{name}={span}: must be within 0 to {form.stop - 1}{also}")


def check_boundary(
    tensors: Sequence[Packed | None],
    layout: str,
    crossing: Crossing,
    samples: int,
    tokens: int,
) -> None:
    """Refuse a boundary that is not what crosses the cut in a mini-batch of this size.

    Raises
    ------
    FrameError
        If its layout, its number of tensors, or the type or shape of one differs.
    """
    _check(layout == crossing.layout, "layout", layout, crossing.layout)
    count = len(crossing.forms)
    _check(len(tensors) == count, "tensors", len(tensors), f"{count}, as the boundary has")
    for index, (item, form) in enumerate(zip(tensors, crossing.forms, strict=True)):
        if item is None:
            raise FrameError("tensors: must all be present in a boundary")
        _check_form(f"tensors[{index}]", item, form.shape(samples, tokens), form.dtype)


def _check_form(name: str, item: Packed, shape: tuple[int, ...], dtype: object) -> None:
    found, wanted = f"{item.shape} {item.dtype}", f"{shape} {dtype}"
    _check(found == wanted, name, found, wanted)


def _check(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise FrameError(f"{name}={value!r:.80}: must be {allowed:.200}")
