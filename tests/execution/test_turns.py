"""A turn on any route computes what the unsplit PEFT model computes, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import torch

from fedsplit.errors import FedsplitError
from fedsplit.execution import OptimizerSpec, evaluate_turn, train_turn
from fedsplit.execution.tier import dropout_seed
from fedsplit.models import load
from fedsplit.plan import DEVICE, CodecPlan, Route
from fedsplit.transport import InProcessLink, LinkStats
from tests.tiny_split import (
    BLOCKS,
    OPTIMIZER,
    Cluster,
    batches,
    checkpoint,
    differing,
    gpt2,
    initial,
    plain_peft,
    there,
    train_plainly,
)

ROUTES = [
    "device[0:4]",
    "device[0:0] -> server[0:4]",
    "device[0:1] -> server[1:4]",
    "device[0:3] -> server[3:4]",
    "device[0:1] -> edge[1:3] -> cloud[3:4]",
    "device[0:2] -> edge[2:2] -> cloud[2:4]",
    "device[0:1] -> server[1:3] -> device[3:4]",
    "device[0:1] -> edge[1:2] -> cloud[2:3] -> device[3:4]",
]


@pytest.mark.parametrize("kind", ["in-process", "grpc"])
@pytest.mark.parametrize("text", ROUTES)
def test_training_equals_the_unsplit_peft_model_on_every_route(
    text: str, kind: str, tiny_checkpoint: Path
) -> None:
    spec = checkpoint(tiny_checkpoint)
    adapters, data = initial(spec), batches(3)
    losses, expected = train_plainly(plain_peft(spec, adapters), data, OPTIMIZER)

    with Cluster(spec, kind) as cluster:
        result, found = cluster.train(Route.parse(text, BLOCKS), data, adapters)

    assert [report.loss for report in result.reports] == losses
    assert differing(found, expected) == []
    assert differing(found, adapters) == sorted(adapters), "every adapter must have moved"


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerSpec("adam", lr=3e-3, weight_decay=0.2),
        OptimizerSpec("sgd", lr=0.3, momentum=0.9, weight_decay=0.01),
    ],
    ids=lambda optimizer: optimizer.name,
)
def test_every_optimizer_equals_its_unsplit_self(
    optimizer: OptimizerSpec, tiny_checkpoint: Path
) -> None:
    spec = checkpoint(tiny_checkpoint)
    adapters, data = initial(spec), batches(3)
    _, expected = train_plainly(plain_peft(spec, adapters), data, optimizer)
    with Cluster(spec) as cluster:
        _, found = cluster.train(Route.two_tier(BLOCKS, 2), data, adapters, optimizer)
    assert differing(found, expected) == []


def test_the_cut_may_move_from_turn_to_turn(tiny_checkpoint: Path) -> None:
    spec = checkpoint(tiny_checkpoint)
    adapters = initial(spec)
    model = plain_peft(spec, adapters)
    with Cluster(spec) as cluster:
        for seed, route in enumerate(
            (Route.two_tier(BLOCKS, 3), Route.u_shaped(BLOCKS, 1, 2), Route.two_tier(BLOCKS, 1))
        ):
            data = batches(2, seed)
            _, expected = train_plainly(model, data, OPTIMIZER)
            _, adapters = cluster.train(route, data, adapters)
            assert differing(adapters, expected) == []


def test_branches_at_the_same_time_equal_each_alone_also_with_dropout() -> None:
    spec = gpt2(dropout=0.2)
    adapters = initial(spec)
    jobs = {
        seed: (Route.parse(text, BLOCKS), batches(6, seed))
        for seed, text in enumerate(ROUTES)
        if "edge" not in text
    }
    with Cluster(spec, "grpc") as cluster:
        alone = {
            seed: cluster.train(route, data, adapters, seed=seed)
            for seed, (route, data) in jobs.items()
        }
        together = {}

        def run(seed: int) -> None:
            route, data = jobs[seed]
            together[seed] = cluster.train(route, data, adapters, seed=seed)

        threads = [Thread(target=run, args=(seed,)) for seed in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed in jobs:
        assert together[seed][0].reports == alone[seed][0].reports
        assert differing(together[seed][1], alone[seed][1]) == []


@pytest.mark.parametrize(
    "route",
    [
        Route.two_tier(BLOCKS, 0),
        Route.two_tier(BLOCKS, 2),
        Route.three_tier(BLOCKS, 0, 2),
        Route.three_tier(BLOCKS, 0, 0),
        Route.u_shaped(BLOCKS, 0, 4),
        Route.u_shaped(BLOCKS, 0, 0),
        Route.u_shaped(BLOCKS, 1, 4),
    ],
    ids=str,
)
def test_segments_that_compute_draw_masks_of_their_own(route: Route) -> None:
    last = len(route.segments) - 1
    seeds = [
        dropout_seed(0, 1, segment)
        for place, segment in enumerate(route.segments)
        if place in (0, last) or segment.start < segment.stop
    ]
    assert len(set(seeds)) == len(seeds)


def test_dropout_differs_between_steps_and_turns_and_is_off_in_evaluation() -> None:
    spec = gpt2(dropout=0.3)
    adapters, (batch,) = initial(spec), batches(1)
    frozen = OptimizerSpec("sgd", lr=1e-30)
    route = Route.two_tier(BLOCKS, 2)
    with Cluster(spec) as cluster:
        first, _ = cluster.train(route, [batch, batch], adapters, frozen, seed=1)
        second, _ = cluster.train(route, [batch], adapters, frozen, seed=2)
        again, _ = cluster.train(route, [batch], adapters, frozen, seed=1)
        calm = [cluster.evaluate(route, [batch], adapters).loss for _ in range(2)]
    losses = {report.loss for report in first.reports + second.reports}
    assert len(losses) == 3
    assert again.reports[0] == first.reports[0]
    assert calm[0] == calm[1]
    assert calm[0] not in losses


@pytest.mark.parametrize("text", ROUTES)
def test_evaluation_equals_the_unsplit_model_and_changes_nothing(
    text: str, tiny_checkpoint: Path
) -> None:
    spec = checkpoint(tiny_checkpoint)
    adapters, data = initial(spec), batches(3)
    model = plain_peft(spec, adapters).eval()
    with torch.no_grad():
        expected = [model(**there(batch)).loss.item() for batch in data]
    with Cluster(spec) as cluster:
        result = cluster.evaluate(Route.parse(text, BLOCKS), data, adapters)
    assert [report.loss for report in result.reports] == expected
    assert result.adapters == {}
    assert result.n_correct is None


def test_the_mean_loss_weighs_every_target_alike() -> None:
    spec = gpt2()
    data = batches(3)
    result = train_turn(
        load(spec),
        Route.device_only(BLOCKS),
        data,
        adapters=initial(spec),
        optimizer=OPTIMIZER,
        seed=0,
    )
    targets = [int((batch.inputs["labels"][:, 1:] != -100).sum()) for batch in data]
    assert [report.n_targets for report in result.reports] == targets
    assert result.n_targets == sum(targets)
    assert result.n_samples == 6
    weighted = sum(
        count * report.loss for count, report in zip(targets, result.reports, strict=True)
    )
    assert result.loss == pytest.approx(weighted / sum(targets))
    assert result.stats == LinkStats()
    assert result.compute_s > 0
    assert result.link_s == 0


class RecordingLink(InProcessLink):
    """An in-process link that keeps what crosses it."""

    def _send(self, frame: bytes) -> Callable[[], bytes]:
        self.sent = getattr(self, "sent", b"") + frame
        return super()._send(frame)


@pytest.mark.parametrize(
    ("route", "leaves"),
    [(Route.two_tier(BLOCKS, 2), True), (Route.u_shaped(BLOCKS, 1, 3), False)],
    ids=["open", "u-shaped"],
)
def test_labels_leave_the_device_on_open_routes_only_and_token_ids_never(
    route: Route, leaves: bool
) -> None:
    spec = gpt2()
    adapters = initial(spec)
    with Cluster(spec) as cluster:
        tokens = cluster.open(route, adapters)
        link = RecordingLink(cluster.stage("server"))
        train_turn(
            load(spec, route.on(DEVICE)),
            route,
            batches(1),
            adapters=adapters,
            optimizer=OPTIMIZER,
            seed=0,
            link=link,
            token=tokens["server"],
        )
    assert b'"attention_mask"' in link.sent
    assert (b'"labels"' in link.sent) == leaves
    assert b"input_ids" not in link.sent


def test_a_lossy_codec_trains_on_every_route_the_same_over_every_link() -> None:
    spec = gpt2()
    adapters, data = initial(spec), batches(3)
    codec = CodecPlan({"name": "int8"}, {"name": "bf16"})
    for text in ROUTES[2:]:
        route = Route.parse(text, BLOCKS)
        outcomes = []
        for kind in ("in-process", "grpc"):
            with Cluster(spec, kind) as cluster:
                outcomes.append(cluster.train(route, data, adapters, codec=codec))
        (result, found), (other, same) = outcomes
        assert result.reports == other.reports
        assert result.stats == other.stats
        assert differing(found, same) == []
        exact = sum(int(batch.inputs["attention_mask"].sum()) for batch in data) * 32 * 4
        crossings = 2 if route.returns_home else 1
        assert result.stats.up_payload_bytes < 0.5 * crossings * exact
        assert result.stats.down_payload_bytes == 0.5 * crossings * exact


def test_nothing_is_sent_back_to_a_device_that_trains_nothing() -> None:
    spec = gpt2()
    with Cluster(spec) as cluster:
        result, _ = cluster.train(Route.two_tier(BLOCKS, 0), batches(2), initial(spec))
    assert result.stats.down_payload_bytes == 0
    assert result.stats.up_payload_bytes > 0


def test_arguments_that_do_not_fit_the_route_are_refused() -> None:
    spec = gpt2()
    model, adapters = load(spec), initial(spec)
    split, alone = Route.two_tier(BLOCKS, 2), Route.device_only(BLOCKS)
    common = {"adapters": adapters, "seed": 0}
    with pytest.raises(FedsplitError, match="link: must be given"):
        evaluate_turn(model, split, [], **common)
    with Cluster(spec) as cluster:
        with pytest.raises(FedsplitError, match="link: must be given"):
            evaluate_turn(model, alone, [], link=cluster.link("server"), **common)
        with pytest.raises(FedsplitError, match="token: must be given"):
            evaluate_turn(model, split, [], link=cluster.link("server"), **common)
        with pytest.raises(FedsplitError, match="downstream: must be given"):
            cluster.stage("server").open_turn(
                request := _request(Route.three_tier(BLOCKS, 1, 2)), adapters, OPTIMIZER
            )
        with pytest.raises(FedsplitError, match="optimizer: must be given"):
            cluster.stage("server").open_turn(_request(split), adapters)
        with pytest.raises(FedsplitError, match="is missing"):
            cluster.stage("server").open_turn(_request(split), {}, OPTIMIZER)
        name = next(name for name in adapters if ".h.3." in name)
        wrong = adapters | {name: adapters[name][:1]}
        with pytest.raises(FedsplitError, match="shape"):
            cluster.stage("server").open_turn(_request(split), wrong, OPTIMIZER)
        assert request.position == 1


def _request(route: Route):
    from fedsplit.transport import OpenRequest, new_token

    return OpenRequest(new_token(), route, 1)
