"""``fedsplit plan``: what a scheme would cost, round by round, without training anything."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from rich.console import Console

from fedsplit.arrays import Array
from fedsplit.errors import FedsplitError
from fedsplit.fleet import Timeline, write_chrome_trace, write_gantt, write_json
from fedsplit.flower import System
from fedsplit.plan import RoundPlan
from fedsplit.report import plain_text
from fedsplit.schemes import Scheme
from fedsplit.schemes.turnout import OutOfEnergy, Turnout, UnderWay, Waiting, turn_out

from .check import blaming_the_configuration, require_codecs, require_fields, require_folder
from .config import load_config, model_spec, output_folder, require_plain
from .outputs import make_folder
from .plan_report import RoundRow, comparison_table, round_row, write_results
from .run_settings import run_settings
from .scenario import build_system, check_first_round
from .server_app import build_scheme
from .sweep import members

# Beyond this, pictures and traces sum a turn's mini-batches up.
MAX_DETAILED_ACTIVITIES = 20_000
_USAGE = 2


@dataclass(frozen=True, eq=False)
class Scenario:
    """A scheme on a modelled system.

    Parameters
    ----------
    system : System
        The model, the machines, the radio.
    scheme : Scheme
        What plans the rounds.
    waiting : Waiting
        Whom they wait for.
    """

    system: System
    scheme: Scheme
    waiting: Waiting = field(default_factory=Waiting)

    def turn_out(
        self,
        server_round: int,
        spent_j: Array | None = None,
        under_way: Sequence[UnderWay] = (),
        exhausted: Sequence[int] = (),
        residual: int = 0,
    ) -> Turnout:
        """Return a round, counted from 1, after so much energy was spent, and who is in time."""
        absent = {*exhausted, *(device for one in under_way for device in one.devices)}
        everyone = enumerate(self.system.fleet.samples.tolist())
        scene = self.system.scene(server_round, {i: n for i, n in everyone if i not in absent})
        scene = replace(scene, spent_j=spent_j, residual=residual)
        return turn_out(self.scheme, scene, self.waiting, under_way)

    def plan_round(self, server_round: int) -> RoundPlan:
        """Return the scheme's plan for a round."""
        return self.turn_out(server_round).plan

    def timeline(self, server_round: int) -> Timeline:
        """Return the timeline of a round."""
        return self.turn_out(server_round).line

    def rows(self, rounds: int) -> list[RoundRow]:
        """Return what each of so many rounds costs; fewer where all energy is spent before."""
        rows, spent_j = list[RoundRow](), np.zeros(self.system.fleet.n_devices)
        under_way, exhausted, residual = tuple[UnderWay, ...](), tuple[int, ...](), 0
        for server_round in range(1, rounds + 1):
            try:
                turnout = self.turn_out(server_round, spent_j, under_way, exhausted, residual)
            except OutOfEnergy:
                break
            under_way, exhausted = turnout.under_way, (*exhausted, *turnout.exhausted)
            residual = turnout.residual
            cost = turnout.line.cost
            spent_j = spent_j + cost.device_energy_j
            row = round_row(server_round, turnout.plan, cost, self.system.fleet)
            rows.append(replace(row, delay_s=turnout.delay_s(turnout.line)))
        return rows


def build_scenario(config: DictConfig) -> Scenario:
    """Return the scenario that the configuration describes.

    Raises
    ------
    FedsplitError
        If a part of the configuration is wrong; names the group, the field and what is allowed.
    """
    require_codecs(config)
    waiting = run_settings(config).waiting
    return Scenario(build_system(config), build_scheme(config), waiting)


def plan(overrides: Sequence[str], multirun: bool, console: Console) -> int:
    """Plan every scenario, print a comparison, and leave table, plot and timelines in a folder.

    Parameters
    ----------
    overrides : sequence of str
        Hydra overrides; with `multirun`, sweeps too.
    multirun : bool
        Whether overrides may sweep. Then a scenario that is refused does not end the others: its
        row says why.
    console : Console
        Where the table goes.

    Returns
    -------
    int
        Exit code: 0, or 2 if every scenario of a sweep was refused.

    Raises
    ------
    FedsplitError
        If the one scenario without `multirun` is refused.
    """
    results: dict[str, list[RoundRow]] = {}
    refused: dict[str, str] = {}
    output = ""
    first: Scenario | None = None
    for member in members(overrides, multirun):
        name = member.name
        try:
            config = load_config(member.overrides)
            require_plain(config)
            require_folder(output_folder(config))
            spec = model_spec(config)
            require_fields(spec)
            with blaming_the_configuration(spec):
                scenario = build_scenario(config)
            check_first_round(scenario.scheme, scenario.system, scenario.waiting)
            results[name] = scenario.rows(config.rounds)
        except FedsplitError as error:
            if not multirun:
                raise
            refused[name] = str(error)
        else:
            output, first = output or config.output or "", first or scenario
    if first is None:
        console.print(comparison_table(results, refused))
        return _USAGE
    default = f"outputs/plan_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    folder = make_folder(Path(output or default))
    write_results(results, folder, refused)
    if len(results) == 1:
        line = first.timeline(1)
        detail = line.n_activities <= MAX_DETAILED_ACTIVITIES
        write_json(line, folder / "timeline.json")
        write_chrome_trace(line, folder / "trace.json", detail)
        write_gantt(line, folder / "gantt.png", detail)
    console.print(comparison_table(results, refused))
    console.print(f"[bold]{plain_text(folder)}[/bold]", highlight=False, soft_wrap=True)
    return 0
