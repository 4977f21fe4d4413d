"""Who takes part: which Flower node is which device of the fleet."""

import json
import time
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from logging import INFO, WARNING
from typing import TypeAlias

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore import log

from fedsplit.data.counts import DeviceCounts
from fedsplit.errors import FedsplitError, NodeLost, SettingsError, require
from fedsplit.flower.messages import (
    HELLO,
    MOST_FILES,
    read_count,
    read_error,
    read_info,
    read_metrics,
    task_message,
)
from fedsplit.flower.tasks import Job
from fedsplit.measured import MeasuredProfile

MOST_SAMPLES = 10**9
"""Samples that a device may say it has: more weight than this nobody's data have."""
_POLL_S, _LOOK_S = 0.05, 1.0
_ASKED_AT_ONCE = 256  # of a simulation's nodes: enough for its places from one poll to the next
_LISTED = 10
_LONGEST_SITE, _LONGEST_PROFILE = 80, 1 << 16


@dataclass(frozen=True, slots=True)  # there may be tens of thousands
class DeviceNode:
    """One device of the federation, what it said of its data, and what it is called."""

    node_id: int
    index: int
    n_train: int
    n_test: int
    counts: DeviceCounts | None = None
    site: str = ""
    profile: MeasuredProfile | None = None
    left_out: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[str, int]:
        """Role and index."""
        return "device", self.index


@dataclass(frozen=True)
class EdgeNode:
    """One edge server of the federation, where devices reach it, and how fast it said it is."""

    node_id: int
    index: int
    address: str
    profile: MeasuredProfile | None = None

    @property
    def place(self) -> tuple[str, int]:
        """Role and index."""
        return "edge", self.index


_Places: TypeAlias = dict[tuple[str, int], DeviceNode | EdgeNode]
LoginKeys: TypeAlias = Mapping[tuple[str, int], bytes]
"""The public key of each device's and edge's node, by role and index."""


@dataclass(frozen=True)
class Roster:
    """The devices and edges of a run, by index; without edges, the server hosts that tier.

    `refused` are nodes that are none of these any more, or never were.
    """

    nodes: tuple[DeviceNode, ...]
    edges: tuple[EdgeNode, ...] = ()
    refused: frozenset[int] = frozenset()

    def by_index(self, index: int) -> DeviceNode:
        """Return device `index`.

        Raises
        ------
        FedsplitError
            If no node is this device.
        """
        if index in self._by_index:
            return self._by_index[index]
        known = _listed([node.index for node in self.nodes])
        raise FedsplitError(f"device={index}: must be one of {known}")

    @property
    def profiles(self) -> dict[tuple[str, int], MeasuredProfile]:
        """How fast devices and edges said they are, by role and index, where they did."""
        everyone: list[DeviceNode | EdgeNode] = [*self.nodes, *self.edges]
        return {node.place: node.profile for node in everyone if node.profile is not None}

    @property
    def node_ids(self) -> frozenset[int]:
        """Node ids of devices and edges."""
        devices = {node.node_id for node in self.nodes}
        return frozenset(devices | {edge.node_id for edge in self.edges})

    def by_node(self, node_id: int) -> DeviceNode:
        """Return the device that runs on Flower node `node_id`."""
        return self._by_node[node_id]

    @cached_property
    def _by_index(self) -> dict[int, DeviceNode]:
        return {node.index: node for node in self.nodes}

    @cached_property
    def _by_node(self) -> dict[int, DeviceNode]:
        return {node.node_id: node for node in self.nodes}


