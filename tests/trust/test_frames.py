"""Whoever has a token sends what he likes: it is refused in one line, before it costs anything."""

import json
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.execution import compute, train_turn
from fedsplit.models import load
from fedsplit.plan import DEVICE, CodecPlan, Route
from fedsplit.transport import InProcessLink, TurnBounds
from fedsplit.transport.frames import Frame, Kind, Packed
from fedsplit.transport.tensors import pack_inputs
from tests.models.test_boundary import HOSTILE
from tests.tiny_split import BLOCKS, OPTIMIZER, Cluster, batches, initial
from tests.trust.besieged import (
    HOME,
    ROUTE,
    SPEC,
    Besieged,
    Peer,
    honest_step,
    model_of,
    opening,
)

TOPK = CodecPlan({"name": "topk", "keep": 0.1})


def _with_inputs(frame: Frame, **inputs: Tensor | None) -> Frame:
    """Return `frame` with inputs added, changed, or (None) left out."""
    kept = {name: item for name, item in frame.inputs.items() if name not in inputs}
    added = {name: value for name, value in inputs.items() if value is not None}
    return replace(frame, inputs=kept | pack_inputs(added))


def _with_tensors(frame: Frame, *tensors: Packed | None) -> Frame:
    return replace(frame, tensors=tensors)


def _reshaped(frame: Frame, *shape: int) -> Frame:
    """Return `frame` with a boundary of another shape, of as many bytes as that takes."""
    (item,) = frame.tensors
    assert item is not None
    size = 4 * torch.Size(shape).numel()
    return _with_tensors(frame, replace(item, shape=shape, payload=memoryview(bytes(size))))


def _flagged(frame: Frame, name: str, **flags: bool) -> Frame:
    return replace(frame, inputs={**frame.inputs, name: replace(frame.inputs[name], **flags)})


LABELS = torch.full((2, 8), 5, dtype=torch.int32)
MASK = torch.ones(2, 8, dtype=torch.bool)
POSITIONS = torch.arange(8, dtype=torch.int32).expand(2, 8)

NAMES: dict[str, tuple[Callable[[Frame], Frame], str]] = {
    "a keyword of forward": (
        lambda frame: _with_inputs(frame, num_items_in_batch=torch.tensor(1e-9)),
        "num_items_in_batch",
    ),
    "another keyword": (lambda f: _with_inputs(f, inputs_embeds=torch.ones(2, 8, 32)), "inputs_em"),
    "token ids unasked": (lambda f: _with_inputs(f, input_ids=LABELS), "input_ids"),
    "a name like code": (lambda f: _with_inputs(f, __class__=LABELS), "__class__"),
    "no mask": (lambda f: _with_inputs(f, attention_mask=None), "mask|tensors"),
    "no labels": (lambda f: _with_inputs(f, labels=None), "with labels"),
}
FORMS: dict[str, tuple[Callable[[Frame], Frame], str]] = {
    "labels of floats": (lambda f: _with_inputs(f, labels=LABELS.float()), "labels.*int32"),
    "labels of 64 bits": (lambda f: _with_inputs(f, labels=LABELS.long()), "labels.*int32"),
    "labels of another batch": (lambda f: _with_inputs(f, labels=LABELS[:1]), "labels"),
    "labels without axes": (lambda f: _with_inputs(f, labels=LABELS[0, 0]), "labels"),
    "a mask of bytes": (lambda f: _with_inputs(f, attention_mask=MASK.byte()), "attention_mask"),
    "a mask of four axes": (
        lambda f: _with_inputs(f, attention_mask=MASK[:, None, None]),
        "attention_mask",
    ),
    "a longer mask": (
        lambda f: _with_inputs(f, attention_mask=torch.ones(2, 7, dtype=torch.bool)),
        "must be",
    ),
    "a mask for a gradient": (lambda f: _flagged(f, "labels", needs_grad=True), "flags|dtype"),
    "one boundary more": (lambda f: _with_tensors(f, *f.tensors, *f.tensors), "tensors=2"),
    "no boundary": (lambda f: _with_tensors(f), "tensors=0"),
    "a boundary left out": (lambda f: _with_tensors(f, None), "present"),
    "a wider boundary": (lambda f: _reshaped(f, 2, 8, 64), "tensors"),
    "a boundary turned round": (lambda f: _reshaped(f, 8, 2, 32), "tensors"),
    "an empty boundary": (lambda f: _reshaped(f, 0, 8, 32), "tensors"),
    "one sample less": (lambda f: replace(f, samples=(0,)), "must be"),
    "no samples": (lambda f: replace(f, samples=()), "samples=0"),
}
RANGES: dict[str, tuple[Callable[[Frame], Frame], str]] = {
    "a label beyond the vocabulary": (lambda f: _with_inputs(f, labels=LABELS + 60), "labels=.*63"),
    "a negative label": (lambda f: _with_inputs(f, labels=LABELS - 6), "labels"),
    "the least label": (lambda f: _with_inputs(f, labels=LABELS * 0 - (1 << 31)), "labels"),
    "a position beyond the last": (
        lambda f: _with_inputs(f, position_ids=POSITIONS + 9),
        "position_ids",
    ),
    "a negative position": (lambda f: _with_inputs(f, position_ids=POSITIONS - 1), "position_ids"),
}


