"""A node's answer is checked: what is wrong with it costs that node its turn, nobody else's."""

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fedsplit.strategies.fedlora import FedLora
from fedsplit.strategies.splitfed import SplitFed
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedsplit.errors import FedsplitError
from fedsplit.flower import client_app
from fedsplit.flower.messages import EVALUATE, HELLO, TRAIN
from fedsplit.patience import Patience
from fedsplit.testing.federation import N_DEVICES, Federation
from tests.flower.conftest import federation

__all__ = ["federation"]

LIAR = 1
Change = Callable[[RecordDict], None]


def metric(name: str, value: Any) -> Change:
    """Say `value` in place of the number `name`."""

    def change(content: RecordDict) -> None:
        content["metrics"] = MetricRecord({**content.metric_records["metrics"], name: value})

    return change


def without(record: str, name: str | None = None) -> Change:
    def change(content: RecordDict) -> None:
        if name is None:
            del content[record]
        else:
            del content.metric_records[record][name]

    return change


def adapter(make: Callable[[np.ndarray], Array | np.ndarray]) -> Change:
    """Give another array in place of the first adapter."""

    def change(content: RecordDict) -> None:
        arrays = dict(content.array_records["arrays"])
        name = next(iter(arrays))
        made = make(arrays[name].numpy())
        arrays[name] = made if isinstance(made, Array) else Array(made)
        content["arrays"] = ArrayRecord(arrays)

    return change


def raw(data: bytes, stype: str = "numpy.ndarray") -> Callable[[np.ndarray], Array]:
    return lambda value: Array("float32", value.shape, stype, data)


def header(shape: tuple[int, ...], descr: str = "<f4", values: bytes = b"") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue() + values


def renamed(content: RecordDict) -> None:
    arrays = dict(content.array_records["arrays"])
    arrays["mine"] = arrays.pop(next(iter(arrays)))
    content["arrays"] = ArrayRecord(arrays)


def one_more(content: RecordDict) -> None:
    arrays = dict(content.array_records["arrays"])
    content["arrays"] = ArrayRecord({**arrays, "more": Array(np.zeros(3, np.float32))})


def classes(content: RecordDict) -> None:
    for at in range(3):
        content.metric_records["metrics"][f"class-{at}"] = 1


def pickled() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return stream.getvalue()


WRONG: dict[str, tuple[Change, str]] = {
    "no metrics": (without("metrics"), "must carry metrics"),
    "no loss": (without("metrics", "loss-sum"), "loss-sum must be"),
    "no steps": (without("metrics", "steps"), "steps=None must be"),
    "a loss that is no number": (metric("loss-sum", float("nan")), "must be a finite number"),
    "an infinite loss": (metric("loss-sum", float("inf")), "must be a finite number"),
    "a list for a count": (metric("n-targets", [1, 2]), "must be a finite number"),
    "half a target": (metric("n-targets", 1.5), "must be a whole number"),
    "negative targets": (metric("n-targets", -5), "must be a whole number"),
    "more targets than samples hold": (metric("n-targets", 10**12), "must be at most"),
    "more samples than steps hold": (metric("n-samples", 10**9), "must be at most"),
    "classes that do not add up": (classes, "must add up to"),
    "more right than targets": (metric("n-correct", 10**9), "must be at most"),
    "fewer steps than planned": (metric("steps", 0), "steps=0 must be 2"),
    "more steps than planned": (metric("steps", 300), "steps=300 must be 2"),
    "bytes beyond counting": (metric("bytes-up", 1e300), "bytes-up"),
    "seconds that are none": (metric("compute-s", -1.0), "compute-s=-1.0 must be at least 0"),
    "half a byte of memory": (metric("peak-bytes", 0.5), "peak-bytes=0.5 must be a whole number"),
    "no adapters": (without("arrays"), "0 came back|came back of"),
    "another name": (renamed, "adapter|came back"),
    "one adapter more": (one_more, "came back of"),
    "another shape": (adapter(lambda v: np.zeros(7, np.float32)), "came back as"),
    "int64": (adapter(lambda v: v.astype(np.int64)), "came back as torch.int64"),
    "float64": (adapter(lambda v: v.astype(np.float64)), "came back as torch.float64"),
    "bool": (adapter(lambda v: v > 0), "came back as torch.bool"),
    "complex": (adapter(lambda v: v.astype(np.complex64)), "came back as torch.complex64"),
    "text": (adapter(lambda v: v.astype("U8")), "cannot be read"),
    "NaN": (adapter(lambda v: v * np.nan), "not finite"),
    "absurd": (adapter(lambda v: v + np.float32(1e20)), "their update has the norm"),
    "garbage": (adapter(raw(b"\x93NUMPY garbage")), "cannot be read"),
    "nothing": (adapter(raw(b"")), "cannot be read"),
    "a header of 3.6 TiB": (adapter(raw(header((10**12,)))), "cannot be read"),
    "a header beyond integers": (adapter(raw(header((2**62, 2**62)))), "cannot be read"),
    "a header that is code": (
        adapter(raw(b"\x93NUMPY\x01\x00\x20\x00__import__('os').abort()        \n")),
        "cannot be read",
    ),
    "pickled objects": (adapter(raw(pickled())), "cannot be read"),
    "another kind of array": (adapter(raw(header((1,)), "torch.pickle")), "cannot be read"),
}


