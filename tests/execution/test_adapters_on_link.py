"""Adapters that a device fetches over its link train as those it is given."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.execution import TurnResult, compute, evaluate_turn, train_turn
from fedsplit.models import load
from fedsplit.plan import DEVICE, Route
from fedsplit.transport import InProcessLink, Limits, Link, LinkError, OpenRequest
from tests.tiny_split import BLOCKS, OPTIMIZER, Cluster, batches, differing, gpt2, initial

SPEC = gpt2()
ROUTE = Route.two_tier(BLOCKS, 2)
ROUTES = [
    ROUTE,
    Route.three_tier(BLOCKS, 1, 3),
    Route.u_shaped(BLOCKS, 1, 3),
    Route.parse("device[0:1] -> edge[1:2] -> cloud[2:3] -> device[3:4]", BLOCKS),
]
Adapters = dict[str, Tensor]


def of_device(route: Route, adapters: Adapters) -> Adapters:
    model = load(SPEC)
    names = {name for segment in route.on(DEVICE) for name in model.adapter_names(segment)}
    return {name: value for name, value in adapters.items() if name in names}


def train(link: Link, token: str, route: Route = ROUTE) -> TurnResult:
    return train_turn(
        compute(lambda: load(SPEC, route.on(DEVICE))),
        route,
        batches(3),
        adapters=None,
        optimizer=OPTIMIZER,
        seed=0,
        link=link,
        token=token,
    )


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Return a cluster reached in process."""
    with Cluster(SPEC) as found:
        yield found


@pytest.mark.parametrize("kind", ["in-process", "grpc"])
@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_fetched_adapters_train_as_given_ones(kind: str, route: Route) -> None:
    start = initial(SPEC)
    with Cluster(SPEC, kind) as cluster:
        given, expected = cluster.train(route, batches(3), start)
        own = of_device(route, start)
        tokens = cluster.open(route, start, fetched=own)
        first = route.segments[1].tier
        result = train(cluster.link(first), tokens[first], route)
        found: Adapters = {}
        for tier, token in tokens.items():
            found |= cluster.stage(tier).adapters(token)
    assert differing(found, expected) == []
    assert result.reports == given.reports
    # Adapters are counted apart from what crosses the cut.
    assert result.stats.up_payload_bytes == given.stats.up_payload_bytes
    assert abs(result.stats.up_bytes - given.stats.up_bytes) <= 16  # "true" is not "false"
    assert result.stats.down_bytes == given.stats.down_bytes
    size = sum(value.nbytes for value in own.values())
    for counted in (result.stats.up_adapter_bytes, result.stats.down_adapter_bytes):
        assert size < counted < 2 * size + 1000
    assert given.stats.up_adapter_bytes == given.stats.down_adapter_bytes == 0


def test_evaluation_fetches_and_hands_nothing_up(cluster: Cluster) -> None:
    start = initial(SPEC)
    expected = cluster.evaluate(ROUTE, batches(2), start)
    token = cluster.open(ROUTE, start, optimizer=None, fetched=of_device(ROUTE, start))["server"]
    found = evaluate_turn(
        compute(lambda: load(SPEC, ROUTE.on(DEVICE))),
        ROUTE,
        batches(2),
        adapters=None,
        seed=0,
        link=cluster.link("server"),
        token=token,
    )
    assert found.reports == expected.reports
    assert found.stats.down_adapter_bytes > 0


def test_many_adapters_travel_in_several_frames(cluster: Cluster) -> None:
    start = initial(SPEC)
    _, expected = cluster.train(ROUTE, batches(3), start)
    own = of_device(ROUTE, start)
    largest = max(value.nbytes for value in own.values())
    for limits in (Limits(tensors=5), Limits(frame_bytes=max(5 * largest, 20_000))):
        token = cluster.open(ROUTE, start, fetched=own)["server"]
        result = train(InProcessLink(cluster.stage("server"), limits), token)
        assert differing(result.adapters | cluster.stage("server").adapters(token), expected) == []
    token = cluster.open(ROUTE, start, fetched=own)["server"]
    tight = Limits(frame_bytes=2 * largest - 1)
    link = InProcessLink(cluster.stage("server"), tight)
    link.open(OpenRequest(token, ROUTE, 1, adapters_on_link=True))
    with pytest.raises(FedsplitError, match=rf"bytes={largest}: must be at most {largest - 1}"):
        link.fetch(own)


@pytest.mark.parametrize("route", ROUTES[:2], ids=str)
def test_a_device_may_come_before_its_adapters_are_known(route: Route) -> None:
    start = initial(SPEC)
    own = of_device(route, start)
    with Cluster(SPEC, "grpc") as cluster, ThreadPoolExecutor(1) as pool:
        _, expected = cluster.train(route, batches(3), start)
        tokens = cluster.open(route, start, fetched=own, supply=False)
        first = route.segments[1].tier
        device = pool.submit(train, cluster.link(first), tokens[first], route)
        # In any order; the tiers behind wait as the first does.
        for tier, token in tokens.items():
            time.sleep(0.3)
            assert not device.done()
            assert cluster.stage(tier).status(token).steps == 0
            cluster.stage(tier).supply(token, start, own if tier == first else None)
        device.result(60)
        found: Adapters = {}
        for tier, token in tokens.items():
            found |= cluster.stage(tier).adapters(token)
    assert differing(found, expected) == []


