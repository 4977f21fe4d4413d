"""The three protocols, by figures that can be added up by hand."""

from collections.abc import Callable

import pytest

from fedsplit.errors import SettingsError
from fedsplit.report.studies.frame import Study
from fedsplit.report.studies.protocols import budget, robustness, target


def test_a_budget_is_what_all_have_spent_at_least(study: Study) -> None:
    """Two rounds of `quick` with seed 0 take 2 s; no round of `slow` is over by then."""
    found = budget(study).table.set_index("group")
    assert found["eval_loss"].to_dict() == pytest.approx({"slow": 4.1, "quick": 11.3 / 3})
    assert "within modelled time 2 s" in budget(study).title
    # With seeds 1 and 2, the second round of `quick` ends after that.
    assert found.loc["quick", "within"] == 3


def test_the_best_within_a_budget_and_its_test(study: Study) -> None:
    found = budget(study, within={"delay_s": 100.0, "traffic_bytes": 7e6})
    assert found.table["eval_loss"].tolist() == pytest.approx([3.1, 3.5])
    (pair,) = found.test.to_dict("records")
    assert (pair["first"], pair["second"], pair["pairs"]) == ("slow", "quick", 3)
    assert pair["difference"] == pytest.approx(-0.4)
    assert pair["p"] == pair["least_p"] == pytest.approx(0.25)
    assert any("3 seeds cannot give a p below 0.25" in note for note in found.notes)


def test_memory_is_a_budget_too(study: Study) -> None:
    found = budget(study, within={"device_peak_bytes": 1.0})
    # Before any training nothing is held yet.
    assert found.table["within"].tolist() == [0, 0]
    assert found.notes[0].startswith("6 runs come to no evaluation within the budget")


def test_the_cost_of_a_target_and_who_does_not_reach_it(study: Study) -> None:
    """`quick` reaches 3.4 with seeds 0 and 1 alone, after two rounds of 1.0 and 1.1 s."""
    found = target(study, reach=3.4)
    table = found.table.set_index("group")
    assert table["reached"].to_dict() == {"slow": 3, "quick": 2}
    assert table["delay_s"].to_dict() == pytest.approx({"slow": 8.2, "quick": 2.2})
    (pair,) = found.test.to_dict("records")
    # Of seed 2 it is not known: `quick` went on to 2.4 s without, `slow` needed 8.4 s.
    assert (pair["pairs"], pair["known"], pair["first_cheaper"]) == (3, 2, 0)
    assert pair["p"] == pytest.approx(0.5)
    assert any("right-censored" in note for note in found.notes)


def test_a_target_that_nobody_reaches_costs_more_than_is_known(study: Study) -> None:
    found = target(study, reach=1.0)
    assert found.table["reached"].tolist() == [0, 0]
    assert found.table["delay_s"].tolist() == [float("inf")] * 2
    assert found.test["known"].tolist() == [0]


def test_without_a_target_it_is_what_the_worst_scheme_comes_to(study: Study) -> None:
    assert target(study).title == "Cost until evaluation loss 3.5 nats per target"


def test_who_loses_least_on_a_narrow_band(make: Callable[..., Study]) -> None:
    keys = ("strategy", "seed", "channel.bandwidth_hz")
    losses = {("slow", 0): (3.0, 3.1), ("slow", 1): (3.1, 3.3), ("quick", 0): (3.2, 3.9)}
    losses |= {("quick", 1): (3.3, 4.1)}
    study = make(
        {
            (scheme, seed, band): [4.5, end]
            for (scheme, seed), ends in losses.items()
            for band, end in zip((2e7, 5e6), ends, strict=True)
        },
        keys,
    )
    found = robustness(study, within={"delay_s": 100.0})
    assert found.table["group"].tolist() == ["slow, 5000000.0", "quick, 5000000.0"]
    assert found.table["loss"].tolist() == pytest.approx([0.15, 0.75])
    assert found.notes[0].startswith("slow loses least in the mean: 0.15")
    (pair,) = found.test.to_dict("records")
    assert pair["difference"] == pytest.approx(-0.6)
    assert pair["p"] == pytest.approx(0.5)


def test_one_condition_cannot_be_compared(study: Study) -> None:
    with pytest.raises(SettingsError, match="a study that sweeps over a condition too"):
        robustness(study)
    with pytest.raises(SettingsError, match="cost='eval_loss': must be one of"):
        budget(study, within={"eval_loss": 3.0})
    with pytest.raises(SettingsError, match="metric='nonsense'"):
        target(study, "nonsense")
