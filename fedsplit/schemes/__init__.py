"""What the author of a scheme imports; it needs neither torch nor Flower."""

from fedsplit.schemes.check import check, costed, planned, planned_evaluation
from fedsplit.schemes.cuts import Cut, CutRule
from fedsplit.schemes.registry import find_scheme, scheme_names
from fedsplit.schemes.scene import LocalWork, Scene
from fedsplit.schemes.scheme import Scheme

__all__ = [
    "Cut",
    "CutRule",
    "LocalWork",
    "Scene",
    "Scheme",
    "check",
    "costed",
    "find_scheme",
    "planned",
    "planned_evaluation",
    "scheme_names",
]
