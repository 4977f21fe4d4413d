"""A step that waits for somebody keeps nobody else waiting; giving a turn up waits for nothing."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.execution import TurnResult, compute, evaluate_turn, train_turn
from fedsplit.models import Boundary, Crossing, load
from fedsplit.plan import DEVICE, Route
from fedsplit.transport import (
    Gradients,
    InProcessLink,
    Link,
    LinkError,
    OpenRequest,
    ServerLimits,
    StepReply,
    TurnBounds,
    new_token,
)
from tests.tiny_split import BLOCKS, OPTIMIZER, Cluster, batches, differing, gpt2, initial

SPEC = gpt2(dropout=0.2)
ROUTE = Route.two_tier(BLOCKS, 2)
HOME = Route.u_shaped(BLOCKS, 1, 3)
THREE = Route.three_tier(BLOCKS, 1, 2)
TAIL_S = 1.0


class SlowTail(InProcessLink):
    """A link to a tier whose device takes its time before it sends its gradients."""

    wait: Callable[[], object] = staticmethod(lambda: time.sleep(TAIL_S))

    def backward(self, gradients: Gradients) -> Gradients:
        self.wait()
        return super().backward(gradients)


def _train(cluster: Cluster, link: Link, token: str, seed: int, steps: int = 1) -> TurnResult:
    return train_turn(
        compute(lambda: load(SPEC, HOME.on(DEVICE))),
        HOME,
        batches(steps, seed),
        adapters=initial(SPEC),
        optimizer=OPTIMIZER,
        seed=seed,
        link=link,
        token=token,
    )


def _side_by_side(calls: Sequence[Callable[[], object]]) -> float:
    """Return the seconds that the calls take together."""
    threads = [threading.Thread(target=call) for call in calls]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - started


def test_four_slow_tails_take_hardly_longer_than_one() -> None:
    with Cluster(SPEC) as cluster:
        stage = cluster.stage("server")
        adapters = initial(SPEC)
        seeds = range(4)
        models = {seed: compute(lambda: load(SPEC, HOME.on(DEVICE))) for seed in seeds}
        found: dict[int, TurnResult] = {}
        tokens = {seed: cluster.open(HOME, adapters, seed=seed)["server"] for seed in seeds}

        def turn(seed: int, token: str) -> None:
            found[seed] = train_turn(
                models[seed],
                HOME,
                batches(3, seed),
                adapters=adapters,
                optimizer=OPTIMIZER,
                seed=seed,
                link=SlowTail(stage),
                token=token,
            )

        alone = cluster.open(HOME, adapters)["server"]
        one_s = _side_by_side([lambda: turn(0, alone)])
        calls = [lambda seed=seed: turn(seed, tokens[seed]) for seed in seeds]
        together_s = _side_by_side(calls)
        assert one_s > 3 * TAIL_S
        assert together_s < 1.3 * one_s
        for seed in seeds:
            # Dropout and results are those of the turn by itself.
            result, complete = cluster.train(HOME, batches(3, seed), adapters, seed=seed)
            assert found[seed].reports == result.reports
            together = found[seed].adapters | stage.adapters(tokens[seed])
            assert differing(together, complete) == []


def test_an_edge_goes_on_while_the_cloud_works_for_another() -> None:
    with Cluster(SPEC) as cluster:
        adapters = initial(SPEC)
        _, expected = cluster.train(THREE, batches(2), adapters)
        asked, answered = threading.Event(), threading.Event()

        class Busy(InProcessLink):
            """A link to a cloud that works until it is let go."""

            def step(
                self,
                inputs: Mapping[str, Tensor],
                boundary: Boundary,
                samples: Sequence[int],
                share: float = 1.0,
            ) -> StepReply:
                asked.set()
                assert answered.wait(30)
                return super().step(inputs, boundary, samples, share)

        edge, cloud = cluster.stage("edge"), cluster.stage("cloud")
        onward, slow = new_token(), new_token()
        cloud.open_turn(OpenRequest(onward, THREE, 2), adapters, OPTIMIZER)
        edge.open_turn(OpenRequest(slow, THREE, 1), adapters, OPTIMIZER, (Busy(cloud), onward))
        outcome: list[TurnResult] = []
        waiting = threading.Thread(
            target=lambda: outcome.append(
                train_turn(
                    compute(lambda: load(SPEC, THREE.on(DEVICE))),
                    THREE,
                    batches(2),
                    adapters=adapters,
                    optimizer=OPTIMIZER,
                    seed=0,
                    link=InProcessLink(edge),
                    token=slow,
                )
            )
        )
        waiting.start()
        assert asked.wait(20)
        _, others = cluster.train(THREE, batches(2), adapters)
        assert differing(others, expected) == []
        answered.set()
        waiting.join(30)
        complete = outcome[0].adapters | edge.adapters(slow) | cloud.adapters(onward)
        assert differing(complete, expected) == []


class Stuck(InProcessLink):
    """A link whose backward call begins, and ends when the other end lets go."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster.stage("server"))
        self.began, self.free = threading.Event(), threading.Event()

    def backward(self, gradients: Gradients) -> Gradients:
        self.began.set()
        self.free.wait(30)
        return super().backward(gradients)


@pytest.fixture
def narrow() -> Iterator[Cluster]:
    """Return a cluster where a single step may wait."""
    with Cluster(SPEC, limits=ServerLimits(waiting_steps=1)) as found:
        yield found


def _in_background(call: Callable[[], object]) -> tuple[threading.Thread, list[str]]:
    """Start `call`; its error, if it has one, will be in the list."""
    problems: list[str] = []

    def run() -> None:
        try:
            call()
        except FedsplitError as error:
            problems.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    return thread, problems


