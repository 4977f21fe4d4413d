"""An error says whose it is: a node's costs its turn, a bug leaves its traceback."""

import logging

import pytest
from fedsplit.strategies.splitfed import SplitFed

from fedsplit.errors import FedsplitError
from fedsplit.execution.turn import StageTurn
from fedsplit.flower.server.turns import TurnRunner
from fedsplit.testing.federation import Federation


def test_a_bug_in_a_servers_turn_is_logged_with_its_traceback(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A peer may have caused it, so it ends that turn alone; nobody has to guess where it was."""

    def step(*_: object) -> None:
        raise KeyError("adapter of block 3")

    monkeypatch.setattr(StageTurn, "step", step)
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(FedsplitError, match="no device finished .*KeyError: 'adapter of block 3'"),
    ):
        federation.run(SplitFed(cut=2))
    logged = [record for record in caplog.records if record.exc_info]
    assert any("adapter of block 3" in str(record.exc_info[1]) for record in logged)


def test_a_bug_in_the_coordination_stops_the_run_as_what_it_is(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no device's: nobody is booked as failed, and the type of the error stays."""
    failures: list[object] = []

    def message(*_: object) -> None:
        raise KeyError("task")

    monkeypatch.setattr(TurnRunner, "_message", message)
    with pytest.raises(KeyError, match="task"):
        federation.run(SplitFed(cut=2), on_failure=failures.append)
    assert not failures
