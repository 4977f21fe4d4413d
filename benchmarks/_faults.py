"""Nodes that are processes of their own, and what may befall them."""

import atexit
import itertools
import multiprocessing
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.flower.local_grid import LocalGrid
from fedsplit.flower.messages import TRAIN, answer

DEVICES, EDGES = 4, 2
JOINER = DEVICES + EDGES
_GOES_ON = ("cut", "reset")  # told so by the one who did it


@dataclass(frozen=True)
class Fault:
    """What strikes which node, and when."""

    node: int
    work: str
    phase: str
    kind: str

    @property
    def role(self) -> str:
        """ "device", "edge" or "joiner" (a node that none of them is)."""
        if self.node == JOINER:
            return "joiner"
        return "device" if self.node < DEVICES else "edge"

    @property
    def hits(self) -> set[int]:
        """Devices whose turns may be lost."""
        if self.role == "device":
            return {self.node}
        if self.role == "joiner":
            return set()
        return {device for device in range(DEVICES) if device % EDGES == self.node - DEVICES}


class Relay:
    """Forwards TCP connections to a port, until they are cut: then bytes vanish, nothing closes."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._cut: set[int] = set()  # the callers' ports
        self._open: dict[int, tuple[socket.socket, socket.socket]] = {}
        self._all_cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, pid: int | None = None) -> None:
        """Cut the connections that come from a process; all, also later ones, without one."""
        with self._lock:
            self._all_cut = self._all_cut or pid is None
            if pid is not None:
                found = psutil.Process(pid).net_connections("tcp")
                self._cut |= {item.laddr.port for item in found}

    def reset(self, pid: int | None = None) -> None:
        """Have the connections of a process, or all, end as those of a machine that forgot them."""
        ports = None
        if pid is not None:
            found = psutil.Process(pid).net_connections("tcp")
            ports = {item.laddr.port for item in found}
        with self._lock:
            pairs = [pair for port, pair in self._open.items() if ports is None or port in ports]
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)
                    end.close()

    def mend(self) -> None:
        """Drop all connections, and let new ones through again."""
        with self._lock:
            pairs, self._open = list(self._open.values()), {}
            self._cut, self._all_cut = set(), False
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            caller, (_, port) = self._listener.accept()
            try:
                called = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                caller.close()
                continue
            called.settimeout(None)
            with self._lock:
                self._open[port] = caller, called
            for source, sink in ((caller, called), (called, caller)):
                threading.Thread(target=self._pump, args=(source, sink, port), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, port: int) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:
                    gone = self._all_cut or port in self._cut
                if not gone:
                    sink.sendall(data)
        with self._lock:
            gone = self._all_cut or port in self._cut
        if not gone:
            for end in (source, sink):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


class ProcessGrid(LocalGrid):
    """A Flower grid whose every message is worked on by a process of its own.

    By default a process is forked from one that has imported everything; with `cold` it is a fresh
    interpreter, as Flower starts one.
    """

    def __init__(
        self,
        binds: Sequence[str],
        relays: Sequence[Relay],
        fault: Fault | None,
        cold: bool = False,
    ) -> None:
        super().__init__()
        self._binds = binds
        self._relays = relays  # the cloud's, then the edges'
        self._fault = fault
        self._context: Any = multiprocessing.get_context("spawn" if cold else "forkserver")
        if not cold:
            self._context.set_forkserver_preload(["benchmarks._faults", "fedsplit.apps.client_app"])
        self._processes: list[tuple[Any, Connection]] = []
        self._heard: list[tuple[Any, Connection, Future[Message]]] = []
        self.struck_unix_s: float | None = None

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes: devices, then edges, and once these work, who joins."""
        joined = self._fault is not None and self._fault.role == "joiner" and self._processes
        return range(1, DEVICES + EDGES + 1 + bool(joined))

    def submit(self, message: Message) -> Future[Message]:
        """Start a process for a message; who joins has none."""
        node = message.metadata.dst_node_id - 1
        if node == JOINER:
            return self._joiner(message)
        struck = self._fault if self._fault is not None and self._fault.node == node else None
        if struck is not None and self.struck_unix_s is not None:
            struck = None
        here, there = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(message, self._node_config(node), struck, there), daemon=True
        )
        process.start()
        there.close()
        coming: Future[Message] = Future()
        self._processes.append((process, here))
        self._heard.append((process, here, coming))
        return coming

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers that came; a process that died never answers."""
        for listened in list(self._heard):
            process, pipe, coming = listened
            with suppress(EOFError, OSError):
                if pipe.poll():
                    received = pipe.recv()
                    if isinstance(received, Message):
                        self._heard.remove(listened)
                        coming.set_result(received)
                    else:
                        self._struck(process.pid, received, pipe)
        return super().pull_messages(message_ids)

    def close(self) -> None:
        """End every process."""
        for process, pipe in self._processes:
            process.kill()
            process.join()
            pipe.close()

    def _struck(self, pid: int, unix_s: float, pipe: Connection) -> None:
        assert self._fault is not None
        self.struck_unix_s = unix_s
        if self._fault.kind in _GOES_ON:
            for relay in self._relays:
                getattr(relay, self._fault.kind)(pid)
            if self._fault.role == "edge":
                getattr(self._relays[1 + self._fault.node - DEVICES], self._fault.kind)()
            pipe.send(self._fault.kind)

    def _joiner(self, message: Message) -> Future[Message]:
        """Answer, when asked who it is: that it is device 0, or nonsense, or nothing at all."""
        assert self._fault is not None
        self.struck_unix_s = time.time()
        said: Future[Message] = Future()
        if self._fault.phase == "claim":
            numbers = {"index": 0, "n-train": 8, "n-test": 8}
            said.set_result(answer(message, numbers, {"role": "device", "source": ""}))
        elif self._fault.phase == "nonsense":
            said.set_result(answer(message, {"index": float("nan")}))
        return said

    def _node_config(self, node: int) -> dict[str, str | int]:
        if node < DEVICES:
            return {"partition-id": node}
        return {"role": "edge", "edge-id": node - DEVICES, "bind": self._binds[node - DEVICES]}


def _work(
    message: Message, node_config: dict[str, Any], fault: Fault | None, pipe: Connection
) -> None:
    """Answer one message in this process, or be struck."""
    from fedsplit.apps.client_app import app as honest

    app: Callable[[Message, Context], Message] = honest
    if fault is not None and fault.kind == "malformed":
        app = _malformed(honest, fault, pipe)
        fault = None
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    torch.set_num_threads(1)
    context = Context(1, message.metadata.dst_node_id, node_config, RecordDict(), {})
    if fault is not None and fault.phase == "start":
        _strike_before_loading(fault, pipe)
    if fault is not None and fault.phase == "step":
        _strike_between_steps(fault, pipe)
    try:
        reply = app(message, context)
    except Exception as error:
        reply = Message(Error(1, str(error)), reply_to=message)
    if fault is not None and fault.phase == "end":
        _strike(fault, pipe)
    pipe.send(reply)
    atexit._run_exitfuncs()  # a process of multiprocessing leaves without; a SuperNode's does not


def _strike(fault: Fault, pipe: Connection) -> None:
    pipe.send(time.time())
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind in _GOES_ON:
        pipe.recv()


def _malformed(
    honest: Callable[[Message, Context], Message], fault: Fault, pipe: Connection
) -> Callable[[Message, Context], Message]:
    """Return an app that answers nothing at once, sends noise on the link, or lies at the end."""
    from fedsplit.transport import GrpcLink
    from fedsplit.transport.session import Session

    def app(message: Message, context: Context) -> Message:
        if fault.phase == "start":
            _strike(fault, pipe)
            return Message(RecordDict(), reply_to=message)
        reply = honest(message, context)
        if fault.phase == "end":
            _strike(fault, pipe)
            for name in reply.content.array_records:
                arrays = reply.content.array_records[name].to_torch_state_dict()
                broken = {key: value * float("nan") for key, value in arrays.items()}
                reply.content[name] = ArrayRecord(broken)
            reply.content["metrics"] = MetricRecord({"steps": 10**9})
        return reply

    calls, send, handle = itertools.count(), GrpcLink._send, Session.handle

    def noisy(frame: bytes) -> bytes:
        if next(calls) != 2:
            return frame
        _strike(fault, pipe)
        return frame[:48] + os.urandom(len(frame) - 48)

    if fault.phase == "step" and fault.role == "device":
        GrpcLink._send = lambda self, frame: send(self, noisy(frame))  # type: ignore[method-assign]
    elif fault.phase == "step":
        Session.handle = lambda self, data: noisy(handle(self, data))  # type: ignore[method-assign]
    return app


def _strike_before_loading(fault: Fault, pipe: Connection) -> None:
    from fedsplit.flower.node import device as session
    from fedsplit.flower.node import edge as edge_node

    module = session if fault.role == "device" else edge_node
    load = module.cached_model

    def struck(*args: Any) -> Any:
        _strike(fault, pipe)
        return load(*args)

    module.cached_model = struck


def _strike_between_steps(fault: Fault, pipe: Connection) -> None:
    from fedsplit.execution.turn import StageTurn
    from fedsplit.flower.node import device as session

    if fault.role == "device":
        name = "training_batches" if fault.work == TRAIN else "batches"
        original = getattr(session, name)

        def interrupted(*args: Any) -> Iterator[Any]:
            for index, batch in enumerate(original(*args)):
                if index == 1:
                    _strike(fault, pipe)
                yield batch

        setattr(session, name, interrupted)
        return
    name = "step" if fault.work == TRAIN else "evaluate"
    serve = getattr(StageTurn, name)
    calls = iter(range(1 << 30))

    def struck(*args: Any) -> Any:
        if next(calls) == 1:
            _strike(fault, pipe)
        return serve(*args)

    setattr(StageTurn, name, struck)
