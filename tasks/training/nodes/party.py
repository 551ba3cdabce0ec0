"""The ranks of one training on several nodes: started, heard, and taken down together.

Every node runs a launcher of its own over its ranks. A node that is lost, or that leaves, ends the party with
NodeLostError; who trains musters another, which goes on from the newest whole checkpoint.
"""

import contextlib
import logging
import queue
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from tasks.errors import StoppedError, WorkerError
from tasks.store.cache import Cache
from tasks.training.agent import free_port
from tasks.training.checkpoints import read_manifest
from tasks.training.nodes.crew import Crew, Member
from tasks.training.nodes.nodes import Launch, portable
from tasks.training.nodes.wire import SILENT_SECONDS, Message
from tasks.training.remote import Files, RemoteCheckpoints

log = logging.getLogger(__name__)

ENDING_SECONDS = SILENT_SECONDS + 10  # in which a node has ended its ranks, or is known to be gone
EXIT_SECONDS = 5.0  # between a launcher's last line and its end
SEEN = ".seen-"
ANSWER_SECONDS = 1.0  # how soon who waits for the others sees that it is not to wait any more
TELL_SECONDS = 60.0  # how often it is told whom is waited for


class NodeLostError(WorkerError):
    """A node of the party is gone; those that are left can go on."""


class DamagedError(NodeLostError):
    """A node has found the checkpoint damaged that was to be gone on from; the nodes can go on from the one before.

    part: the name of the file; node: the one that says so.
    """

    def __init__(self, message: str, part: str, node: str) -> None:
        super().__init__(message)
        self.part, self.node = part, node