def lying(kind: str, change: Change) -> ClientApp:
    """Return the app of honest devices, but for one that changes its answers of one kind."""
    honest, app = client_app(), ClientApp()

    def answered(message: Message, context: Context) -> Message:
        reply = honest(message, context)
        device = int(context.node_config["partition-id"])
        if device == LIAR and message.metadata.message_type == kind and not reply.has_error():
            change(reply.content)
        return reply

    app.query("node")(answered)
    app.train("device")(answered)
    app.evaluate("device")(answered)
    return app


@pytest.fixture(scope="module")
def alone(federation: Federation) -> dict[str, torch.Tensor]:
    """Return what the other devices train without the liar."""

    def disturb(message: Message, device: int) -> None:
        if device == LIAR and message.metadata.message_type == TRAIN:
            raise RuntimeError("not there")

    return federation.run(FedLora(), disturb=disturb)[0]


@pytest.mark.parametrize(("change", "complaint"), WRONG.values(), ids=WRONG)
def test_a_wrong_answer_to_a_turn_costs_that_turn(
    federation: Federation, alone: dict[str, torch.Tensor], change: Change, complaint: str
) -> None:
    found, outcomes = federation.run(FedLora(), app=lying(TRAIN, change))
    (failure,) = outcomes[1].failures
    assert (failure.who, failure.phase) == (f"device {LIAR}", "train")
    assert any(part in failure.reason for part in complaint.split("|")), failure.reason
    assert len(failure.reason) < 300
    assert all(torch.equal(found[name], alone[name]) for name in alone)


@pytest.mark.parametrize("name", ["no metrics", "a loss that is no number", "negative targets"])
def test_a_wrong_answer_to_an_evaluation_costs_that_device(
    federation: Federation, name: str
) -> None:
    change, _ = WRONG[name]
    _, outcomes = federation.run(SplitFed(cut=2), app=lying(EVALUATE, change))
    assert {failure.who for failure in outcomes[1].failures} == {f"device {LIAR}"}
    assert len(outcomes[1].evaluation) == N_DEVICES - 1


def info(name: str, value: str) -> Change:
    def change(content: RecordDict) -> None:
        content["info"] = ConfigRecord({**content.config_records["info"], name: value})

    return change


@pytest.mark.parametrize(
    "change",
    [
        metric("n-train", float("nan")),
        metric("n-train", 10**18),
        metric("n-train", 0),
        metric("n-train", -5),
        metric("n-train", [3]),
        metric("index", 99),
        metric("index", 1.5),
        without("metrics", "n-train"),
        without("metrics"),
        without("info"),
        info("source", "another"),
        info("role", "admin"),
        info("left-out", "[1]"),
        info("left-out", "[" * 9999),
        metric("train-read", -1),
        info("profile", "{"),
        info("profile", "[" * 50_000),
        info("profile", "x" * 10**6),
        info("profile", '{"model": "m", "seq_len": 8, "batch": 1, "forward_s": [1e999, 1]}'),
    ],
)
def test_a_node_that_says_what_cannot_be_is_left_out_and_named(
    federation: Federation, change: Change
) -> None:
    with pytest.raises(FedsplitError, match=rf"fleet: device {LIAR} is missing \(left out: .+\)"):
        federation.run(SplitFed(cut=2), app=lying(HELLO, change), patience=Patience(connect_s=10))


def test_what_travels_is_json_and_arrays_only(federation: Federation) -> None:
    """No message of a round carries anything that would have to be unpickled."""
    seen: list[Message] = []
    federation.run(SplitFed(cut=2), disturb=lambda message, device: seen.append(message))
    for message in seen:
        for record in message.content.array_records.values():
            assert all(array.stype == "numpy.ndarray" for array in record.values())
        for config in message.content.config_records.values():
            assert json.loads(str(config["json"]))
