"""The servers' side of every route, hosted by the server app's process."""

import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from torch import Tensor

from fedsplit.codec import Remembered
from fedsplit.codec.base import raw_bytes
from fedsplit.execution import OptimizerSpec, Stage, State, compute
from fedsplit.execution.accelerator import torch_device
from fedsplit.flower.link_settings import LinkSettings
from fedsplit.flower.tasks import Job
from fedsplit.models import SplitModel, load
from fedsplit.models.ranks import with_residuals
from fedsplit.plan import DEVICE, AdapterWay, Route, Segment, Turn
from fedsplit.transport import (
    Attendance,
    GrpcServer,
    Held,
    InProcessLink,
    Link,
    LinkError,
    OpenRequest,
    Visit,
    new_token,
)


class StageHost:
    """One stage for each server tier, and the socket through which nodes reach them all.

    Over the same socket nodes show their presence, which `attendance` keeps.

    A context manager: leaving it closes the socket and refuses every open turn.

    Parameters
    ----------
    job : Job
        The run's; this process holds all of its model, so that any cut can be served.
    link : LinkSettings, optional
        Where devices reach it and with which certificates; by default a Unix socket of its own.

    Raises
    ------
    FedsplitError
        If a certificate cannot be read.
    """

    def __init__(
        self,
        job: Job,
        link: LinkSettings | None = None,
    ) -> None:
        self._job = job
        self._link = link or LinkSettings()
        self._tls = self._link.server_tls(self._link.security)

        def read() -> SplitModel:
            model = load(job.model, None, torch_device(job.accelerator))
            model.counts_tokens = job.token_accuracy
            return model

        # Loading draws from torch's global generator: it must not cut in on a running branch.
        self._load: Callable[[], SplitModel] = lambda: compute(read)
        self.model = self._load()
        self.attendance = Attendance()
        self._stages: dict[str, Stage] = {}
        self._kept: dict[int, dict[str, State]] = {}
        self._held: dict[int, Held] = {}
        self._remembered: defaultdict[int, Remembered] = defaultdict(Remembered)
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

    def likes(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors that are like the model's own adapters `names` in shape and type.

        What an aggregator makes of adapters may be of another type, which no node sends.
        """
        whole = self.model.forms(Segment(DEVICE, 0, self.n_blocks))
        return {name: whole[name] for name in names}

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
        optimizer: OptimizerSpec | None,
        steps: int,
        way: AdapterWay,
        elsewhere: str = "",
    ) -> list[tuple[Stage, str]]:
        """Prepare `turn` on the server tiers of its route; each waits there for its adapters.

        Parameters
        ----------
        turn : Turn
            What is about to be trained or evaluated.
        seed : int
            The turn's seed, the same on every tier.
        optimizer : OptimizerSpec or None
            What trains it; None if it evaluates.
        steps : int
            Its mini-batches: exactly so many if it trains, else at most.
        way : AdapterWay
            Whether the device fetches its adapters from the first server tier.
        elsewhere : str
            A tier that another process hosts; the link then leads to the one behind it.

        Returns
        -------
        list of (Stage, str)
            The tiers hosted here, the last of the route first, and the turn's token on each.
        """
        route, opened = turn.route, list[tuple[Stage, str]]()
        train_frozen = turn.frozen and optimizer is not None
        lasts = turn.codec.over_turns and optimizer is not None
        downstream: tuple[Link, str] | None = None
        for position in range(len(route.segments) - 1, 0, -1):
            segment = route.segments[position]
            if segment.tier in (DEVICE, elsewhere):
                continue
            token = new_token()
            fetched = way is not AdapterWay.MESSAGE and position == 1
            request = OpenRequest(
                token,
                route,
                position,
                codec=turn.codec,
                seed=seed,
                train=optimizer is not None,
                adapters_on_link=fetched,
                bounds=self._job.bounds(steps),
                held=self._held_of(turn) if train_frozen and position == 1 else None,
                remembered=self._remembered[turn.device] if lasts and position == 1 else None,
            )
            stage = self._stage(segment.tier)
            kept = self._kept.get(turn.device) if optimizer is not None else None
            stage.open_turn(request, optimizer=optimizer, downstream=downstream, kept=kept)
            opened.append((stage, token))
            downstream = InProcessLink(stage, self._job.limits.frames), token
        if opened:
            first, token = opened[-1]
            self._waiting[bytes.fromhex(token)] = first
        return opened

    def hold(self, turn: Turn, adapters: Mapping[str, Tensor]) -> None:
        """Say what a device that only infers does so with: another cut or adapter begins anew."""
        digest = hashlib.sha256(repr((turn.route.cuts[0], turn.codec.uplink)).encode())
        for name in sorted(with_residuals(self.adapter_names(turn.route, DEVICE), adapters)):
            digest.update(raw_bytes(adapters[name]))
        self._held_of(turn).begin(digest.hexdigest())

    def _held_of(self, turn: Turn) -> Held:
        if turn.device not in self._held:
            limits, devices = self._job.limits, self._job.n_devices
            self._held[turn.device] = Held(limits.held_samples, limits.held_bytes // devices)
        return self._held[turn.device]

    def keep(self, device: int, opened: Sequence[tuple[Stage, str]]) -> None:
        """Keep the moments of a device's turn for its next one, in place of all it had here."""
        self._kept[device] = {
            name: state for stage, token in opened for name, state in stage.state(token).items()
        }

    def close(self, opened: Sequence[tuple[Stage, str]]) -> None:
        """Forget a turn that `open` prepared, wherever it stands."""
        for stage, token in opened:
            self._waiting.pop(bytes.fromhex(token), None)
            stage.close_turn(token)

    @property
    def address(self) -> str:
        """Where nodes reach the servers of this process; it listens from the first call on."""
        if self._server is None:
            bind = self._link.bind or f"unix:{Path(self._folder.name) / 'link'}.sock"
            self._server = GrpcServer(
                self,
                bind,
                tls=self._tls,
                attendance=self.attendance,
                limits=self._job.limits,
                ping_s=self._job.patience.ping_s,
            )
        return self._link.advertise or self._server.address

    def enter(self, token: bytes) -> Visit:
        """See `fedsplit.transport.Host.enter`: whichever stage the turn is on."""
        # A dictionary compares hashes, so that the time taken tells nothing about other tokens.
        stage = self._waiting.get(token)
        if stage is None:
            raise LinkError("token: no turn waits for it")
        return stage.enter(token)

    def _stage(self, tier: str) -> Stage:
        if tier not in self._stages:
            # Each tier computes on a model of its own: an edge waits for the cloud in mid-step.
            model = self.model if not self._stages else self._load()
            self._stages[tier] = Stage(model, self._job.limits)
        return self._stages[tier]