def discover(
    grid: Grid,
    job: Job,
    n_edges: int = 0,
    login_keys: LoginKeys | None = None,
    places: int | None = None,
) -> Roster:
    """Wait for the nodes and ask each which device or edge it is.

    A node that answers what cannot be, or names the place of another, is left out as if it had
    not come.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    job : Job
        The run's job; nodes check that they run the same source.
    n_edges : int
        Edge servers that are nodes of their own.
    login_keys : mapping, optional
        Where Flower authenticates nodes: whose place is whose. Else who comes first has it.
    places : int, optional
        As for `Joiners`.

    Raises
    ------
    FedsplitError
        If one of ``job.n_devices`` and `n_edges` is missing and for ``job.patience.connect_s`` none
        of them came, or as many nodes have answered; tells what nodes that were left out said.
    """
    patience_s = job.patience.connect_s
    joiners, roster = Joiners(grid, job, n_edges, login_keys, places), Roster(())
    missing, seat_due, deadline = list(joiners.places), 0.0, time.monotonic() + patience_s
    log(INFO, "Asking nodes which device they are, as they come")
    while True:
        joiners.tick(roster)
        # Each look at a large fleet takes time, so not one by one while others are still to say.
        if not joiners.asks or time.monotonic() > seat_due:
            seat_due = time.monotonic() + _LOOK_S
            roster = joiners.seat(roster, ())
            held = {node.place for node in roster.nodes} | {edge.place for edge in roster.edges}
            if held.issuperset(joiners.places):
                return roster
            before, missing = missing, [place for place in joiners.places if place not in held]
            if len(missing) < len(before):
                deadline = time.monotonic() + patience_s
            # Who has another's key is not the one whose place it names: that one may still come.
            if joiners.all_answered and login_keys is None:
                break
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    role = missing[0][0]
    numbers = _listed([index for who, index in missing if who == role])
    said = "; ".join(dict.fromkeys(joiners.left_out))
    why = f"left out: {said}" if said else f"no answer within {patience_s:.0f} s"
    raise FedsplitError(f"fleet: {role} {numbers} is missing ({why})")


def _listed(indices: Collection[int]) -> str:
    more = len(indices) - _LISTED
    listed = ", ".join(str(index) for index in list(indices)[:_LISTED])
    return f"{listed} and {more} more" if more > 0 else listed


class Joiners:
    """Nodes that join: asked who they are as they come, and nobody waits for them.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    job : Job
        The run's job.
    n_edges : int
        Edge servers that are nodes of their own.
    login_keys : mapping, optional
        As for `discover`.
    places : int, optional
        Nodes that can work at once, in a simulation; so many messages to all the others would only
        wait. None: all nodes have places of their own, and are asked at once.
    """

    def __init__(
        self,
        grid: Grid,
        job: Job,
        n_edges: int = 0,
        login_keys: LoginKeys | None = None,
        places: int | None = None,
    ) -> None:
        devices = [("device", index) for index in range(job.n_devices)]
        edges = [("edge", index) for index in range(n_edges)]
        self.places = dict.fromkeys(devices + edges)  # in order, and asked of every node that comes
        self.left_out: list[str] = []
        self._grid = grid
        self._job = job
        self._login_keys = login_keys
        self._at_once = None if places is None else max(2 * places, _ASKED_AT_ONCE)
        self._to_ask: deque[int] = deque()
        self._asked: dict[str, int] = {}
        self._come: list[Message] = []
        self._answered = 0
        self._look_due = 0.0

    @property
    def asks(self) -> bool:
        """Whether a node is to be asked, or has not answered yet."""
        return bool(self._asked or self._to_ask)

    @property
    def all_answered(self) -> bool:
        """Whether as many nodes as there are places have answered, and all who were asked."""
        return not self.asks and self._answered >= len(self.places)

    def tick(self, roster: Roster) -> None:
        """Ask those who are new, and collect what those say who were asked; to be called often."""
        if self._asked:
            for reply in self._grid.pull_messages(list(self._asked)):
                self._asked.pop(reply.metadata.reply_to_message_id, None)
                self._come.append(reply)
        if time.monotonic() >= self._look_due:
            self._look_due = time.monotonic() + _LOOK_S
            known = roster.node_ids.union(roster.refused, self._asked.values(), self._to_ask)
            known |= {reply.metadata.src_node_id for reply in self._come}
            self._to_ask += sorted(set(self._grid.get_node_ids()) - known)
        room = len(self._to_ask) if self._at_once is None else self._at_once - len(self._asked)
        asked = [self._to_ask.popleft() for _ in range(min(room, len(self._to_ask)))]
        messages = [task_message(node_id, HELLO, self._job) for node_id in asked]
        self._asked |= dict(zip(self._grid.push_messages(messages), asked, strict=True))

    def seat(self, roster: Roster, gone: Collection[int]) -> Roster:
        """Return `roster` with those who came, in free places or those of whom they replace.

        A device that is started again may be a new node to Flower. It gets its place back if the
        node that has it is not connected any more, or failed and is among those `gone`; whoever
        else names that place stays out, and so does who logged in with another key than its own.
        """
        if not self._come:
            return roster
        held: list[DeviceNode | EdgeNode] = [*roster.nodes, *roster.edges]
        seated: _Places = {node.place: node for node in held}
        refused = set(roster.refused)

        @cache  # where nobody's place is in question, nobody is looked up
        def connected() -> dict[int, bytes]:
            return {node.node_id: node.public_key for node in self._grid.get_nodes()}

        for reply in self._come:
            refused.add(reply.metadata.src_node_id)
            try:
                node = read_node(reply, self._job)
                role, index = node.place
                before = seated.get(node.place)
                if node.place not in self.places:
                    raise NodeLost(f"there is no {role} {index}")
                if self._login_keys is not None:
                    key = connected().get(node.node_id)
                    if key != self._login_keys[node.place]:
                        raise NodeLost(f"{role} {index} has another login key")
                if before is not None and before.node_id in connected().keys() - set(gone):
                    raise NodeLost(f"{role} {index} is another node, which is still there")
            except NodeLost as error:
                self.left_out.append(str(error))
                log(WARNING, "a node that joined is left out: %s", error)
                continue
            refused.discard(node.node_id)
            if before is not None:
                # Flower may hold the one it replaces for alive, up to a minute after its end.
                refused.add(before.node_id)
                log(INFO, "%s %s is back", role, index)
            seated[node.place] = node
        self._answered += len(self._come)
        self._come = []
        return _roster(seated, frozenset(refused))


