"""A plan is checked when it is made, before anything of it is sent."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import NoReturn

from fedsplit.errors import FedsplitError, PlanError, SettingsError
from fedsplit.fleet import Timeline
from fedsplit.plan import EDGE, Branch, RoundPlan, Turn
from fedsplit.schemes.residuals import with_residuals
from fedsplit.schemes.scene import Scene
from fedsplit.schemes.scheme import Scheme


def planned(scheme: Scheme, scene: Scene) -> RoundPlan:
    """Return the round that `scheme` plans for `scene`, checked and filled in.

    Raises
    ------
    PlanError
        As `check`.
    """
    return costed(scheme, scene)[0]


def costed(scheme: Scheme, scene: Scene) -> tuple[RoundPlan, Timeline]:
    """Return the same and what it costs, which is found on the way.

    Raises
    ------
    PlanError
        As `check`.
    """
    return _checked(scheme.plan_round(scene.laden()), scene, type(scheme).__name__)


def planned_evaluation(scheme: Scheme, scene: Scene) -> tuple[Turn, ...]:
    """Return the turns over which the devices of `scene` evaluate, checked and filled in.

    Raises
    ------
    PlanError
        If a turn cannot be carried out.
    """
    # What is evaluated is the whole adapter, also by devices that train a part of it.
    turns = tuple(
        replace(_filled(turn, scene), rank=None, frozen=False, fresh=1.0)
        for turn in scheme.plan_evaluation(scene.laden())
    )
    _Check(type(scheme).__name__, scene).turns(turns)
    return turns


def check(plan: RoundPlan, scene: Scene, scheme: str = "plan") -> RoundPlan:
    """Return `plan` with what it left open filled in; refuse one that cannot be carried out.

    An edge that is None becomes the device's home, and a rank that is None the device's. Whatever
    is found here is not found later: the plan can be trained wherever its tiers live, and
    `Scene.timeline` can cost it.

    Parameters
    ----------
    plan : RoundPlan
        What a scheme made of `scene`.
    scene : Scene
        The situation that it was planned for.
    scheme : str
        Who planned it, for the error.

    Raises
    ------
    PlanError
        Naming scheme, round, device and field.
    """
    return _checked(plan, scene, scheme)[0]


def _checked(plan: RoundPlan, scene: Scene, scheme: str) -> tuple[RoundPlan, Timeline]:
    checks = _Check(scheme, scene)
    if not isinstance(plan, RoundPlan):
        checks.refuse("plan", type(plan).__name__, "a RoundPlan")
    # How many first blocks nobody trains: what crosses a cut behind others is new in every round.
    still = min(
        (
            turn.route.segments[0].stop if _infers(turn, scene) else 0
            for branch in plan.branches
            for turn in branch.turns
        ),
        default=0,
    )
    branches = (
        Branch(tuple(_filled(turn, scene, still) for turn in branch.turns), branch.width)
        for branch in plan.branches
    )
    filled = with_residuals(RoundPlan(tuple(branches)), scene)
    checks.turns(turn for branch in filled.branches for turn in branch.turns)
    try:
        return filled, scene.timeline(filled)
    except SettingsError as error:
        checks.refuse(error.field.removeprefix("turn."), error.value, error.allowed)
    except FedsplitError as error:
        raise PlanError(f"{checks.origin()}: {error}") from error


def _infers(turn: Turn, scene: Scene) -> bool:
    return turn.frozen or not scene.work.device_adapters


def _filled(turn: Turn, scene: Scene, still: int = 0) -> Turn:
    if turn.rank is None:
        turn = replace(turn, rank=scene.work.ranks.get(turn.device))
    if turn.residual:
        turn = replace(turn, residual=0)
    if turn.device in scene.samples and _infers(turn, scene):
        n_samples = scene.samples[turn.device]
        rounds = scene.server_round if turn.route.segments[0].stop <= still else 1
        fresh = scene.work.fresh(n_samples, turn.steps, rounds) * (turn.repeat == 0)
        turn = replace(turn, frozen=True, fresh=fresh)
    homeless = turn.edge is None and turn.route.on(EDGE) and turn.device in scene.samples
    return replace(turn, edge=int(scene.fleet.home[turn.device])) if homeless else turn


class _Check:
    """Looks at one turn after the other; each route and codec is tried once."""

    def __init__(self, scheme: str, scene: Scene) -> None:
        self._scheme = scheme
        self._scene = scene
        self._tried: set[object] = set()

    def origin(self, turn: Turn | None = None) -> str:
        """Return whose plan it is, and which of its turns."""
        device = "" if turn is None else f", device {turn.device}"
        return f"{self._scheme}, round {self._scene.server_round}{device}"

    def refuse(self, field: str, value: object, allowed: str, turn: Turn | None = None) -> NoReturn:
        """Raise the error that names them all."""
        raise PlanError(f"{self.origin(turn)}: {SettingsError(field, value, allowed)}")

    def turns(self, turns: Iterable[Turn]) -> None:
        """Refuse a turn that cannot be carried out, whatever else is planned."""
        for turn in turns:
            self._numbers(turn)
            self._edge(turn)
            if turn.frozen and (turn.route.returns_home or len(turn.route.segments) == 1):
                allowed = "one that ends on a server, where the device's blocks only infer"
                self.refuse("route", str(turn.route), allowed, turn)
            if (try_route := self._scene.try_route) is not None:
                self._once(turn, turn.route, partial(try_route, turn.route))
            for settings in (turn.codec.uplink, turn.codec.downlink):
                self._once(turn, repr(settings), partial(self._scene.codec_ratio, settings))

    def _numbers(self, turn: Turn) -> None:
        if turn.device not in self._scene.samples:
            devices = self._scene.devices
            listed = ", ".join(map(str, devices[:20])) + (", ..." if len(devices) > 20 else "")
            self.refuse("device", turn.device, f"one that takes part ({listed})", turn)
        for field, least in (("steps", 1), ("repeat", 0)):
            value = getattr(turn, field)
            if type(value) is not int or value < least:
                self.refuse(field, value, f"a whole number of at least {least}", turn)
        if turn.rank is not None and (type(turn.rank) is not int or turn.rank < 1):
            self.refuse("rank", turn.rank, "null, or a whole number of at least 1", turn)
        if turn.route.n_blocks != self._scene.n_blocks:
            allowed = f"of {self._scene.n_blocks} blocks, as the model"
            self.refuse("route", str(turn.route), allowed, turn)

    def _edge(self, turn: Turn) -> None:
        if not turn.route.on(EDGE):
            return
        count = self._scene.fleet.n_edges
        if count == 0:
            self.refuse("route", str(turn.route), "without an edge, the fleet has none", turn)
        if type(turn.edge) is not int or not 0 <= turn.edge < count:
            self.refuse("edge", turn.edge, f"from 0 to {count - 1}", turn)

    def _once(self, turn: Turn, what: object, attempt: Callable[[], object]) -> None:
        if what in self._tried:
            return
        self._tried.add(what)
        try:
            attempt()
        except FedsplitError as error:
            raise PlanError(f"{self.origin(turn)}: {error}") from error
