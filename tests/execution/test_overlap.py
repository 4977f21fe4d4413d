"""Mini-batches of an update that are under way at once: the same bits, at other times."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from fedsplit.data import Batch
from fedsplit.execution import OptimizerSpec, compute, train_turn
from fedsplit.models import load
from fedsplit.plan import DEVICE, CodecPlan, Route
from fedsplit.transport import LinkError, StepReply, TurnBounds
from tests.tiny_split import BLOCKS, Cluster, batches, differing, gpt2, initial

ROUTES = [
    "device[0:4]",
    "device[0:1] -> server[1:4]",
    "device[0:0] -> server[0:4]",
    "device[0:1] -> edge[1:3] -> cloud[3:4]",
    "device[0:1] -> server[1:3] -> device[3:4]",
]
ONE_BY_ONE = OptimizerSpec(lr=1e-2, schedule="cosine", warmup=1, clip=1e-2, accumulate=4)
# Its senders draw, and remember what they left out.
CODEC = CodecPlan(
    {"name": "topk", "keep": 0.5},
    {"name": "error_feedback", "inner": {"name": "topk", "keep": 0.5}},
)
STEPS = 6  # the last update has two mini-batches


@pytest.mark.parametrize(
    ("kind", "overlap", "checkpointing"), [("in-process", 4, False), ("grpc", 2, True)]
)
def test_how_many_are_under_way_changes_no_bit(
    kind: str, overlap: int, checkpointing: bool
) -> None:
    model, data = gpt2(dropout=0.2), batches(STEPS)
    adapters, spec = initial(model), replace(ONE_BY_ONE, checkpointing=checkpointing)
    ahead = replace(spec, overlap=overlap)
    with Cluster(model, kind) as cluster:
        for text in ROUTES:
            route = Route.parse(text, BLOCKS)
            before, expected = cluster.train(route, data, adapters, spec, codec=CODEC)
            after, found = cluster.train(route, data, adapters, ahead, codec=CODEC)
            assert after.reports == before.reports, text
            assert differing(found, expected) == [], text
            assert after.stats == before.stats, text


class Watched:
    """A link that writes down when steps begin and when they are answered."""

    def __init__(self, link: Any) -> None:
        self._link = link
        self.said: list[str] = []
        self.begun = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def begin_step(self, *arguments: Any) -> Callable[[], StepReply]:
        answered = self._link.begin_step(*arguments)
        number = self.begun
        self.said.append(f"begin {number}")
        self.begun += 1

        def reply() -> StepReply:
            found = answered()
            self.said.append(f"end {number}")
            return found

        return reply


def turn(cluster: Cluster, spec: OptimizerSpec, data: list[Batch]) -> tuple[Watched, str, Any]:
    """Return a watched link, the token on the server, and how to run the device's turn."""
    route, adapters = Route.two_tier(BLOCKS, 1), initial(cluster.spec)
    tokens = cluster.open(route, adapters, spec, bounds=TurnBounds(steps=len(data)))
    link = Watched(cluster.link("server"))
    common: Mapping[str, Any] = {"adapters": adapters, "optimizer": spec, "seed": 0}

    def run() -> None:
        model = compute(lambda: load(cluster.spec, route.on(DEVICE)))
        train_turn(model, route, data, link=link, token=tokens["server"], **common)  # type: ignore[arg-type]

    return link, tokens["server"], run


@pytest.mark.parametrize(
    ("overlap", "order"),
    [
        (1, "begin 0 end 0 begin 1 end 1 begin 2 end 2 begin 3 end 3"),
        (2, "begin 0 begin 1 end 0 begin 2 end 1 end 2 begin 3 end 3"),
        (3, "begin 0 begin 1 begin 2 end 0 end 1 end 2 begin 3 end 3"),
    ],
)
def test_the_next_forward_pass_comes_before_the_last_backward_pass_and_updates_stay_apart(
    overlap: int, order: str
) -> None:
    spec = OptimizerSpec(lr=1e-2, accumulate=3, overlap=overlap)
    with Cluster(gpt2(), "grpc") as cluster:
        link, _, run = turn(cluster, spec, batches(4))
        run()
    assert " ".join(link.said) == order


@pytest.mark.parametrize("kind", ["in-process", "grpc"])
def test_a_mini_batch_that_is_refused_ends_its_turn_whatever_else_is_under_way(kind: str) -> None:
    spec = OptimizerSpec(lr=1e-2, accumulate=4, overlap=3)
    data = batches(4)
    wrong = data[1].inputs["labels"].clone()
    wrong[0, 3] = 10**6
    data[1] = replace(data[1], inputs={**data[1].inputs, "labels": wrong})
    with Cluster(gpt2(), kind) as cluster:
        _, token, run = turn(cluster, spec, data)
        with pytest.raises(LinkError, match="labels=.*must be within"):
            run()
        assert cluster.stage("server").status(token).state == "failed"
        _, fine, again = turn(cluster, spec, batches(4))
        again()
        assert cluster.stage("server").status(fine).state == "done"
