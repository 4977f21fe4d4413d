"""Split training on Flower: a strategy for servers, an app for devices and edges."""

from fedsplit.flower.client_app import client_app
from fedsplit.flower.link_settings import LinkSettings
from fedsplit.flower.options import RunEnds, RunListener, SplitOptions
from fedsplit.flower.server.host import StageHost
from fedsplit.flower.server.outcome import BranchOutcome, RoundOutcome, TurnOutcome
from fedsplit.flower.strategy import SplitStrategy
from fedsplit.flower.system import System, make_system
from fedsplit.flower.tasks import Job

__all__ = [
    "BranchOutcome",
    "Job",
    "LinkSettings",
    "RoundOutcome",
    "RunEnds",
    "RunListener",
    "SplitOptions",
    "SplitStrategy",
    "StageHost",
    "System",
    "TurnOutcome",
    "client_app",
    "make_system",
]
