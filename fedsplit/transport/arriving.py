"""A frame against what its receiver knows must come, before anything of it is unpacked."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedsplit.models import Arrival, Crossing
from fedsplit.transport.frames import Frame, FrameError, Packed
from fedsplit.transport.link import TurnBounds
from fedsplit.transport.tensors import unpack_inputs


def tokens_of(inputs: Mapping[str, Tensor] | Mapping[str, Packed]) -> int:
    """Return the tokens of a mini-batch's samples; images count as one."""
    mask = inputs.get("attention_mask")
    return 1 if mask is None or len(mask.shape) < 2 else mask.shape[1]


def check_step(
    frame: Frame, arrival: Arrival, bounds: TurnBounds, frame_bytes: int
) -> tuple[Tensor | None, ...]:
    """Refuse a mini-batch that is not what must arrive.

    Parameters
    ----------
    frame : Frame
        Of its payload only the mask is looked at, once that is known to be one.
    arrival : Arrival
        Names, types and shapes of the inputs, and the boundary.
    bounds : TurnBounds
        Samples and tokens at most.
    frame_bytes : int
        What the boundary may take once it is unpacked.

    Returns
    -------
    tuple of Tensor or None
        What came of the boundary's tensors (`Boundary.kept`): all of it, or what the mask keeps.

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
    crossing = arrival.boundary
    where = None
    if "attention_mask" in frame.inputs and any(
        form.by_token and item is not None and len(item.shape) < len(form.axes)
        for item, form in zip(frame.tensors, crossing.forms, strict=False)
    ):
        where = unpack_inputs({"mask": frame.inputs["attention_mask"]})["mask"]
    kept = crossing.kept(where)
    check_boundary(frame.tensors, frame.layout, crossing, samples, tokens, kept)
    unpacked = crossing.size_bytes(samples, tokens)
    _check(unpacked <= frame_bytes, "boundary bytes", unpacked, f"at most {frame_bytes}")
    return kept


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
    kept: Sequence[Tensor | None] = (),
) -> None:
    """Refuse a boundary that is not what is `kept` of one in a mini-batch of this size.

    Raises
    ------
    FrameError
        If its layout, its number of tensors, or the type or shape of one differs.
    """
    _check(layout == crossing.layout, "layout", layout, crossing.layout)
    count = len(crossing.forms)
    _check(len(tensors) == count, "tensors", len(tensors), f"{count}, as the boundary has")
    marks = kept or (None,) * count
    for index, (item, form, where) in enumerate(zip(tensors, crossing.forms, marks, strict=True)):
        if item is None:
            raise FrameError("tensors: must all be present in a boundary")
        shape = form.shape(samples, tokens)
        if where is not None:
            shape = (int(where.sum()), *shape[2:])
        _check_form(f"tensors[{index}]", item, shape, form.dtype)


def _check_form(name: str, item: Packed, shape: tuple[int, ...], dtype: object) -> None:
    found, wanted = f"{item.shape} {item.dtype}", f"{shape} {dtype}"
    _check(found == wanted, name, found, wanted)


def _check(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise FrameError(f"{name}={value!r:.80}: must be {allowed:.200}")
