"""How residuals grow over the waves of a round, where averaging leaves any."""

from collections.abc import Sequence
from dataclasses import replace

from fedsplit.growth import LEAVE_RESIDUALS, growth
from fedsplit.plan import Branch, RoundPlan
from fedsplit.schemes.scene import Scene


def with_residuals(plan: RoundPlan, scene: Scene) -> RoundPlan:
    """Return `plan` with what each turn is given beside its adapters (`Turn.residual`)."""
    if scene.residual == 0 and scene.work.averaged not in LEAVE_RESIDUALS:
        return plan
    branches = []
    for branch in plan.branches:
        turns, residual = [], scene.residual
        for wave in branch.waves:
            turns += [replace(turn, residual=residual) for turn in wave]
            residual += _growth([turn.rank for turn in wave], scene) if len(wave) > 1 else 0
        branches.append(Branch(tuple(turns), branch.width))
    return RoundPlan(tuple(branches))


def residual_after(branches: Sequence[Branch], scene: Scene) -> int:
    """Return how many components are beside the adapters that a round of `branches` leaves.

    Each module has so many, but no more than its matrix.
    """
    ends = []
    for branch in branches:
        last = branch.waves[-1]
        grown = _growth([turn.rank for turn in last], scene) if len(last) > 1 else 0
        ends.append(last[0].residual + grown)
    # Until a branch has averaged, all have the same.
    beside = sum(ends) if any(branch.width > 1 for branch in branches) else scene.residual
    return beside + _growth([branch.rank for branch in branches], scene)


def _growth(ranks: Sequence[int | None], scene: Scene) -> int:
    whole = scene.profile.rank
    if whole is None or not ranks:
        return 0
    trained = [whole if rank is None else min(rank, whole) for rank in ranks]
    return growth(scene.work.averaged, trained, whole)
