"""A grid of nodes at hand: what they leave in their contexts is there again, and nothing else."""

from collections.abc import Iterable
from concurrent.futures import Future

from flwr.app import Context, Message, MetricRecord, RecordDict

from fedsplit.flower.local_grid import LocalGrid


class Held(LocalGrid):
    """Nodes that answer when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Message, Context, Future[Message]]] = []

    def get_node_ids(self) -> Iterable[int]:
        return range(1, 1000)

    def submit(self, message: Message) -> Future[Message]:
        answer: Future[Message] = Future()
        self.given.append((message, self.context(message.metadata.dst_node_id, {}), answer))
        return answer

    def ask(self, node: int) -> str:
        """Send a message; return its number."""
        message = self.create_message(RecordDict(), "query", node, "")
        (number,) = self.push_messages([message])
        return number

    def answer(self, leaving: str = "") -> None:
        """Have the one that has waited longest answer, and leave something behind."""
        message, context, answer = self.given.pop(0)
        if leaving:
            context.state[leaving] = MetricRecord({"x": 1})
        answer.set_result(Message(RecordDict(), reply_to=message))


def test_only_what_nodes_leave_behind_is_kept() -> None:
    """Of ten thousand nodes that only said who they are, nothing is."""
    grid = Held()
    numbers = [grid.ask(node) for node in (1, 2, 3)]
    for leaving in ("", "moments", ""):
        grid.answer(leaving)
    assert len(list(grid.pull_messages(numbers))) == 3
    assert list(grid._contexts) == [2]
    grid.ask(2)
    assert list(grid.given[0][1].state) == ["moments"]


def test_two_messages_at_one_node_have_one_context() -> None:
    """What the later one leaves is not lost when the earlier one has left nothing."""
    grid = Held()
    first, second = grid.ask(7), grid.ask(7)
    grid.answer()
    assert len(list(grid.pull_messages([first]))) == 1
    grid.answer("moments")
    assert len(list(grid.pull_messages([second]))) == 1
    grid.ask(7)
    assert list(grid.given[0][1].state) == ["moments"]


def test_what_was_sent_and_waited_for_is_taken_the_same_way() -> None:
    grid = Held()
    message = grid.create_message(RecordDict(), "query", 5, "")
    sent = grid.submit  # answers at once

    def at_once(message: Message) -> Future[Message]:
        answer = sent(message)
        grid.answer()
        return answer

    grid.submit = at_once  # type: ignore[method-assign]
    assert len(list(grid.send_and_receive([message], timeout=5))) == 1
    assert grid._contexts == {}
