"""The node that leads: it listens for the others, and gives each training a party of those that are there.

A node may come at any time, and is taken along by the next party. One that is lost in a training ends that party: see
tasks.training.nodes.party.
"""

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.errors import SettingsError, WorkerError
from tasks.machine import Nodes
from tasks.training.nodes.nodes import share_out
from tasks.training.nodes.release import differing
from tasks.training.nodes.secret import is_known
from tasks.training.nodes.wire import Message, Wire, plain

log = logging.getLogger(__name__)

HELLO_SECONDS, HELLO_BYTES = 10.0, 1 << 12
ACCEPT_SECONDS = 1.0  # between two tries to take a connection, as where too many files are open
# What both ends must agree on: raise it with every change of a message or of the plan.
PROTOCOL = 5


class Member:
    """A node that has joined."""

    def __init__(self, name: str, slots: int, wire: Wire) -> None:
        self.name, self.slots, self.wire = name, slots, wire
        self.is_going = False  # it was told to end, and leaves as soon as a checkpoint is written

    def __str__(self) -> str:
        return f"{self.name} ({self.wire.peer_address})"


# Of whom, and what; None: the node is gone. A member None: this node's own ranks.
Event = tuple[Member | None, Message | None]


class Crew:
    """All nodes that have joined. ``events``: what they say, for the one party that is under way.

    ``answers``: what they say of a checkpoint that goes into the bucket, which another thread waits for.
    """

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.events: queue.Queue[Event] = queue.Queue()
        self.answers: queue.Queue[tuple[Member, Message | None]] = queue.Queue()
        self.members: list[Member] = []
        self.number = 0  # of the party under way
        self._changed = threading.Condition()
        self._turn = threading.Lock()
        self._listener = _listen(nodes)
        self._is_closed = False
        threading.Thread(target=self._accept, name="crew", daemon=True).start()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One training at a time has the nodes; another branch's waits."""
        with self._turn:
            yield

    def muster(self, where: str, slots: int, global_batch_size: int) -> dict[Member | None, int]:
        """The ranks of every node of a new party, this one's (None) first; waits for nodes.

        slots: the most ranks of this node. Raises WorkerError where too few nodes come.
        """
        nodes = self.nodes
        if (here := self._wait_for(nodes.least, nodes.wait_seconds, where)) < nodes.least:
            raise WorkerError(
                f"{where}: {here} nodes of at least {nodes.least} are at {nodes.host}:{nodes.port} after "
                f"{nodes.wait_seconds:g} s; start seqmill join on the others, or lower SEQMILL_NODES, and run again to go on"
            )
        self._wait_for(nodes.most, nodes.settle_seconds, where)
        with self._changed:
            members = self._staying()[: nodes.most - 1]
        ranks = share_out([slots, *(member.slots for member in members)], global_batch_size)
        shares = {member: number for member, number in zip([None, *members], ranks, strict=True) if number}
        idle = sum((slots, *(member.slots for member in members))) - sum(ranks)
        log.info(
            "%s: %d ranks on %d nodes%s", where, sum(ranks), len(shares),
            f"; room for {idle} more is idle, which do not divide global_batch_size {global_batch_size}" if idle else "",
        )  # fmt: skip
        self.number += 1
        return shares

    def close(self) -> None:
        """Let the nodes go: no training comes any more."""
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        for member in tuple(self.members):
            member.wire.send({"say": "leave"})

    def _wait_for(self, number: int, seconds: float, where: str) -> int:
        """Wait until so many nodes are here; returns how many are."""
        deadline, is_told = time.monotonic() + seconds, False
        with self._changed:
            while (here := 1 + len(self._staying())) < number and (left := deadline - time.monotonic()) > 0:
                if not is_told:
                    log.info("%s: %d of %d nodes are here; waiting up to %g s", where, here, number, seconds)
                    is_told = True
                self._changed.wait(left)
            return here

    def _staying(self) -> list[Member]:
        return [member for member in self.members if not member.is_going]

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:  # closed; or of one connection, which is lost, and not of those to come
                if not self._is_closed:
                    log.warning("rendezvous: a node cannot be heard (%s); listening goes on", error.strerror or error)
                    time.sleep(ACCEPT_SECONDS)
                continue
            threading.Thread(target=self._welcome, args=(connection,), name="member", daemon=True).start()

    def _welcome(self, connection: socket.socket) -> None:
        """Hear one node for as long as it is there."""
        try:
            wire = Wire(connection)
        except OSError:  # gone already
            connection.close()
            return
        member = _member(wire, self.nodes.secret)
        if member is None:
            wire.close()
            return
        with self._changed:
            self.members.append(member)
            self._changed.notify_all()
        log.info("node %s has joined, for up to %d ranks", member, member.slots)
        while (message := wire.receive()) is not None:
            if message["say"] == "going":
                member.is_going = True
            (self.answers if message["say"] == "kept" else self.events).put((member, message))
        with self._changed:
            self.members.remove(member)
            self._changed.notify_all()
        self.events.put((member, None))
        self.answers.put((member, None))
        wire.close()
        log.info("node %s is gone", member)


