"""A Flower grid whose nodes are at hand in this program: messages go in, futures come out."""

import itertools
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, as_completed
from contextlib import suppress

from flwr.app import Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1


class LocalGrid(Grid):
    """All of Flower's grid but who the nodes are (`get_node_ids`) and who answers (`submit`)."""

    def __init__(self) -> None:
        self._run = Run.create_empty(RUN_ID)
        self._numbers = itertools.count(1)
        self._replies: dict[str, Future[Message]] = {}
        self._contexts: dict[int, Context] = {}
        self._at_work: Counter[int] = Counter()
        # Flower's processes get these when they start; no message can be made without.
        TaskIdentity.run_id = TaskIdentity.task_id = RUN_ID
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    @abstractmethod
    def submit(self, message: Message) -> Future[Message]:
        """Have a node work on a message."""

    def context(self, node: int, node_config: Mapping[str, bool | float | int | str]) -> Context:
        """Return what a node is given with every message; its state is what it left there."""
        fresh = Context(
            run_id=RUN_ID,
            node_id=node,
            node_config=dict(node_config),
            state=RecordDict(),
            run_config={},
        )
        return self._contexts.setdefault(node, fresh)

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run, which has nothing but a number."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes, in the order of their ids as `get_node_ids` gives them."""
        return [NodeInfo(node_id=number, status="online") for number in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their numbers."""
        names = []
        for message in messages:
            name = f"message-{next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = name
            self._replies[name] = self.submit(message)
            self._at_work[message.metadata.dst_node_id] += 1
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers that are there of the messages with these numbers."""
        there = [name for name in message_ids if name in self._replies]
        return [self._take(name) for name in there if self._replies[name].done()]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages; return the answers that come within `timeout` seconds."""
        names = list(self.push_messages(messages))
        sent = {self._replies[name]: name for name in names}
        answers: list[Message] = []
        with suppress(TimeoutError):
            for future in as_completed(sent, timeout):
                answers.append(self._take(sent[future]))
        return answers

    def _take(self, name: str) -> Message:
        """Return the answer to a message; of a node that left nothing, nothing is kept."""
        answer = self._replies.pop(name).result()
        node = answer.metadata.src_node_id
        self._at_work[node] -= 1
        if not self._at_work[node]:
            del self._at_work[node]
            if node in self._contexts and not self._contexts[node].state:
                del self._contexts[node]
        return answer


class WatchedGrid(LocalGrid):
    """One that sees when a node begins to work on a message (`server.liveness.Watcher`)."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[int, Callable[[], None]] = {}

    def when_begun(self, message: Message, call: Callable[[], None]) -> None:
        """Have `call` made when a node begins to work on `message`, which is still to be pushed."""
        self._calls[id(message)] = call

    def beginning(self, message: Message) -> Callable[[], None]:
        """Return what is to be called, once, when a node begins to work on `message`."""
        return self._calls.pop(id(message), _nothing)


def _nothing() -> None:
    pass
