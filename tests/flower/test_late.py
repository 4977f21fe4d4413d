"""Devices that come late: what they changed is part of the round in which they come."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from fedsplit.strategies.gsfl import Gsfl
from fedsplit.strategies.splitfed import SplitFed
from flwr.app import Message
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    Krum,
    Strategy,
)

from fedsplit.errors import FedsplitError, SettingsError
from fedsplit.execution.aggregate import MEAN, PADDED, RAFLORA
from fedsplit.flower import RoundOutcome, SplitOptions, SplitStrategy
from fedsplit.flower.messages import TRAIN
from fedsplit.flower.node import device as session
from fedsplit.flower.server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedsplit.flower.server.standing import Standing
from fedsplit.schemes.turnout import CARRY, Turnout, Waiting
from tests.flower.conftest import Federation
from tests.flower.test_strategy import Adapters, assert_equal, initial, train_unsplit

CARRIED = Waiting(quorum_devices=2, late=CARRY)
ROUNDS = 4


def everyone(kind: Callable[..., Strategy] = FedAvg) -> Strategy:
    return kind(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)


def turnout_of(outcome: RoundOutcome) -> Turnout:
    assert outcome.turnout is not None
    return outcome.turnout


def standing_of(outcome: RoundOutcome) -> Standing:
    assert outcome.standing is not None
    return outcome.standing


@pytest.fixture(scope="module")
def carried(federation: Federation) -> tuple[Adapters, list[RoundOutcome]]:
    """Return the adapters at the end of a run and what came of its rounds."""
    return federation.run(SplitFed(cut=1), everyone(), rounds=ROUNDS, steps=1, waiting=CARRIED)


def test_each_round_is_the_weighted_mean_of_changes_to_what_it_began_with(
    carried: tuple[Adapters, list[RoundOutcome]], federation: Federation
) -> None:
    """The oracle trains the unsplit model, and knows from the plan only who came when."""
    data = session.named_data(federation.job)
    adapters = initial(federation)
    began: dict[tuple[int, int], Adapters] = {}
    staleness = []
    for outcome in carried[1][1:]:
        turnout, number = turnout_of(outcome), outcome.server_round
        for device in turnout.plan.devices:
            trained = train_unsplit(federation, device, adapters, 1, number)
            began[device, number] = {name: trained[name] - adapters[name] for name in adapters}
        come = [(turnout.plan.branches[place].devices[0], number) for place in turnout.in_time]
        come += [(one.devices[0], one.since) for one in turnout.arriving]
        weights = [len(data.train(d)) * (1 + number - since) ** -0.5 for d, since in come]
        changes = [began.pop(key) for key in come]
        shares = [weight / sum(weights) for weight in weights]
        for name in adapters:
            changed = [share * c[name] for share, c in zip(shares, changes, strict=True)]
            adapters = {**adapters, name: adapters[name] + sum(changed[1:], changed[0])}
        staleness += [number - one.since for one in turnout.arriving]
        under_way = standing_of(outcome).under_way
        assert {(one.devices[0], one.since) for one in under_way} == began.keys()
    assert len(staleness) > 1
    assert_equal(carried[0], adapters, tolerance=1e-5)


def test_no_device_begins_a_turn_before_it_has_come(
    carried: tuple[Adapters, list[RoundOutcome]],
) -> None:
    for before, outcome in pairwise(carried[1][1:]):
        assert not standing_of(before).absent & {*outcome.plan.devices}


def test_how_many_devices_run_at_once_changes_no_bit(
    carried: tuple[Adapters, list[RoundOutcome]], federation: Federation
) -> None:
    again, _ = federation.run(
        SplitFed(cut=1), everyone(), rounds=ROUNDS, steps=1, waiting=CARRIED, concurrency=1
    )
    assert_equal(again, carried[0], tolerance=0)


def test_a_resumed_run_goes_on_with_what_is_under_way(
    carried: tuple[Adapters, list[RoundOutcome]], federation: Federation, tmp_path: Path
) -> None:
    half, outcomes = federation.run(SplitFed(cut=1), everyone(), rounds=2, steps=1, waiting=CARRIED)
    standing = standing_of(outcomes[-1])
    assert standing.carried
    save_checkpoint(tmp_path, Checkpoint(2, half, {}, (), standing))
    saved = load_checkpoint(tmp_path)
    assert saved.standing.under_way == standing.under_way
    again, _ = federation.run(
        SplitFed(cut=1), everyone(), rounds=ROUNDS, steps=1, waiting=CARRIED,
        adapters=saved.adapters, first_round=3, standing=saved.standing,
    )  # fmt: skip
    assert_equal(again, carried[0], tolerance=0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda late: late["turn"].pop("left_s"),
        lambda late: late["turn"].update(devices="all"),
        lambda late: late["metrics"].update({"num-examples": -1}),
        lambda late: late.update(rank="high"),
    ],
)
def test_a_checkpoint_that_says_what_cannot_be_is_refused(
    carried: tuple[Adapters, list[RoundOutcome]],
    tmp_path: Path,
    spoil: Callable[[dict[str, object]], object],
) -> None:
    standing = next(standing_of(one) for one in carried[1][1:] if standing_of(one).carried)
    save_checkpoint(tmp_path, Checkpoint(2, carried[0], {}, (), standing))
    file = tmp_path / "checkpoint" / "state.json"
    state = json.loads(file.read_text())
    spoil(state["late"][0])
    file.write_text(json.dumps(state))
    with pytest.raises(FedsplitError, match="is not a checkpoint of a run"):
        load_checkpoint(tmp_path)


def test_a_late_device_that_fails_brings_nothing_and_is_free_again(
    carried: tuple[Adapters, list[RoundOutcome]], federation: Federation
) -> None:
    (victim, *_), first = turnout_of(carried[1][1]).late, [True]

    def disturb(message: Message, device: int) -> None:
        if message.metadata.message_type == TRAIN and device == victim and first:
            first.clear()
            raise RuntimeError("battery empty")

    _, outcomes = federation.run(
        SplitFed(cut=1), everyone(), rounds=2, steps=1, waiting=CARRIED, disturb=disturb
    )
    assert [failure.index for failure in outcomes[1].failures] == [victim]
    assert victim not in standing_of(outcomes[1]).absent
    assert victim in outcomes[2].plan.devices


def test_a_group_is_carried_whole_and_others_aggregate_it_too(federation: Federation) -> None:
    for inner, how in ((everyone(FedAdam), MEAN), (everyone(), PADDED)):
        _, outcomes = federation.run(
            Gsfl(groups=2, cut=1), inner, rounds=3, steps=1, waiting=CARRIED, aggregation=how
        )
        arrived = [one.devices for o in outcomes[1:] for one in turnout_of(o).arriving]
        assert len(arrived[0]) > 1


@pytest.mark.parametrize(
    ("inner", "how", "message"),
    [
        (everyone(FedMedian), MEAN, "drop with FedMedian, which does not weigh what it is sent"),
        (everyone(Krum), MEAN, "drop with Krum, which does not weigh"),
        (
            DifferentialPrivacyServerSideFixedClipping(everyone(FedMedian), 1.0, 1.0, 2),
            MEAN,
            "drop with FedMedian",
        ),
        (everyone(), RAFLORA, "drop with raflora, which finds components anew"),
        (FedAvg(), MEAN, r"min_available_nodes=2: must be at most run.quorum_devices=1 with"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    federation: Federation, inner: Strategy, how: str, message: str
) -> None:
    waiting = Waiting(quorum_devices=1, late=CARRY)
    with pytest.raises(SettingsError, match=message):
        SplitStrategy(
            SplitFed(1),
            inner,
            job=federation.job,
            options=SplitOptions(aggregation=how, waiting=waiting),
        )
