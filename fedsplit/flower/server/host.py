"""The servers' side of every route, hosted by the server app's process."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from torch import Tensor

from fedsplit.execution import OptimizerSpec, Stage, compute
from fedsplit.execution.turn import DONE, FAILED
from fedsplit.flower.link_settings import LinkSettings
from fedsplit.flower.messages import Contact
from fedsplit.flower.node.models import torch_device
from fedsplit.models import ModelSpec, SplitModel, load
from fedsplit.plan import DEVICE, Route, Segment, Turn
from fedsplit.transport import (
    Attendance,
    GrpcServer,
    InProcessLink,
    Link,
    LinkError,
    LinkStats,
    OpenRequest,
    ServerLimits,
    TurnBounds,
    Visit,
    new_token,
)


@dataclass
class OpenTurn:
    """A turn that waits for its device, or is under way, on every server tier of its route.

    `address` and `token` lead the device to the first of them, which is the last of `stages`.
    With `adapters_on_link` the device fetches its adapters there, `fetched` by name (if this
    process hosts it).
    """

    address: str
    token: str
    stages: list[tuple[Stage, str]] = field(default_factory=list)
    adapters_on_link: bool = False
    fetched: tuple[str, ...] = ()
    discarded: bool = False

    def link_bytes(self) -> dict[str, int]:
        """Return the bytes of the links between the servers, by direction."""
        total = LinkStats()
        for stage, token in self.stages:
            total += stage.status(token).stats
        if total == LinkStats():
            return {}
        return {"backhaul-up": total.up_bytes, "backhaul-down": total.down_bytes}


class StageHost:
    """One stage for each server tier, and the socket through which nodes reach them all.

    Over the same socket nodes show their presence, which `attendance` keeps.

    A context manager: leaving it closes the socket and refuses every open turn.

    Parameters
    ----------
    model : ModelSpec
        The model; this process holds all of it, so that any cut can be served.
    optimizer : OptimizerSpec
        What trains the servers' adapters.
    accelerator : str
        Where the servers compute: ``auto``, ``cpu`` or a torch device.
    link : LinkSettings, optional
        Where devices reach it and with which certificates; by default a Unix socket of its own.
    limits : ServerLimits, optional
        What devices and edges may ask for.

    Raises
    ------
    FedsplitError
        If a certificate cannot be read.
    """

    def __init__(
        self,
        model: ModelSpec,
        optimizer: OptimizerSpec,
        accelerator: str,
        link: LinkSettings | None = None,
        limits: ServerLimits | None = None,
    ) -> None:
        self._link = link or LinkSettings()
        self._limits = limits or ServerLimits()
        self._tls = self._link.server_tls(self._link.security)

        def read() -> SplitModel:
            return load(model, None, torch_device(accelerator))

        # Loading draws from torch's global generator: it must not cut in on a running branch.
        self._load: Callable[[], SplitModel] = lambda: compute(read)
        self._optimizer = optimizer
        self.model = self._load()
        self.attendance = Attendance()
        self._stages: dict[str, Stage] = {}
        self._waiting: dict[bytes, Stage] = {}
        self._server: GrpcServer | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="fedsplit-link-")

    def __enter__(self) -> "StageHost":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.stop()
        self._folder.cleanup()

    @property
    def n_blocks(self) -> int:
        """Blocks of the model."""
        return self.model.n_blocks

    def initial_adapters(self) -> dict[str, Tensor]:
        """Return the complete adapters that a run starts from."""
        return self.model.adapters(Segment(DEVICE, 0, self.n_blocks))

    def adapter_names(self, route: Route, tier: str) -> tuple[str, ...]:
        """Return the names of the adapters that `tier` holds on `route`."""
        return tuple(
            name for segment in route.on(tier) for name in self.model.adapter_names(segment)
        )

    def open(
        self,
        turn: Turn,
        *,
        seed: int,
        train: bool,
        elsewhere: str = "",
        adapters_on_link: bool = False,
        bounds: TurnBounds | None = None,
    ) -> OpenTurn:
        """Prepare `turn` on every server tier of its route; a device waits there for `supply`.

        Parameters
        ----------
        turn : Turn
            What is about to be trained or evaluated.
        seed : int
            The turn's seed, the same on every tier.
        train : bool
            Whether it trains.
        elsewhere : str
            A tier that another process hosts; the link then leads to the one behind it.
        adapters_on_link : bool
            Whether the device fetches its adapters from the first server tier.
        bounds : TurnBounds, optional
            How much it may ask of the servers.
        """
        route = turn.route
        opened = OpenTurn("", "", adapters_on_link=adapters_on_link)
        downstream: tuple[Link, str] | None = None
        last = len(route.segments) - 1
        for position in range(last, 0, -1):
            segment = route.segments[position]
            if segment.tier in (DEVICE, elsewhere):
                continue
            token = new_token()
            fetched = adapters_on_link and position == 1
            request = OpenRequest(
                token,
                route,
                position,
                turn.codec,
                seed,
                train,
                fetched,
                bounds or TurnBounds(),
            )
            stage = self._stage(segment.tier)
            stage.open_turn(
                request, optimizer=self._optimizer if train else None, downstream=downstream
            )
            if fetched:
                opened.fetched = self.adapter_names(route, DEVICE)
            opened.stages.append((stage, token))
            opened.token = token
            downstream = InProcessLink(stage, self._limits.frames), token
        if opened.stages:
            first, token = opened.stages[-1]
            self._waiting[bytes.fromhex(token)] = first
            opened.address = self._address()
        return opened

    def supply(self, opened: OpenTurn, adapters: Mapping[str, Tensor]) -> None:
        """Bring a turn the `adapters` that it starts from, at least those of its server tiers.

        Raises
        ------
        FedsplitError
            If adapters are missing, or were supplied before.
        """
        for place, (stage, token) in enumerate(opened.stages):
            is_first = place == len(opened.stages) - 1
            fetched = opened.fetched if is_first else ()
            stage.supply(token, adapters, {name: adapters[name] for name in fetched})

    def expect(self, who: str) -> Contact:
        """Return where the node `who` ("device 3") shows its presence during one task."""
        return Contact(self._address(), self.attendance.expect(who))

    def enter(self, token: bytes) -> Visit:
        """See `fedsplit.transport.Host.enter`: whichever stage the turn is on."""
        # A dictionary compares hashes, so that the time taken tells nothing about other tokens.
        stage = self._waiting.get(token)
        if stage is None:
            raise LinkError("token: no turn waits for it")
        return stage.enter(token)

    def is_over(self, opened: OpenTurn) -> bool:
        """Return whether nothing more will come over the links of a turn."""
        if not opened.stages or opened.discarded:
            return opened.discarded
        return all(stage.status(token).state in (DONE, FAILED) for stage, token in opened.stages)

    def finish(self, opened: OpenTurn) -> dict[str, Tensor]:
        """Return the trained adapters of a turn that is done, from all of its server tiers.

        Those of its device are among them if it handed them up over its link.

        Raises
        ------
        FedsplitError
            If a tier is not done.
        """
        adapters: dict[str, Tensor] = {}
        for stage, token in opened.stages:
            adapters |= stage.adapters(token)
        return adapters

    def failure(self, opened: OpenTurn) -> str | None:
        """Return why a turn failed on a server tier, or None while it has not."""
        for stage, token in opened.stages:
            status = stage.status(token)
            if status.state == FAILED:
                return status.reason
        return None

    def steps(self, opened: OpenTurn) -> int:
        """Return how many mini-batches the turn has been through."""
        return max((stage.status(token).steps for stage, token in opened.stages), default=0)

    def discard(self, opened: OpenTurn) -> None:
        """Forget a turn; a device that still trains it is refused at its next step."""
        opened.discarded = True
        for stage, token in opened.stages:
            self._waiting.pop(bytes.fromhex(token), None)
            stage.close_turn(token)

    def _stage(self, tier: str) -> Stage:
        if tier not in self._stages:
            # Each tier computes on a model of its own: an edge waits for the cloud in mid-step.
            model = self.model if not self._stages else self._load()
            self._stages[tier] = Stage(model, self._limits)
        return self._stages[tier]

    def _address(self) -> str:
        if self._server is None:
            bind = self._link.bind or f"unix:{Path(self._folder.name) / 'link'}.sock"
            self._server = GrpcServer(
                self,
                bind,
                tls=self._tls,
                limits=self._limits,
                attendance=self.attendance,
                ping_s=self._link.ping_s,
            )
        return self._link.advertise or self._server.address
