"""A server tier: one frozen backbone, many branches, one computation at a time."""

import hmac
import threading
from collections.abc import Mapping

from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.execution.lane import Places
from fedsplit.execution.optim import OptimizerSpec, State
from fedsplit.execution.status import TurnStatus
from fedsplit.execution.turn import StageTurn
from fedsplit.models import SplitModel
from fedsplit.transport import Link, LinkError, OpenRequest, ServerLimits


class Stage:
    """A server tier that trains its segment for any number of branches at a time.

    Computations of different branches take turns in order of arrival. Between its forward and its
    backward pass a step may have to wait, for the next tier or for the device of a U-shaped route:
    others go on meanwhile, and at most ``limits.waiting_steps`` activations wait. So peak memory
    does not grow with the number of branches. A turn that fails disturbs no other.

    Parameters
    ----------
    model : SplitModel
        The frozen backbone; holds every segment that a turn may ask for.
    limits : ServerLimits or None
        How many steps wait in mid-step, and how long turns wait for their adapters.
    """

    def __init__(self, model: SplitModel, limits: ServerLimits | None = None) -> None:
        self._model = model
        self._limits = limits or ServerLimits()
        self._places = Places(self._limits.waiting_steps)
        self._turns: dict[bytes, StageTurn] = {}
        self._mutex = threading.Lock()

    def open_turn(
        self,
        request: OpenRequest,
        adapters: Mapping[str, Tensor] | None = None,
        optimizer: OptimizerSpec | None = None,
        downstream: tuple[Link, str] | None = None,
        kept: Mapping[str, State] | None = None,
    ) -> None:
        """Prepare a turn that the bearer of the request's token may then enter, once.

        Parameters
        ----------
        request : OpenRequest
            The turn as the link that leads here will ask for it.
        adapters : mapping of str to Tensor, optional
            Adapter values to start from, at least those of the segment. Whoever enters the turn
            without them waits until `supply` brings them.
        optimizer : OptimizerSpec or None
            Needed if the turn trains.
        downstream : tuple of Link and str, or None
            Unopened link to the next server tier and the token of the turn there; needed if the
            route has one.
        kept : mapping of str to State, optional
            What an optimizer kept of parameters, to go on with.

        Raises
        ------
        FedsplitError
            If the token is in use, the adapters do not fit, or optimizer or link are missing.
        """
        turn = StageTurn(
            self._model,
            self._places,
            request,
            optimizer,
            downstream,
            self._limits.supply_timeout_s,
            kept,
        )
        if adapters is not None:
            turn.supply(adapters, {})
        with self._mutex:
            key = bytes.fromhex(request.token)
            if key in self._turns:
                raise FedsplitError("token: is in use by another turn")
            self._turns[key] = turn

    def supply(
        self,
        token: str,
        adapters: Mapping[str, Tensor],
        device_adapters: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Bring a turn that was opened without them the adapters to start from.

        Parameters
        ----------
        token : str
            The turn.
        adapters : mapping of str to Tensor
            At least those of the segment.
        device_adapters : mapping of str to Tensor, optional
            Those that the device fetches over its link, and hands up again once trained.

        Raises
        ------
        FedsplitError
            If the token is unknown, the turn has adapters already, or they do not fit.
        """
        self._turn(bytes.fromhex(token)).supply(adapters, device_adapters or {})

    def adapters(self, token: str) -> dict[str, Tensor]:
        """Return the turn's adapter values, by name; with those that its device handed up.

        Raises
        ------
        FedsplitError
            If the token is unknown, or the turn is not done.
        """
        return self._turn(bytes.fromhex(token)).adapters()

    def state(self, token: str) -> dict[str, State]:
        """Return what the turn's optimizer keeps of each parameter, by name."""
        return self._turn(bytes.fromhex(token)).state()

    def status(self, token: str) -> TurnStatus:
        """Return how the turn stands."""
        return self._turn(bytes.fromhex(token)).status

    def close_turn(self, token: str) -> None:
        """Forget the turn; if it is active, it fails and its stream ends. Never waits."""
        with self._mutex:
            turn = self._turns.pop(bytes.fromhex(token), None)
        if turn is not None:
            turn.fail("the turn was ended by its stage")

    def enter(self, token: bytes) -> "StageTurn":
        """See `fedsplit.transport.Host.enter`."""
        turn = self._find(token)
        turn.enter()
        return turn

    def _find(self, token: bytes) -> "StageTurn":
        """Return the turn for a token that a stranger may have sent."""
        with self._mutex:
            # Every token is compared in full: the time taken tells nothing about them.
            found = [key for key in self._turns if hmac.compare_digest(key, token)]
        return self._turn(found[0] if found else token)

    def _turn(self, token: bytes) -> "StageTurn":
        """Return the turn of a token; this process asks for its own over and over."""
        with self._mutex:
            turn = self._turns.get(token)
        if turn is None:
            raise LinkError("token: no turn waits for it")
        return turn
