"""A live server with an honest turn under way, and a peer who has a token and means no good."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import grpc
import psutil

from fedsplit.data import Batch
from fedsplit.execution import compute, train_turn
from fedsplit.models import Boundary, SplitModel, load
from fedsplit.plan import DEVICE, CodecPlan, Route
from fedsplit.transport import GrpcLink, GrpcServer, Limits, OpenRequest, ServerLimits, TurnBounds
from fedsplit.transport.chunks import split
from fedsplit.transport.connection import METHOD, SERVICE, options
from fedsplit.transport.frames import Frame, Kind, decode, encode
from fedsplit.transport.tensors import Stream, TensorCoder, pack_inputs
from tests.tiny_split import BLOCKS, OPTIMIZER, Cluster, batches, differing, gpt2, initial

SPEC = gpt2()
ROUTE = Route.two_tier(BLOCKS, 2)
HOME = Route.u_shaped(BLOCKS, 1, 3)
BOUNDS = TurnBounds(samples=2, tokens=8)
STEPS = 4
MEMORY_BYTES = 64 << 20


@cache
def model_of(route: Route) -> SplitModel:
    """Return the device's part of the model."""
    return compute(lambda: load(SPEC, route.on(DEVICE)))


class Besieged:
    """A stage behind a server; an honest turn is compared with itself when nobody attacks."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.stage = cluster.stage("server")
        self.adapters = initial(SPEC)
        self._device = model_of(ROUTE)
        _, self._expected = cluster.train(ROUTE, batches(STEPS), self.adapters)

    def open(
        self,
        route: Route = ROUTE,
        codec: CodecPlan | None = None,
        bounds: TurnBounds = BOUNDS,
        **others: Any,
    ) -> str:
        """Return the token of a turn that waits."""
        tokens = self.cluster.open(route, self.adapters, codec=codec, bounds=bounds, **others)
        return tokens[route.segments[1].tier]

    @contextmanager
    def serving(self, limits: ServerLimits | None = None) -> Iterator[str]:
        """Serve on a socket of its own; yield the address."""
        address = f"unix:{self.cluster._folder.name}/{time.monotonic_ns()}"
        with GrpcServer(self.stage, address, limits=limits) as server:
            yield server.address

    def withstand(
        self,
        attack: Callable[[str], None],
        memory_bytes: int = MEMORY_BYTES,
        limits: ServerLimits | None = None,
    ) -> None:
        """Call ``attack(address)`` in the midst of an honest turn, which must not notice."""
        problems: list[BaseException] = []
        token = self.open(bounds=TurnBounds(samples=2, tokens=8, steps=STEPS))
        with self.serving(limits) as address:

            def attempt() -> None:
                try:
                    attack(address)
                except BaseException as error:
                    problems.append(error)

            attacker = threading.Thread(target=attempt)
            peak = before = psutil.Process().memory_info().rss

            def meanwhile() -> Iterator[Batch]:
                nonlocal peak, before
                first, *others, last = batches(STEPS)
                yield first
                peak = before = psutil.Process().memory_info().rss
                attacker.start()
                yield from others
                while attacker.is_alive():
                    attacker.join(0.02)
                    peak = max(peak, psutil.Process().memory_info().rss)
                yield last

            result = train_turn(
                self._device,
                ROUTE,
                meanwhile(),
                adapters=self.adapters,
                optimizer=OPTIMIZER,
                seed=0,
                link=GrpcLink(address),
                token=token,
            )
        if problems:
            raise problems[0]
        assert differing(result.adapters | self.stage.adapters(token), self._expected) == []
        assert peak - before < memory_bytes


def opening(token: str, route: Route = ROUTE, **others: Any) -> Frame:
    """Return the frame that enters a turn."""
    request = OpenRequest(token, route, 1, **others)
    return Frame(Kind.OPEN, 0, bytes.fromhex(token), request.agreed())


def honest_step(
    device: SplitModel,
    token: str,
    route: Route = ROUTE,
    kind: Kind = Kind.STEP,
    codec: CodecPlan | None = None,
    number: int = 1,
) -> Frame:
    """Return the frame of an honest mini-batch."""
    (batch,) = batches(1)
    boundary = compute(lambda: device.run(route.segments[0], batch.inputs))
    assert isinstance(boundary, Boundary)
    coder = TensorCoder(codec or CodecPlan(), 0)
    return Frame(
        kind,
        number,
        bytes.fromhex(token),
        inputs=pack_inputs(device.travelling(batch.inputs, route)),
        tensors=coder.pack(Stream.BOUNDARY_UP, boundary.tensors, batch.samples),
        layout=boundary.layout,
        samples=batch.samples,
    )


class Peer:
    """Whoever has a gRPC library, and sends what it likes."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options())

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def say(self, *frames: Frame | bytes) -> Frame:
        """Send frames on a stream of their own; return the answer to the last one."""
        stream = self._channel.stream_stream(f"/{SERVICE}/{METHOD}")
        chunks = [
            chunk
            for frame in frames
            for chunk in split(encode(frame) if isinstance(frame, Frame) else frame)
        ]
        call = stream(iter(chunks), timeout=60)
        answers = list(call)
        last = frames[-1]
        assert isinstance(last, Frame)
        return decode(
            b"".join(answers[len(frames) - 1 :]),
            Limits(),
            kinds=list(Kind),
            number=last.number,
            token=last.token,
        )

    def refusal(self, *frames: Frame) -> str:
        """Send frames; return why the last one was refused."""
        answer = self.say(*frames)
        assert answer.kind is Kind.ERROR, answer.kind
        return str(answer.fields["reason"])