def _many(frame: Frame) -> Frame:
    (item,) = frame.tensors
    assert item is not None
    small = replace(item, shape=(2, 8, 1 << 20), payload=item.payload[:92], coded=True)
    return _with_tensors(frame, *[small] * 24)


def _large(samples: int, tokens: int) -> Callable[[Frame], Frame]:
    def change(frame: Frame) -> Frame:
        (item,) = frame.tensors
        assert item is not None
        mask = torch.ones(samples, tokens, dtype=torch.bool)
        wide = replace(item, shape=(samples, tokens, 32), payload=item.payload[:92], coded=True)
        labels = mask.to(torch.int32)
        frame = _with_inputs(frame, attention_mask=mask, labels=labels)
        return replace(frame, tensors=(wide,), samples=tuple(range(min(samples, 16000))))

    return change


SIZES: dict[str, tuple[Callable[[Frame], Frame], str]] = {
    "24 tensors of 92 bytes": (_many, "tensors=24"),
    "a mask of 20,000 tokens": (_large(1, 20_000), "tokens=20000"),
    "a batch of 20,000": (_large(20_000, 8), "samples"),
    "one sample too many": (_large(3, 8), "samples=3"),
    "one token too many": (_large(2, 9), "tokens=9"),
}


@pytest.mark.parametrize("codec", [CodecPlan(), TOPK], ids=["plain", "topk"])
@pytest.mark.parametrize(
    "table", [NAMES, FORMS, RANGES, SIZES], ids=["names", "forms", "ranges", "sizes"]
)
def test_what_must_not_arrive_is_refused_by_name(
    table: dict[str, tuple[Callable[[Frame], Frame], str]], codec: CodecPlan, besieged: Besieged
) -> None:
    device = model_of(ROUTE)

    def attack(address: str) -> None:
        with Peer(address) as peer:
            for name, (change, reason) in table.items():
                token = besieged.open(codec=codec)
                frame = change(honest_step(device, token, codec=codec))
                found = peer.refusal(opening(token, codec=codec), frame)
                assert re.search(reason, found), (name, found)
                assert "\n" not in found, name
                assert len(found) < 500, name
                status = besieged.stage.status(token)
                assert (status.state, status.steps) == ("failed", 0), name
                besieged.stage.close_turn(token)

    besieged.withstand(attack)


def test_a_device_that_means_well_may_send_positions(besieged: Besieged) -> None:
    device = model_of(ROUTE)
    with besieged.serving() as address, Peer(address) as peer:
        token = besieged.open()
        frame = _with_inputs(honest_step(device, token), position_ids=POSITIONS)
        assert peer.say(opening(token), frame).kind is Kind.STEP_REPLY


def test_no_layout_runs_anything_on_a_server(besieged: Besieged) -> None:
    devices = {route: model_of(route) for route in (ROUTE, HOME)}

    def attack(address: str) -> None:
        with Peer(address) as peer:
            for name, layout in HOSTILE.items():
                for route, kind in ((ROUTE, Kind.STEP), (HOME, Kind.FORWARD)):
                    token = besieged.open(route)
                    frame = honest_step(devices[route], token, route, kind)
                    found = peer.refusal(opening(token, route), replace(frame, layout=layout))
                    assert "layout" in found, name
                    assert "\n" not in found, name
                    besieged.stage.close_turn(token)

    besieged.withstand(attack)