def _roster(places: _Places, refused: frozenset[int]) -> Roster:
    ordered = [places[place] for place in sorted(places)]
    return Roster(
        tuple(node for node in ordered if isinstance(node, DeviceNode)),
        tuple(node for node in ordered if isinstance(node, EdgeNode)),
        refused,
    )


def read_node(reply: Message, job: Job) -> DeviceNode | EdgeNode:
    """Return who a node says it is.

    Raises
    ------
    NodeLost
        If it failed, runs another source, or says what cannot be.
    """
    if reply.has_error():
        raise NodeLost(f"node did not start: {read_error(reply)}")
    info, metrics = read_info(reply), read_metrics(reply)
    node_id, role = reply.metadata.src_node_id, info.get("role")
    index = read_count(metrics, "index")
    if role not in ("device", "edge"):
        raise NodeLost(f"answer: role={role!r:.80} must be device or edge")
    if info.get("source") != job.source:
        raise NodeLost(
            f"{role} {index} runs fedsplit source {info.get('source')!s:.40}, the server "
            f"{job.source}: must be the same; restart the node with this version"
        )
    try:
        text = info.get("profile", "")
        require(len(text) <= _LONGEST_PROFILE, "profile", len(text), "shorter")
        profile = MeasuredProfile.parse(text) if text else None
    except FedsplitError as error:
        raise NodeLost(f"{role} {index}: {error!s:.200}") from error
    if role == "edge":
        address = info.get("address", "")
        if not address:
            raise NodeLost(f"edge {index}: names no address")
        return EdgeNode(node_id, index, address, profile)
    if index >= job.n_devices:
        raise NodeLost(f"device {index}: must be below {job.n_devices}")
    counts = [read_count(metrics, name) for name in ("n-train", "n-test")]
    for name, count, least in zip(("n-train", "n-test"), counts, (1, 0), strict=True):
        if not least <= count <= MOST_SAMPLES:
            raise NodeLost(f"device {index}: {name}={count} must be {least} to {MOST_SAMPLES}")
    try:
        held = DeviceCounts.from_flat({name: int(value) for name, value in metrics.items()})
    except SettingsError as error:
        raise NodeLost(f"device {index}: {error}") from error
    n_train, n_test = counts
    site = info.get("site", "")
    if len(site) > _LONGEST_SITE or not site.isprintable():
        allowed = f"must be at most {_LONGEST_SITE} printable characters"
        raise NodeLost(f"device {index}: site={site!r:.80} {allowed}")
    left_out = _file_names(info.get("left-out", "[]"), f"device {index}")
    return DeviceNode(node_id, index, n_train, n_test, held, site, profile, left_out)


def _file_names(text: str, who: str) -> tuple[str, ...]:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    short = isinstance(names, list) and len(names) <= MOST_FILES
    if not short or not all(isinstance(name, str) and len(name) < 1 << 13 for name in names):
        raise NodeLost(f"{who}: left-out={text!r:.80} must be a list of {MOST_FILES} names at most")
    return tuple(names)
