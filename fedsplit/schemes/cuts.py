"""Where a scheme cuts its devices: after a number of blocks, or where another scheme would."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

from fedsplit.errors import FedsplitError, require
from fedsplit.mapping import call
from fedsplit.plan import CLOUD, EDGE, Route, Turn
from fedsplit.schemes.registry import find_scheme
from fedsplit.schemes.scene import Scene
from fedsplit.schemes.scheme import Scheme
from fedsplit.wireless import ChannelState

Cut: TypeAlias = int | str | Mapping[str, object]
"""Blocks on the device, the name of a scheme that plans cuts, or that name with its settings."""


class CutRule:
    """The same cut for all devices, or each device's own by the rule of another scheme.

    Parameters
    ----------
    cut : int, str or mapping
        Blocks on the device; or a scheme whose cuts are taken, and nothing else of its plan, such
        as ``fast`` or ``{"name": "fast", "min_blocks": 2}``.
    tail : int, optional
        Blocks on the device behind the server, with a number as `cut`.

    Raises
    ------
    FedsplitError
        If the scheme or one of its settings is unknown, or a rule comes with a tail.
    """

    def __init__(self, cut: Cut, tail: int | None = None) -> None:
        self._blocks: int | None = None
        self._planner: Scheme | None = None
        self._tail = tail
        if isinstance(cut, int):
            self._blocks = cut
            return
        require(tail is None, "strategy.tail", tail, f"null with strategy.cut={cut}")
        settings = {"name": cut} if isinstance(cut, str) else dict(cut)
        self._name = str(settings.pop("name", ""))
        planner = find_scheme(self._name, field="strategy.cut")
        self._planner = call(planner, settings, "strategy.cut")

    def turns(self, scene: Scene, at_once: int = 1) -> tuple[Turn, ...]:
        """Return a turn for each device of `scene`, in their order.

        Parameters
        ----------
        scene : Scene
            The situation to plan for.
        at_once : int
            How many turns share the band and the server at a time; a rule cuts each device for an
            equal part of both.

        Raises
        ------
        FedsplitError
            If the cut does not fit the model, or the rule leaves out a device or needs an edge.
        """
        if self._planner is None:
            route = Route.split(scene.n_blocks, self._blocks or 0, self._tail)
            return tuple(scene.turn(device, route) for device in scene.devices)
        plan = self._planner.plan_round(_part(scene, at_once))
        routes = {turn.device: turn.route for branch in plan.branches for turn in branch.turns}
        for device in scene.devices:
            if device not in routes or any(routes[device].on(tier) for tier in (EDGE, CLOUD)):
                raise FedsplitError(
                    f"strategy.cut={self._name}: must be a scheme that cuts every device between "
                    f"itself and one server; device {device} has {routes.get(device)}"
                )
        return tuple(scene.turn(device, routes[device]) for device in scene.devices)


def _part(scene: Scene, at_once: int) -> Scene:
    """Return `scene` with an equal part of the band and of the server."""
    if at_once == 1:
        return scene
    servers = scene.fleet.servers
    slower = replace(servers, clock_hz=servers.clock_hz / at_once, min_hz=servers.min_hz / at_once)

    def narrow(state: ChannelState) -> ChannelState:
        # The station spreads its power evenly over the band, so a part of that has a part of it.
        return replace(
            state,
            uplink_hz=state.uplink_hz / at_once,
            downlink_hz=state.downlink_hz / at_once,
            power_down_w=state.power_down_w / at_once,
        )

    return replace(
        scene,
        fleet=replace(scene.fleet, servers=slower),
        channel=narrow(scene.channel),
        channel_by_step=None,
        mean_channel=lambda server_round: narrow(scene.mean_channel(server_round)),
    )