def test_a_device_that_waits_hears_when_its_turn_is_ended(cluster: Cluster) -> None:
    token = cluster.open(ROUTE, initial(SPEC), fetched={}, supply=False)["server"]
    with ThreadPoolExecutor(1) as pool:
        device = pool.submit(train, cluster.link("server"), token)
        time.sleep(0.2)
        cluster.stage("server").close_turn(token)
        with pytest.raises(LinkError, match="ended by its stage"):
            device.result(10)


def test_a_turn_is_supplied_once(cluster: Cluster) -> None:
    start = initial(SPEC)
    token = cluster.open(ROUTE, start)["server"]
    with pytest.raises(FedsplitError, match="were supplied to this turn before"):
        cluster.stage("server").supply(token, start)
    waiting = cluster.open(ROUTE, start, supply=False)["server"]
    with pytest.raises(FedsplitError, match="adapters_on_link=False: must be True"):
        cluster.stage("server").supply(waiting, start, start)


def _spoilt(own: Adapters, change: Callable[[str, Tensor], tuple[str, Tensor]]) -> Adapters:
    name, value = next(iter(own.items()))
    rest = {other: tensor for other, tensor in own.items() if other != name}
    return dict([change(name, value), *rest.items()])


BAD = {
    "another's": (lambda name, value: ("base_model.model.lm_head.weight", value), "must be one of"),
    "misshapen": (lambda name, value: (name, value[:, :1]), "shape="),
    "whole numbers": (lambda name, value: (name, value.long()), "dtype=torch.int64"),
    "not finite": (lambda name, value: (name, value / 0), "must be finite"),
    "too large": (lambda name, value: (name, value.double() * 1e300), "must be finite"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_handed_up_is_checked(fault: str, cluster: Cluster) -> None:
    change, complaint = BAD[fault]
    start = initial(SPEC)
    own = of_device(ROUTE, start)
    stage = cluster.stage("server")
    token = cluster.open(ROUTE, start, fetched=own)["server"]
    link = cluster.link("server")
    link.open(OpenRequest(token, ROUTE, 1, adapters_on_link=True))
    link.fetch(own)
    with pytest.raises(LinkError, match=complaint):
        link.hand_up(_spoilt(own, change))
    assert stage.status(token).state == "failed"
    with pytest.raises(FedsplitError, match="must be done"):
        stage.adapters(token)


def test_adapters_are_handed_up_once_and_whole(cluster: Cluster) -> None:
    start = initial(SPEC)
    own = of_device(ROUTE, start)

    def opened() -> Link:
        token = cluster.open(ROUTE, start, fetched=own)["server"]
        link = cluster.link("server")
        link.open(OpenRequest(token, ROUTE, 1, adapters_on_link=True))
        return link

    link = opened()
    with pytest.raises(LinkError, match="one of FETCH at this point"):
        link.hand_up(own)
    link = opened()
    link.fetch(own)
    with pytest.raises(LinkError, match="one of STEP, HAND_UP at this point"):
        link.close()
    link = opened()
    link.fetch(own)
    link.hand_up(dict([next(iter(own.items()))]))
    with pytest.raises(LinkError, match="must be handed up"):
        link.close()
    link = opened()
    link.fetch(own)
    link.hand_up(own)
    with pytest.raises(LinkError, match="must come once"):
        link.hand_up(own)


def test_nothing_is_fetched_unless_both_ends_mean_it(cluster: Cluster) -> None:
    start = initial(SPEC)
    token = cluster.open(ROUTE, start)["server"]
    with pytest.raises(LinkError, match="adapters_on_link=True: must be False"):
        train(cluster.link("server"), token)
    alone = Route.device_only(BLOCKS)
    with pytest.raises(FedsplitError, match="route that never leaves the device"):
        train_turn(load(SPEC), alone, [], adapters=None, optimizer=OPTIMIZER, seed=0)


def test_the_device_checks_what_it_fetches(cluster: Cluster) -> None:
    start = initial(SPEC)
    own = of_device(ROUTE, start)
    name = next(iter(own))
    for sent, complaint in (
        (own | {name: torch.full_like(own[name], float("nan"))}, "must be finite"),
        (own | {name: own[name][:1]}, "shape="),
        ({other: value for other, value in own.items() if other != name}, "must include"),
    ):
        token = cluster.open(ROUTE, start, fetched=sent)["server"]
        with pytest.raises(FedsplitError, match=complaint):
            train(cluster.link("server"), token)
        assert cluster.stage("server").status(token).state == "failed"