def _listen(nodes: Nodes) -> socket.socket:
    """On the rendezvous' address where it is given as a number; where it is a name, which may mean another here, on all."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    address = nodes.host if nodes.host.replace(".", "").isdecimal() else ""
    try:
        listener.bind((address, nodes.port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"rendezvous: {nodes.host}:{nodes.port} cannot be listened on ({error.strerror}); give an address of this node and a "
            "free port; a node that does not lead has SEQMILL_NODE_RANK 1 or more"
        ) from error
    return listener


def _member(wire: Wire, secret: str) -> Member | None:
    """Who is there; None for what is no node of ours, which is told so."""
    hello = wire.receive(HELLO_SECONDS, HELLO_BYTES)
    if hello is None or hello["say"] != "hello":
        log.warning("rendezvous: %s says nothing that a node says; turned away", wire.peer_address)
        return None
    if why := _other_release(hello):
        wire.send({"say": "refuse", "why": f"{why} than on the node that leads; install the same on all"})
        log.warning(
            "node %s (%s): %s than here%s; turned away", plain(hello.get("name")), wire.peer_address, why, _told_apart(hello)
        )
        return None
    if not is_known(wire, hello, secret):
        return None
    slots = hello.get("slots")
    return Member(plain(hello.get("name")), slots, wire) if isinstance(slots, int) and slots > 0 else None


def _other_release(hello: Message) -> str | None:
    """In what a node is of another release; not by which version of this one's: who asks has not shown yet that he is a node."""
    if hello.get("protocol") != PROTOCOL:
        return "another release of seqmill"
    names = ", ".join(differing(hello.get("release")))
    return f"another release of {names}" if names else None


def _told_apart(hello: Message) -> str:
    found = differing(hello.get("release"))
    told = ", ".join(f"{name} {plain(theirs)}, here {here}" for name, (theirs, here) in found.items())
    return f" ({told})" if told else ""


_crews: dict[tuple[str, int], Crew] = {}
_crews_lock = threading.Lock()


def crew_of(nodes: Nodes) -> Crew:
    """The crew of this process, which listens from the first call on."""
    with _crews_lock:
        place = (nodes.host, nodes.port)
        if place not in _crews:
            _crews[place] = Crew(nodes)
        return _crews[place]


@contextmanager
def leading(nodes: Nodes | None) -> Iterator[None]:
    """While a run lasts: nodes may join from its start on, and are let go at its end, whether anything was trained or not."""
    if nodes is None:
        yield
        return
    crew = crew_of(nodes)
    try:
        yield
    finally:
        with _crews_lock:
            _crews.pop((nodes.host, nodes.port), None)
        crew.close()