class Party:
    """The nodes of one try and their ranks: ``shares``, this node's (None) first, which has rank 0.

    remote: where checkpoints go, where no folder is seen by all nodes. cache: of a store that is a bucket.
    """

    def __init__(
        self,
        crew: Crew,
        shares: Mapping[Member | None, int],
        roots: Mapping[str, Path],
        launcher: str,
        remote: RemoteCheckpoints | None = None,
        *,
        cache: Cache | None = None,
    ) -> None:
        self.crew, self.roots, self.launcher, self.remote, self.cache = crew, roots, launcher, remote, cache
        self.ranks = list(shares.values())
        self.members = [member for member in shares if member]
        self.number = crew.number
        self.ask = 0  # how often the members were asked for a checkpoint
        self.is_here = True  # this node's launcher has not ended
        self.has_killed = False  # it was ended since another's ranks were
        self.running: set[Member] = set()
        self.lost: list[Member] = []
        self.going: list[Member] = []
        self.code = 0  # of the first member's launcher that failed
        self.damage: tuple[str, str, str] | None = None  # of the checkpoint to go on from: what, which part, who says so

    def make_ready(self, plan_path: Path, hear: Callable[[str], None], is_stopped: Callable[[], bool]) -> bool:
        """Have the members bring what their ranks read to where they are; whether all of them have it.

        hear: is told of every line of theirs. As long as one takes no rank is started, none of which would wait so long.
        """
        plan = orjson.loads(plan_path.read_bytes())
        told = portable({"plan": plan, **self._places(plan)}, self.roots, self.cache)
        for node, member in enumerate(self.members, 1):
            self.running.add(member)
            member.wire.send({"say": "run", "party": self.number, "node": node, "ranks": self.ranks, **told})
        waiting, told_at = set(self.members), time.monotonic()
        while waiting and not (self.lost or self.code or is_stopped()):
            if time.monotonic() > told_at + TELL_SECONDS:
                log.info("%s: waiting for %s to have what its ranks read", plan["label"], ", ".join(map(str, waiting)))
                told_at = time.monotonic()
            try:
                who, heard = self.crew.events.get(timeout=ANSWER_SECONDS)
            except queue.Empty:
                continue
            message = heard or {"say": "gone"}
            if who is None or who not in self.running or message.get("party", self.number) != self.number:
                continue
            if message["say"] == "ready":
                waiting.discard(who)
            elif message["say"] == "line":
                hear(message["text"])
            else:
                self._note(who, message)
        return not waiting

    def go(self) -> Launch:
        """Tell the members, which are ready, to start their ranks; returns what this node is to start."""
        host = self.members[0].wire.own_address
        port = free_port(host)
        launches = [Launch(node, self.ranks, host, port, self.launcher) for node in range(len(self.ranks))]
        for member, launch in zip(self.members, launches[1:], strict=True):
            member.wire.send({"say": "go", "party": self.number, "launch": launch})
        return launches[0]

    def _places(self, plan: dict[str, Any]) -> dict[str, Any]:
        """By what a member finds the checkpoints, and sees that they are where the others' are."""
        if self.remote is None:
            return {"seen": str(_leave_sign(Path(plan["checkpoint_dir"])))}
        sign, resume = uuid.uuid4().hex, plan["resume_from"]
        self.remote.sign(sign)
        manifest = read_manifest(Path(resume)) if resume else None
        return {"kept": {"kind": self.remote.kind, "key": self.remote.key, "sign": sign, "resume": manifest}}

    def ask_to_keep(self, step: int, files: Files) -> None:
        """Have each member put its ranks' files of a checkpoint into the bucket."""
        self.ask += 1  # by a number: the same step may be asked for again, while an answer is on its way
        for member in self.members:
            member.wire.send({"say": "keep", "party": self.number, "ask": self.ask, "step": step, "files": files})

    def has_lost(self) -> bool:
        """Whether a member is gone."""
        return any(member not in self.crew.members for member in self.members)

    def await_kept(self, is_ended: Callable[[], bool]) -> str | None:
        """Wait until each has done what was asked last; what kept one from it, None where nothing did."""
        waiting = set(self.members)
        while waiting:
            if gone := next((member for member in waiting if member not in self.crew.members), None):
                return f"node {gone} is gone"
            try:
                member, message = self.crew.answers.get(timeout=ANSWER_SECONDS)
            except queue.Empty:
                if is_ended():
                    return "broken off"
                continue
            if message and (message.get("party"), message.get("ask")) == (self.number, self.ask):
                if why := message.get("why"):
                    return f"node {member}: {why}"
                waiting.discard(member)
        return None

    def lines(self, process: "subprocess.Popen[bytes]", local: Callable[[], Iterator[str]], stop_path: Path) -> Iterator[str]:
        """Every line of all ranks, until all nodes' launchers have ended or one is lost.

        process: this node's launcher; local: its lines, to its end. stop_path: see tasks.training.launch.
        """
        threading.Thread(target=self._pump, args=(local,), name="ranks", daemon=True).start()
        for member, message in self._events():
            if message["say"] == "line":
                yield message["text"]
            elif message["say"] == "going":
                assert member
                log.info("node %s was told to end; a checkpoint is written first", member)
                self.going.append(member)
                stop_path.touch()
            elif self._note(member, message):
                # At once: its ranks wait for peers that are gone, and die with it. Not where rank 0 may be sealing a checkpoint.
                if self.lost or (self.code and not self.going):
                    self._kill(process)
                if not self.is_here and self._has_failed(process):
                    return  # ``end`` sees to the members
        if self.is_here:
            self._kill(process)

    def _kill(self, process: "subprocess.Popen[bytes]") -> None:
        if process.poll() is None:
            self.has_killed = True
            process.kill()

    def end(self) -> None:
        """Take the members' ranks down, and drop a member that does not answer."""
        self.is_here = False
        self._tell_to_stop()
        for member, message in self._events():
            if message["say"] in ("ended", "gone"):
                self._note_end(member, message)
            elif message["say"] == "going" and member:
                self.going.append(member)
        for member in tuple(self.running):
            log.warning("node %s does not answer; it is dropped", member)
            member.wire.close()
            self._note_end(member, {"say": "gone"})

    def let_go(self) -> None:
        """Tell the members that leave that nothing more is asked of them."""
        for member in self.going:
            member.wire.send({"say": "leave"})

    def judge(self, label: str, stopped_step: int | None, *, is_asked: bool, is_told: bool = False) -> None:
        """Raise NodeLostError where others can go on in place of those that are gone; StoppedError where this node is to stop
        too (is_asked), and the ranks came to no checkpoint. is_told: a rank has said what is wrong with the run.
        """
        if is_asked and stopped_step is not None:
            return
        error: NodeLostError | None = None
        if self.damage:
            why, part, node = self.damage
            error = DamagedError(f"{label}: {why}", part, node)
        elif self.lost:
            error = NodeLostError(f"{label}: node {', '.join(map(str, self.lost))} is gone")
        elif self.going and stopped_step is not None:
            error = NodeLostError(f"{label}: node {', '.join(map(str, self.going))} leaves after step {stopped_step}")
        elif self.going and self.code and not is_told:
            names = ", ".join(map(str, self.going))
            error = NodeLostError(f"{label}: node {names} leaves, whose ranks ended before a checkpoint")
        if error and is_asked:
            raise StoppedError(f"{error}, and this node was told to end; run again to go on from the newest whole checkpoint")
        if error:
            raise error

    def _events(self) -> Iterator[tuple[Member | None, Message]]:
        """What this party's nodes say while one runs; for ENDING_SECONDS once this node's ranks have ended, or some failed."""
        deadline: float | None = None
        while self.is_here or self.running:
            if deadline is None and (self.code or not self.is_here):
                deadline = time.monotonic() + ENDING_SECONDS
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                member, message = self.crew.events.get(timeout=left)
            except queue.Empty:
                return
            message = message or {"say": "gone"}
            is_known = member in self.running if member else self.is_here
            if is_known and message.get("party", self.number) == self.number:
                yield member, message

    def _note(self, member: Member | None, message: Message) -> bool:
        """Note what a node says of its ranks; whether they have ended."""
        if message["say"] == "damaged":
            self.damage = str(message.get("why")), str(message.get("part")), str(member)
        if message["say"] not in ("ended", "gone"):
            return False
        self._note_end(member, message)
        self.code = self.code or int(message.get("code", 0))
        return True

    def _note_end(self, member: Member | None, message: Message) -> None:
        if member is None:
            self.is_here = False
            return
        self.running.discard(member)
        if message["say"] == "gone":
            self.lost.append(member)

    def _has_failed(self, process: "subprocess.Popen[bytes]") -> bool:
        """Whether this node's launcher, which says nothing any more, has ended with an error, or is overdue and goes on."""
        try:
            return process.wait(EXIT_SECONDS) != 0
        except subprocess.TimeoutExpired:
            return True

    def _tell_to_stop(self) -> None:
        for member in self.running:
            member.wire.send({"say": "stop"})

    def _pump(self, local: Callable[[], Iterator[str]]) -> None:
        try:
            with contextlib.suppress(OSError, ValueError):  # closed, as an interrupt takes the ranks down
                for text in local():
                    self.crew.events.put((None, {"say": "line", "party": self.number, "text": text}))
        finally:
            self.crew.events.put((None, {"say": "ended", "party": self.number}))


def _leave_sign(folder: Path) -> Path:
    """A new file in the checkpoints' folder, by which a node sees that it is given the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob(f"{SEEN}*"):
        earlier.unlink()
    sign = folder / f"{SEEN}{uuid.uuid4().hex}"
    sign.touch()
    return sign
