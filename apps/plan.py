"""``fedsplit plan``: what a scheme would cost, round by round, without training anything."""

import itertools
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from fedsplit.errors import FedsplitError, require
from fedsplit.fleet import Timeline, write_chrome_trace, write_gantt, write_json
from fedsplit.flower import SplitStrategy
from fedsplit.models import check_model
from fedsplit.plan import RoundPlan

from .config import config_dir, load_config, model_spec
from .plan_report import RoundRow, comparison_table, round_row, write_results
from .scenario import System, build_system, refuse_impossible
from .server_app import build_strategy

# Beyond this, pictures and traces sum a turn's mini-batches up.
MAX_DETAILED_ACTIVITIES = 20_000


@dataclass(frozen=True, eq=False)
class Scenario:
    """A scheme on a modelled system.

    Parameters
    ----------
    system : System
        The model, the machines, the radio.
    strategy : SplitStrategy
        The scheme that plans the rounds.
    """

    system: System
    strategy: SplitStrategy

    def plan_round(self, server_round: int) -> RoundPlan:
        """Return the scheme's plan for a round, counted from 1."""
        samples = dict(enumerate(self.system.fleet.samples.tolist()))
        return self.strategy.plan_round(self.system.scene(server_round, samples))

    def timeline(self, server_round: int) -> Timeline:
        """Return the timeline of a round."""
        return self.system.timeline(self.plan_round(server_round), server_round)

    def row(self, server_round: int) -> RoundRow:
        """Return what a round costs."""
        plan = self.plan_round(server_round)
        cost = self.system.timeline(plan, server_round).cost
        return round_row(server_round, plan, cost, self.system.fleet)


def build_scenario(config: DictConfig) -> Scenario:
    """Return the scenario that the configuration describes.

    Raises
    ------
    FedsplitError
        If a part of the configuration is wrong; names the group, the field and what is allowed.
    """
    return Scenario(build_system(config), build_strategy(config))


def expand_sweeps(overrides: Sequence[str], multirun: bool) -> list[tuple[str, ...]]:
    """Return the overrides of each scenario: Hydra's sweeps (``a=1,2``, ``glob(*)``) as a product.

    Raises
    ------
    FedsplitError
        If an override cannot be parsed, or sweeps without `multirun`.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
            choices = []
            for text, override in zip(overrides, parsed, strict=True):
                if override.is_sweep_override():
                    if not multirun:
                        raise FedsplitError(f"{text!r}: several values need --multirun (-m)")
                    key = override.get_key_element()
                    values = override.sweep_string_iterator()
                    choices.append([f"{key}={value}" for value in values])
                else:
                    choices.append([text])
    except HydraException as error:
        raise FedsplitError(f"configuration: {error}") from error
    return list(itertools.product(*choices))


def plan(overrides: Sequence[str], multirun: bool, console: Console) -> int:
    """Plan every scenario, print a comparison, and leave table, plot and timelines in a folder.

    Parameters
    ----------
    overrides : sequence of str
        Hydra overrides; with `multirun`, sweeps too.
    multirun : bool
        Whether overrides may sweep.
    console : Console
        Where the table goes.

    Returns
    -------
    int
        Exit code, 0.
    """
    expanded = expand_sweeps(overrides, multirun)
    results: dict[str, list[RoundRow]] = {}
    first: Timeline | None = None
    output: str | None = None
    checked: set[str] = set()
    for chosen in expanded:
        swept = [text for i, text in enumerate(chosen) if len({e[i] for e in expanded}) > 1]
        name = " ".join(map(_short_name, swept or chosen)) or "default"
        config = load_config(chosen)
        require(config.rounds >= 1, "rounds", config.rounds, "at least 1")
        output = output or config.output
        with _named_files(chosen):
            model, seq_len = model_spec(config), config.data.get("seq_len")
            if (key := f"{model} {seq_len}") not in checked:
                check_model(model, seq_len)
                checked.add(key)
            scenario = build_scenario(config)
            refuse_impossible(scenario.strategy, scenario.system, model)
            results[name] = [scenario.row(r) for r in range(1, config.rounds + 1)]
            first = first or scenario.timeline(1)
    folder = Path(output or f"outputs/plan_{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    folder.mkdir(parents=True, exist_ok=True)
    write_results(results, folder)
    if first is not None and len(results) == 1:
        detail = first.n_activities <= MAX_DETAILED_ACTIVITIES
        write_json(first, folder / "timeline.json")
        write_chrome_trace(first, folder / "trace.json", detail)
        write_gantt(first, folder / "gantt.png", detail)
    console.print(comparison_table(results))
    console.print(f"[bold]{folder}[/bold]", highlight=False)
    return 0


def _short_name(override: str) -> str:
    """Return ``bandwidth_hz=5e+06`` for ``channel.bandwidth_hz=5000000.0``."""
    key, _, value = override.partition("=")
    with suppress(ValueError):
        value = f"{float(value):g}"
    return f"{key.rpartition('.')[2]}={value}"


@contextmanager
def _named_files(overrides: Sequence[str]) -> Iterator[None]:
    """Name the file that a wrong setting of the channel or fleet comes from."""
    try:
        yield
    except FedsplitError as error:
        wrong = re.match(r"(channel|fleet)[.:]", str(error))
        if wrong is None:
            raise
        group = wrong[1]
        defaults = OmegaConf.load(config_dir() / "config.yaml").defaults
        choice = next((item[group] for item in defaults if group in item), "")
        for text in overrides:
            key, _, value = text.partition("=")
            choice = value if key == group else choice
        file = config_dir() / group / f"{choice}.yaml"
        raise FedsplitError(f"{file} or an override: {error}") from error
