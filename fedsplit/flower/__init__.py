"""Split training on Flower: the strategy base class, device sessions, and scheme names."""

from fedsplit.flower.coordinator import Coordinator
from fedsplit.flower.cuts import Cut, CutRule
from fedsplit.flower.host import StageHost
from fedsplit.flower.link_settings import LinkSettings
from fedsplit.flower.messages import Job
from fedsplit.flower.outcome import BranchOutcome, RoundOutcome, TurnOutcome
from fedsplit.flower.registry import find_strategy, strategy_names
from fedsplit.flower.roster import Roster, discover
from fedsplit.flower.scene import LocalWork, Scene
from fedsplit.flower.strategy import SplitRun, SplitStrategy

__all__ = [
    "BranchOutcome",
    "Coordinator",
    "Cut",
    "CutRule",
    "Job",
    "LinkSettings",
    "LocalWork",
    "Roster",
    "RoundOutcome",
    "Scene",
    "SplitRun",
    "SplitStrategy",
    "StageHost",
    "TurnOutcome",
    "discover",
    "find_strategy",
    "strategy_names",
]
