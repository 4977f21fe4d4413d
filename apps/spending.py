"""How devices defend what they send, and what a run spends of its privacy budget."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig

from fedsplit.errors import require
from fedsplit.flower import RoundOutcome, RunEnds
from fedsplit.mapping import from_mapping
from fedsplit.plan import RoundPlan, Turn
from fedsplit.privacy import SYSTEM, PrivacySpec, Spent, most_uses

from .values import plain, without

BOUND = ("audit", "max_read")
"""Settings of the group that bound what is planned (`.audited`)."""
BOTTLENECK = "bottleneck"
"""The one that is the model's; the rest is the devices'."""


def privacy_spec(config: DictConfig) -> PrivacySpec:
    """Return the ``privacy`` group: how devices defend what they send.

    Raises
    ------
    FedsplitError
        If it is wrong, or noise between machines came from a seed that the server knows.
    """
    own = without(plain(config.privacy), (*BOUND, BOTTLENECK))
    spec = from_mapping(PrivacySpec, own, "privacy")
    noisy = spec.noise_multiplier > 0 or spec.gradient_noise_multiplier > 0
    open_to_the_server = noisy and config.link.bind is not None and spec.randomness != SYSTEM
    allowed = f"{SYSTEM!r} between machines: the server knows the seed, and could take noise off"
    require(not open_to_the_server, "privacy.randomness", spec.randomness, allowed)
    return spec


class Spending:
    """Counts how often samples leave their devices, and ends a run before its budget is overspent.

    Turns that fail count too, since their boundaries may have been sent. Only what a device sends
    over its link is counted: not its adapters, and not the labels of an open route.

    Parameters
    ----------
    spec : PrivacySpec
        The run's.
    batch_size : int
        Samples of a mini-batch.
    before : mapping or None
        What a record of the last round said, where a run goes on.
    """

    def __init__(
        self, spec: PrivacySpec, batch_size: int, before: Mapping[str, Any] | None = None
    ) -> None:
        self._spec = spec
        self._batch_size = batch_size
        self._n_train: tuple[int, ...] = ()
        self._u_shaped = bool(before and before["gradients"])
        self._spent = Spent(
            tuple(before["trained"]) if before else (), before["evaluated"] if before else 0
        )

    def know(self, n_train: Sequence[int]) -> None:
        """Take how many training samples each device has."""
        self._n_train = tuple(n_train)
        if not self._spent.trained:
            self._spent = Spent((0,) * len(n_train), self._spent.evaluated)

    def plan(self, plan: RoundPlan) -> None:
        """Count a round's training before anything of it is sent.

        Raises
        ------
        RunEnds
            If it and its evaluation would overspend the budget; nothing is counted then.
        """
        turns = [turn for branch in plan.branches for turn in branch.turns if _leaves(turn)]
        self._u_shaped |= any(turn.route.returns_home for turn in turns)
        uses = [
            (turn.device, most_uses(turn.steps, self._batch_size, self._n_train[turn.device]))
            for turn in turns
        ]
        budget = self._spec.budget
        if budget is not None:
            due = self._spent.after(uses, 1).epsilon(self._spec, gradients=self._u_shaped)
            if due > budget:
                raise RunEnds(f"epsilon would be {due:.4g}, above privacy.budget={budget:g}")
        self._spent = self._spent.after(uses, 0)

    def evaluated(self, outcome: RoundOutcome) -> None:
        """Count a round's evaluation."""
        tried = any(failure.phase == "evaluate" for failure in outcome.failures)
        if tried or any(_leaves(done.turn) for done in outcome.evaluation):
            self._spent = self._spent.after((), 1)

    def record(self) -> dict[str, Any] | None:
        """Return what is spent so far; None where no noise is added."""
        spec = self._spec
        if spec.noise_multiplier == 0:
            return None
        return {
            "epsilon": self._spent.epsilon(spec, gradients=self._u_shaped),
            "delta": spec.delta,
            "unit": spec.unit,
            "gradients": self._u_shaped and spec.gradient_clip is not None,
            **asdict(self._spent),
        }


def _leaves(turn: Turn) -> bool:
    """Return whether anything of a turn crosses a link."""
    return len(turn.route.segments) > 1
