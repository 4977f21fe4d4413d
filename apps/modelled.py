"""What a run's rounds cost on the modelled system, beside what they really take."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from fedsplit.arrays import Array
from fedsplit.fleet import Timeline, measured_fleet, write_chrome_trace
from fedsplit.flower import RoundOutcome, System
from fedsplit.flower.server.roster import Roster
from fedsplit.report.files import spared
from fedsplit.schemes import Scene

from .plan_report import round_row
from .records import sent_bytes

TRACE = "modelled_trace.json"


class ModelledRun:
    """The modelled system of a run, and what its devices have spent there so far.

    Parameters
    ----------
    system : System
        As configured.
    spent_j : sequence of float
        What each device had spent where a run goes on; of another fleet, it is not counted.
    """

    def __init__(self, system: System, spent_j: Sequence[float] = ()) -> None:
        self.system = system
        self.line: Timeline | None = None
        n_devices = system.fleet.n_devices
        self._spent_j: Array = np.array(
            spent_j if len(spent_j) == n_devices else np.zeros(n_devices), dtype=np.float64
        )

    @property
    def spent_j(self) -> tuple[float, ...]:
        """What each device has spent."""
        return tuple(self._spent_j.tolist())

    def scene(self, server_round: int, samples: Mapping[int, int]) -> Scene:
        """Return the situation of a round, for a scheme to plan in."""
        return replace(self.system.scene(server_round, samples), spent_j=self._spent_j)

    def know(self, roster: Roster) -> None:
        """Take machines as they were measured, and texts as long as they are, as nodes say."""
        system = self.system
        fleet = measured_fleet(system.fleet, system.profile, roster.profiles)
        counts = {node.index: node.counts.train for node in roster.nodes if node.counts}
        self.system = replace(system, fleet=fleet).with_lengths(counts)

    def costs(self, outcome: RoundOutcome) -> dict[str, float]:
        """Count a round, with the bytes really sent, and return what it costs."""
        plan, system = outcome.plan, self.system
        self.line = line = system.timeline(plan, outcome.server_round, sent_bytes(outcome))
        self._spent_j = self._spent_j + line.cost.device_energy_j
        row = asdict(round_row(outcome.server_round, plan, line.cost, system.fleet))
        if outcome.turnout is not None:
            row["delay_s"] = outcome.turnout.delay_s(line)
        del row["round"]
        energy_j = row["device_energy_j"] + row["server_energy_j"]
        return {"delay_s": row.pop("delay_s"), "energy_j": energy_j, **row}

    def write_trace(self, folder: Path) -> None:
        """Write when everything of the last round would happen."""
        if self.line is not None:
            with spared(folder / TRACE):
                write_chrome_trace(self.line, folder / TRACE)
