"""A stage serves many branches side by side, none disturbed by another's failure."""

import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fedsplit.errors import FedsplitError
from fedsplit.execution import compute, train_turn
from fedsplit.execution.tier import Tier
from fedsplit.models import Boundary, Crossing, SplitModel, load
from fedsplit.plan import DEVICE, Route
from fedsplit.transport import LinkError, OpenRequest, ServerLimits, new_token
from tests.tiny_split import BLOCKS, OPTIMIZER, WHERE, Cluster, batches, differing, gpt2, initial

SPEC = gpt2()
ROUTE = Route.two_tier(BLOCKS, 2)
HOME = Route.u_shaped(BLOCKS, 1, 3)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Return a cluster reached in process."""
    with Cluster(SPEC) as found:
        yield found


def _train(cluster: Cluster, data: Any, token: str, route: Route = ROUTE) -> Any:
    return train_turn(
        compute(lambda: load(SPEC, route.on(DEVICE), WHERE)),
        route,
        data,
        adapters=initial(SPEC),
        optimizer=OPTIMIZER,
        seed=0,
        link=cluster.link("server"),
        token=token,
    )


def test_a_stage_tells_how_a_turn_stands(cluster: Cluster) -> None:
    stage = cluster.stage("server")
    token = cluster.open(ROUTE, initial(SPEC))["server"]
    seen = [stage.status(token)]

    def watching() -> Iterator[Any]:
        for batch in batches(3):
            seen.append(stage.status(token))
            with pytest.raises(FedsplitError, match="must be done"):
                stage.adapters(token)
            yield batch

    _train(cluster, watching(), token)
    seen.append(stage.status(token))
    assert [(status.state, status.steps) for status in seen] == [
        ("waiting", 0),
        ("active", 0),
        ("active", 1),
        ("active", 2),
        ("done", 3),
    ]
    stage.close_turn(token)
    with pytest.raises(LinkError, match="no turn"):
        stage.status(token)
    stage.close_turn(token)


def test_a_middle_tier_knows_what_its_own_link_carried(cluster: Cluster) -> None:
    route = Route.three_tier(BLOCKS, 1, 3)
    tokens = cluster.open(route, initial(SPEC))
    result = train_turn(
        load(SPEC, route.on(DEVICE)),
        route,
        batches(2),
        adapters=initial(SPEC),
        optimizer=OPTIMIZER,
        seed=0,
        link=cluster.link("edge"),
        token=tokens["edge"],
    )
    onward = cluster.stage("edge").status(tokens["edge"]).stats
    assert onward.up_payload_bytes == result.stats.up_payload_bytes
    assert onward.up_bytes > onward.up_payload_bytes
    assert cluster.stage("cloud").status(tokens["cloud"]).stats.up_bytes == 0


def test_a_token_names_one_turn(cluster: Cluster) -> None:
    request = OpenRequest(new_token(), ROUTE, 1)
    cluster.stage("server").open_turn(request, initial(SPEC), OPTIMIZER)
    with pytest.raises(FedsplitError, match="in use"):
        cluster.stage("server").open_turn(request, initial(SPEC), OPTIMIZER)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_fails_its_own_turn_only(bad: float, cluster: Cluster) -> None:
    stage = cluster.stage("server")
    adapters = initial(SPEC)
    _, expected = cluster.train(ROUTE, batches(2), adapters)
    spoilt = {name: torch.full_like(value, bad) for name, value in adapters.items()}
    lost = cluster.open(ROUTE, spoilt)["server"]
    fine = cluster.open(ROUTE, adapters)["server"]

    def data() -> Iterator[Any]:
        yield batches(2)[0]
        with pytest.raises(LinkError, match="loss.*must be finite"):
            _train(cluster, batches(2), lost)
        yield batches(2)[1]

    result = _train(cluster, data(), fine)
    assert differing(result.adapters | stage.adapters(fine), expected) == []
    assert stage.status(lost).state == "failed"
    assert "must be finite" in stage.status(lost).reason


def test_gradients_that_are_not_finite_are_refused_by_name() -> None:
    segment = ROUTE.segments[0]
    tier = Tier(load(SPEC, [segment]), [segment], initial(SPEC), OPTIMIZER, 0)
    produced = tier.forward(segment, batches(1)[0].inputs)
    assert isinstance(produced, Boundary)
    gradients = (torch.full_like(produced.tensors[0], float("nan")),)
    with pytest.raises(FedsplitError, match=r"gradient of .*lora.*must be finite"):
        tier.backward(produced, gradients)


def test_a_turn_that_its_stage_ends_fails_at_the_next_call(cluster: Cluster) -> None:
    token = cluster.open(ROUTE, initial(SPEC))["server"]

    def data() -> Iterator[Any]:
        yield batches(1)[0]
        cluster.stage("server").close_turn(token)
        yield batches(1)[0]

    with pytest.raises(LinkError, match="ended by its stage"):
        _train(cluster, data(), token)


def test_a_stage_can_end_a_turn_in_mid_step(cluster: Cluster) -> None:
    token = cluster.open(HOME, initial(SPEC))["server"]
    link = cluster.link("server")
    inputs, boundary = _first_boundary(HOME)
    link.open(OpenRequest(token, HOME, 1), _returning(HOME))
    link.forward(inputs, boundary, (0, 1))
    cluster.stage("server").close_turn(token)
    _, adapters = cluster.train(ROUTE, batches(1), initial(SPEC))
    assert adapters
    with pytest.raises(LinkError, match="ended by its stage"):
        link.backward((torch.zeros(2, 8, 32),))


def test_a_busy_stage_still_lets_others_in() -> None:
    with Cluster(SPEC, "grpc") as cluster:
        first, second = (cluster.open(HOME, initial(SPEC))["server"] for _ in range(2))
        inputs, boundary = _first_boundary(HOME)
        busy = cluster.link("server")
        busy.open(OpenRequest(first, HOME, 1), _returning(HOME))
        busy.forward(inputs, boundary, (0, 1))
        other = cluster.link("server")
        other.open(OpenRequest(second, HOME, 1), _returning(HOME))
        assert cluster.stage("server").status(second).state == "active"
        assert other.close().up_payload_bytes == 0
        busy.abort()


@pytest.mark.parametrize(
    ("routes", "places", "most"),
    [([ROUTE] * 4, 1, 0), ([ROUTE, HOME, ROUTE, HOME], 1, 1), ([HOME] * 4, 2, 2)],
    ids=["nobody waits", "one may wait", "two may wait"],
)
def test_no_more_activations_wait_than_there_are_places(
    routes: list[Route], places: int, most: int
) -> None:
    with Cluster(SPEC, limits=ServerLimits(waiting_steps=places)) as cluster:
        stage = cluster.stage("server")
        produced: list[weakref.ref[Any]] = []
        alive: list[int] = []
        run = stage._model.run

        def watched(*arguments: Any) -> Any:
            alive.append(sum(reference() is not None for reference in produced))
            result = run(*arguments)
            produced.append(weakref.ref(result))
            return result

        stage._model.run = watched  # type: ignore[method-assign]
        threads = [
            threading.Thread(target=cluster.train, args=(route, batches(4), initial(SPEC)))
            for route in routes
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(produced) == 16
    assert max(alive) <= most


def test_a_freed_turn_leaves_nothing_on_its_stage(cluster: Cluster) -> None:
    stage = cluster.stage("server")
    tokens = [cluster.open(ROUTE, initial(SPEC))["server"] for _ in range(3)]
    turns = [weakref.ref(turn) for turn in stage._turns.values()]
    _train(cluster, batches(1), tokens[0])
    for token in tokens:
        stage.close_turn(token)
    stage._model.install(dict(stage._model.trainable(ROUTE.segments[1])))
    patience = time.monotonic() + 5
    while any(turn() is not None for turn in turns) and time.monotonic() < patience:
        time.sleep(0.01)
    assert [turn() for turn in turns] == [None] * 3


def _returning(route: Route) -> Crossing:
    return load(SPEC, route.on(DEVICE)).crossing(route.segments[-1].start)


def _first_boundary(route: Route) -> tuple[dict[str, torch.Tensor], Boundary]:
    device: SplitModel = load(SPEC, route.on(DEVICE))
    (batch,) = batches(1)
    boundary = device.run(route.segments[0], batch.inputs)
    assert isinstance(boundary, Boundary)
    return device.travelling(batch.inputs, route), boundary