EDGE_HOME = Route.parse("device[0:1] -> edge[1:2] -> cloud[2:3] -> device[3:4]", BLOCKS)
THREE = Route.three_tier(BLOCKS, 1, 2)


@pytest.mark.parametrize("layout", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("who", ["a device", "an edge, from its cloud", "an edge, from a device"])
def test_no_layout_runs_anything_on_edges_and_devices(who: str, layout: str) -> None:
    class Liar(InProcessLink):
        """A link on which one of the two ends sends a layout of its own."""

        def _send(self, frame: bytes) -> Callable[[], bytes]:
            honest = json.dumps('{"output":1,"shared":{}}').encode()
            other = json.dumps(layout).encode()
            if who == "an edge, from a device":
                return super()._send(_replaced(frame, honest, other))
            answer = super()._send(frame)
            return lambda: _replaced(answer(), honest, other)

    route = THREE if who == "an edge, from a device" else EDGE_HOME
    with Cluster(SPEC) as cluster:
        adapters = initial(SPEC)
        if who == "an edge, from its cloud":
            cluster.link = lambda tier: Liar(cluster.stage(tier))  # type: ignore[method-assign]
        tokens = cluster.open(route, adapters)
        edge = cluster.stage("edge")
        link = InProcessLink(edge) if who == "an edge, from its cloud" else Liar(edge)
        with pytest.raises(FedsplitError, match="layout") as caught:
            train_turn(
                compute(lambda: load(SPEC, route.on(DEVICE))),
                route,
                batches(1),
                adapters=adapters,
                optimizer=OPTIMIZER,
                seed=0,
                link=link,
                token=tokens["edge"],
            )
        assert "\n" not in str(caught.value)
        assert edge.status(tokens["edge"]).state == "failed"


def _replaced(frame: bytes, old: bytes, new: bytes) -> bytes:
    """Return a frame with part of its header replaced, and a prefix that says so."""
    if old not in frame:
        return frame
    size = int.from_bytes(frame[12:16], "little")
    header = frame[48 : 48 + size].replace(old, new)
    return (
        frame[:12] + len(header).to_bytes(4, "little") + frame[16:48] + header + frame[48 + size :]
    )


def test_gradients_are_checked_before_they_are_unpacked(besieged: Besieged) -> None:
    device = model_of(HOME)

    def attack(address: str) -> None:
        with Peer(address) as peer:
            for shape, codec in (((8, 2, 32), None), ((2, 8, 1 << 20), TOPK), ((), None)):
                token = besieged.open(HOME, codec)
                settings = codec or CodecPlan()
                step = honest_step(device, token, HOME, Kind.FORWARD, codec)
                size = 92 if codec else 4 * torch.Size(shape).numel()
                item = Packed(torch.float32, shape, memoryview(bytes(size)), codec is not None)
                back = Frame(Kind.BACKWARD, 2, bytes.fromhex(token), tensors=(item,))
                assert "gradients" in peer.refusal(opening(token, HOME, codec=settings), step, back)

    besieged.withstand(attack)


def test_an_evaluation_is_checked_as_a_step(besieged: Besieged) -> None:
    device = model_of(ROUTE)
    with besieged.serving() as address, Peer(address) as peer:
        for change, reason in (NAMES["a keyword of forward"], SIZES["one token too many"]):
            token = besieged.open(optimizer=None)
            frame = change(honest_step(device, token, kind=Kind.EVALUATE))
            found = peer.refusal(opening(token, train=False), frame)
            assert re.search(reason, found), found


def test_steps_beyond_the_plan_are_not_computed(besieged: Besieged) -> None:
    device = model_of(ROUTE)

    def attack(address: str) -> None:
        with Peer(address) as peer:
            bounds = TurnBounds(samples=2, tokens=8, steps=2)
            token = besieged.open(bounds=bounds)
            steps = [honest_step(device, token, number=number) for number in (1, 2, 3)]
            assert "steps=3: must be at most 2" in peer.refusal(opening(token), *steps)
            token = besieged.open(bounds=bounds)
            early = Frame(Kind.CLOSE, 1, bytes.fromhex(token))
            assert "steps=0: must be 2" in peer.refusal(opening(token), early)

    besieged.withstand(attack)