def _gives_up_at_once(cluster: Cluster, token: str) -> None:
    started = time.monotonic()
    cluster.stage("server").close_turn(token)
    assert time.monotonic() - started < 0.2


def test_giving_up_a_turn_that_holds_the_only_place_lets_the_next_one_in(narrow: Cluster) -> None:
    first, second = (narrow.open(HOME, initial(SPEC))["server"] for _ in range(2))
    stuck = Stuck(narrow)
    holding, problems = _in_background(lambda: _train(narrow, stuck, first, 0))
    assert stuck.began.wait(20)
    waiting, others = _in_background(lambda: _train(narrow, narrow.link("server"), second, 0))
    waiting.join(0.5)
    assert waiting.is_alive(), "there is one place"
    _gives_up_at_once(narrow, first)
    waiting.join(20)
    assert not waiting.is_alive()
    assert others == []
    stuck.free.set()
    holding.join(20)
    assert "ended by its stage" in problems[0]


def test_giving_up_a_turn_that_queues_for_a_place_leaves_the_queue_in_order(
    narrow: Cluster,
) -> None:
    tokens = [narrow.open(HOME, initial(SPEC))["server"] for _ in range(3)]
    stuck = Stuck(narrow)
    holding, none = _in_background(lambda: _train(narrow, stuck, tokens[0], 0))
    assert stuck.began.wait(20)
    queueing = [
        _in_background(lambda t=token: _train(narrow, narrow.link("server"), t, 0))
        for token in tokens[1:]
    ]
    places = narrow.stage("server")._places
    while len(places._queue) < 2:
        time.sleep(0.01)
    _gives_up_at_once(narrow, tokens[1])
    queueing[0][0].join(10)
    assert "ended by its stage" in queueing[0][1][0]
    stuck.free.set()
    for thread in (holding, queueing[1][0]):
        thread.join(20)
        assert not thread.is_alive()
    assert none + queueing[1][1] == []


def test_giving_up_a_turn_does_not_wait_for_a_computation(narrow: Cluster) -> None:
    token = narrow.open(HOME, initial(SPEC))["server"]
    computing, free = threading.Event(), threading.Event()
    stage = narrow.stage("server")
    run = stage._model.run

    def slow(*arguments: Any) -> Any:
        computing.set()
        assert free.wait(30)
        return run(*arguments)

    stage._model.run = slow  # type: ignore[method-assign]
    thread, problems = _in_background(lambda: _train(narrow, narrow.link("server"), token, 0))
    assert computing.wait(20)
    _gives_up_at_once(narrow, token)
    free.set()
    thread.join(20)
    assert "given up" in problems[0] or "ended by its stage" in problems[0]
    stage._model.run = run  # type: ignore[method-assign]
    _, adapters = narrow.train(HOME, batches(1), initial(SPEC))
    assert adapters, "its place is free again"


@pytest.mark.parametrize(
    ("planned", "trains", "steps", "reason"),
    [
        (2, True, 2, None),
        (2, True, 0, "steps=0: must be 2"),
        (2, True, 1, "steps=1: must be 2"),
        (2, True, 3, "steps=3: must be at most 2"),
        (0, True, 0, None),
        (2, False, 1, None),
        (2, False, 2, None),
        (2, False, 0, "steps=0: must be 1 to 2"),
        (2, False, 3, "steps=3: must be at most 2"),
        (None, True, 3, None),
    ],
)
@pytest.mark.parametrize("route", [ROUTE, HOME, THREE], ids=str)
def test_the_server_counts_the_steps(
    route: Route, planned: int | None, trains: bool, steps: int, reason: str | None
) -> None:
    with Cluster(SPEC) as cluster:
        optimizer = OPTIMIZER if trains else None
        tokens = cluster.open(route, initial(SPEC), optimizer, bounds=TurnBounds(steps=planned))
        first = route.segments[1].tier
        common: dict[str, Any] = {"link": cluster.link(first), "token": tokens[first], "seed": 0}
        model = compute(lambda: load(SPEC, route.on(DEVICE)))

        def turn() -> None:
            data, adapters = batches(steps), initial(SPEC)
            if trains:
                train_turn(model, route, data, adapters=adapters, optimizer=OPTIMIZER, **common)
            else:
                evaluate_turn(model, route, data, adapters=adapters, **common)

        if reason is None:
            turn()
        else:
            with pytest.raises(LinkError, match=reason):
                turn()
        for tier, token in tokens.items():
            status = cluster.stage(tier).status(token)
            assert status.state == ("done" if reason is None else "failed")


def test_a_boundary_that_comes_back_is_checked_before_it_is_unpacked() -> None:
    class Lying(InProcessLink):
        """A link whose answers hold a tensor of another shape."""

        def _send(self, frame: bytes) -> Callable[[], bytes]:
            answer = super()._send(frame)
            return lambda: answer().replace(b"[15,32]", b"[32,15]")

    with Cluster(SPEC) as cluster:
        token = cluster.open(HOME, initial(SPEC))["server"]
        with pytest.raises(FedsplitError, match=r"tensors\[0\]=.*must be \(15, 32\)"):
            _train(cluster, Lying(cluster.stage("server")), token, 0)


def test_a_route_that_returns_home_needs_to_know_what_comes_back() -> None:
    with Cluster(SPEC) as cluster:
        token = cluster.open(HOME, initial(SPEC))["server"]
        with pytest.raises(LinkError, match="returning: must be given"):
            cluster.link("server").open(OpenRequest(token, HOME, 1))
        link = cluster.link("server")
        crossing: Crossing = load(SPEC, HOME.on(DEVICE)).crossing(3)
        link.open(OpenRequest(token, HOME, 1), crossing)
        link.abort()
