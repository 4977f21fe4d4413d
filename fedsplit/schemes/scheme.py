"""What a scheme is: a rule that plans rounds."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from fedsplit.plan import EDGE, RoundPlan, Turn
from fedsplit.schemes.scene import Scene


class Scheme(ABC):
    """Plans rounds; holds its settings and nothing that changes from round to round.

    `fedsplit.flower.SplitStrategy` trains what it plans under any Flower strategy, and
    `Scene.timeline` says what that costs.

    Examples
    --------
    >>> class MyScheme(Scheme):
    ...     def plan_round(self, scene):
    ...         route = Route.two_tier(scene.n_blocks, cut=2)
    ...         return RoundPlan.parallel(scene.turn(device, route) for device in scene.devices)
    """

    @abstractmethod
    def plan_round(self, scene: Scene) -> RoundPlan:
        """Decide a round: branches, the order of devices in them, cuts, codec, shares.

        Parameters
        ----------
        scene : Scene
            Who takes part, the model, the channel and the fleet.

        Returns
        -------
        RoundPlan
            The plan that is then trained and costed. Must depend on `scene` alone.
        """

    def plan_evaluation(self, scene: Scene) -> tuple[Turn, ...]:
        """Decide over which route each device evaluates: by default, the one it would train on.

        Devices that would not train take the route of the first, over their own edge.
        """
        plan = self.plan_round(scene)
        every = [turn for branch in plan.branches for turn in branch.turns if turn.repeat == 0]
        by_device = {turn.device: turn for turn in every}
        fallback = plan.branches[0].turns[0].route

        def spare(device: int) -> Turn:
            turn = scene.turn(device, fallback)
            on_edge = len(fallback.on(EDGE)) > 0
            return replace(turn, edge=int(scene.fleet.home[device])) if on_edge else turn

        return tuple(by_device.get(device) or spare(device) for device in scene.devices)

    def branch_weight(self, samples: Sequence[int]) -> int:
        """Say how much a branch counts in a weighted average of branches.

        Parameters
        ----------
        samples : sequence of int
            Training samples of each device that finished a turn in the branch.

        Returns
        -------
        int
            By default all of its samples.
        """
        return sum(samples)
