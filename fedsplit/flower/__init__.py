"""Split training on Flower: the strategy base class, device sessions, and scheme names."""

from fedsplit.flower.link_settings import LinkSettings
from fedsplit.flower.messages import Job
from fedsplit.flower.server.coordinator import Coordinator
from fedsplit.flower.server.host import StageHost
from fedsplit.flower.server.outcome import BranchOutcome, RoundOutcome, TurnOutcome
from fedsplit.flower.server.roster import Roster, discover
from fedsplit.flower.strategy import SplitRun, SplitStrategy
from fedsplit.schemes.cuts import Cut, CutRule
from fedsplit.schemes.registry import find_strategy, strategy_names
from fedsplit.schemes.scene import LocalWork, Scene

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
