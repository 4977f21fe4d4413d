"""The situation that a scheme plans for."""

from dataclasses import replace

import pytest

from fedsplit.errors import FedsplitError
from fedsplit.plan import RoundPlan, Route
from fedsplit.schemes import LocalWork
from fedsplit.testing.scenes import N_BLOCKS, make_scene


@pytest.mark.parametrize(
    ("work", "samples", "steps"),
    [
        (LocalWork(batch_size=4, steps=3), 100, 3),
        (LocalWork(batch_size=4, steps=3, epochs=5), 1, 3),
        (LocalWork(batch_size=4), 16, 4),
        (LocalWork(batch_size=4), 19, 4),
        (LocalWork(batch_size=4, epochs=2), 19, 8),
        (LocalWork(batch_size=4), 3, 1),
        (LocalWork(batch_size=4, epochs=3), 0, 3),
    ],
)
def test_a_turn_has_the_steps_asked_for_or_whole_epochs(
    work: LocalWork, samples: int, steps: int
) -> None:
    assert work.steps_for(samples) == steps


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"steps": 0}, {"epochs": 0}])
def test_work_below_its_least_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(FedsplitError, match=f"train.{next(iter(wrong))}=0: must be"):
        LocalWork(**wrong)


def test_cuts_are_those_that_the_model_allows_and_the_whole_model() -> None:
    scene = make_scene()
    assert scene.cuts == tuple(range(N_BLOCKS + 1))
    assert replace(scene, possible_cuts=lambda: (1, 3)).cuts == (1, 3, N_BLOCKS)


def test_what_changes_within_a_round_is_costed_but_not_planned_with() -> None:
    scene = make_scene(devices=2, steps=4)
    worse = replace(scene.channel, uplink_hz=scene.channel.uplink_hz / 10)
    asked: list[int] = []

    def by_step(steps: int) -> list[object]:
        asked.append(steps)
        return [scene.channel, *[worse] * (steps - 1)]

    changing = replace(scene, channel_by_step=by_step)
    plan = RoundPlan.parallel(
        replace(scene.turn(device, Route.two_tier(N_BLOCKS, 2)), uplink_hz=1e5)
        for device in scene.devices
    )
    steady = scene.timeline(plan).cost.delay_s
    assert changing.on(scene.channel).timeline(plan).cost.delay_s == steady
    assert not asked
    changing.timeline(plan)
    assert asked == [4]


def test_without_a_word_on_codecs_boundaries_travel_as_they_are() -> None:
    assert make_scene().codec_ratio({"name": "identity"}) == 1.0


def test_the_least_work_is_one_step_of_one_sample() -> None:
    assert LocalWork(batch_size=1, steps=1, epochs=1).steps_for(0) == 1
