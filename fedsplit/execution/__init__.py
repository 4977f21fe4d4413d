"""Run a turn: the device's loop, and the stage that serves many branches on a server."""

from fedsplit.execution.average import weighted_mean
from fedsplit.execution.device import StepReport, TurnResult, evaluate_turn, train_turn
from fedsplit.execution.lane import compute
from fedsplit.execution.optim import OptimizerSpec, State
from fedsplit.execution.stage import Stage
from fedsplit.execution.status import TurnStatus
from fedsplit.execution.turn import StageTurn

__all__ = [
    "OptimizerSpec",
    "Stage",
    "StageTurn",
    "State",
    "StepReport",
    "TurnResult",
    "TurnStatus",
    "compute",
    "evaluate_turn",
    "train_turn",
    "weighted_mean",
]
