"""A node that joins: it waits for the node that leads, runs the ranks that it is told to, and goes when it is let go.

Reads   the plan over the wire, the plan's files in this node's store
Writes  PLAN.json into a folder of its own; the ranks write checkpoints where all nodes see them, or into a folder of this
        process's own below the cache, from which they go into the bucket
"""

import logging
import platform
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import orjson

from tasks.errors import SeqmillError, SettingsError, StoppedError, WorkerError
from tasks.machine import Nodes, TrainingSettings
from tasks.store import ArtifactStore, SharedStore
from tasks.training.arrivals import Arrivals
from tasks.training.launch import agent_command, ranks_lines
from tasks.training.lines import failure_line
from tasks.training.nodes.crew import PROTOCOL
from tasks.training.nodes.nodes import CHECKPOINTS, STORE, Launch, localized
from tasks.training.nodes.secret import introduce
from tasks.training.nodes.wire import Message, Wire
from tasks.training.run import WORKER
from tasks.training.share import DamagedPartError, Share, own_folder

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
# A file that was just made on another machine shows up late on a network's file system.
SIGHT_SECONDS = 10.0


def join(nodes: Nodes, store: ArtifactStore, settings: TrainingSettings, slots: int, *, stays: bool = False) -> None:
    """Take part in the trainings of the node that leads, until it lets this one go; ``stays``: and in those of the next run.

    Raises WorkerError where no node leads for ``nodes.wait_seconds``, StoppedError after SIGTERM.
    """
    roots = {STORE: store.root, **({CHECKPOINTS: settings.checkpoints} if settings.checkpoints else {})}
    with own_folder(store.root) if isinstance(store, SharedStore) else nullcontext() as folder:
        while _serve_once(nodes, slots, lambda wire: Node(wire, store, settings, roots, folder), stays=stays):
            pass


def _serve_once(nodes: Nodes, slots: int, node_at: Callable[[Wire], "Node"], *, stays: bool) -> bool:
    """Join once, and take part until let go, or the node that leads is gone; whether to join again."""
    wire = _reach(nodes, None if stays else nodes.wait_seconds)
    hello = {"say": "hello", "protocol": PROTOCOL, "name": platform.node(), "slots": slots}
    try:
        is_heard = introduce(wire, hello, nodes.secret)
    except SeqmillError:
        wire.close()
        raise
    if not is_heard:
        wire.close()
        time.sleep(RETRY_SECONDS)  # it is ending, or beginning
        return True
    log.info("joined %s:%d with up to %d ranks", nodes.host, nodes.port, slots)
    node = node_at(wire)
    before = signal.signal(signal.SIGTERM, node.ask_to_go)
    try:
        is_let_go = node.serve()
    finally:
        signal.signal(signal.SIGTERM, before)
        node.stop()
        wire.close()
    if node.is_going:
        raise StoppedError(f"{nodes.host}:{nodes.port}: told to end, and left; the other nodes go on")
    if is_let_go and not stays:
        log.info("%s:%d: the run is over", nodes.host, nodes.port)
        return False
    if not is_let_go:
        log.warning("%s:%d: the node that leads is gone; waiting for it", nodes.host, nodes.port)
    return True


def _reach(nodes: Nodes, seconds: float | None) -> Wire:
    """A connection to the node that leads, as soon as it listens."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        try:
            return Wire(socket.create_connection((nodes.host, nodes.port), timeout=10))
        except OSError as error:
            if deadline and time.monotonic() > deadline:
                raise WorkerError(
                    f"{nodes.host}:{nodes.port}: no node leads there after {seconds:g} s ({error.strerror or error}); start "
                    "seqmill run on the node with the number 0, and look at SEQMILL_RENDEZVOUS"
                ) from error
        time.sleep(RETRY_SECONDS)


def _await_sight(sign: Path) -> None:
    deadline = time.monotonic() + SIGHT_SECONDS
    while not sign.exists():
        if time.monotonic() > deadline:
            raise SettingsError(
                f"{platform.node()}: {sign} is not there, which the node that leads has made; give all nodes the same folder, "
                "as the store or as SEQMILL_CHECKPOINTS"
            )
        time.sleep(0.1)


class Node:
    """This node, while the one that leads is there."""

    def __init__(
        self,
        wire: Wire,
        store: ArtifactStore,
        settings: TrainingSettings,
        roots: Mapping[str, Path],
        folder: Path | None = None,
    ) -> None:
        """folder: where checkpoints of this node's ranks lie when they go into a bucket."""
        self.wire, self.store, self.settings, self.roots, self.folder = wire, store, settings, roots, folder
        self.share: Share | None = None  # of the checkpoints, where they go into a bucket
        self.process: subprocess.Popen[bytes] | None = None
        self.is_going = False

    def serve(self) -> bool:
        """Do as the node that leads says; returns whether it has let this one go, or is gone."""
        try:
            while (message := self.wire.receive()) is not None:
                match message["say"]:
                    case "run":
                        self._run(message)
                    case "keep":
                        self._keep(message)
                    case "stop":
                        self.stop()
                    case "leave":
                        return True
            return False
        finally:
            self._end_share()

    def stop(self) -> None:
        """End this node's ranks at once: those on the other nodes are ending too."""
        if self.process and self.process.poll() is None:
            self.process.kill()  # the ranks die with it: see tasks.machine.die_with_parent

    def ask_to_go(self, *_: Any) -> None:
        """On SIGTERM: the run saves a checkpoint first, in which this node's ranks take part."""
        self.is_going = True
        # A thread, since the signal may have come while this one was sending.
        threading.Thread(target=self._tell_going, daemon=True).start()

    def _tell_going(self) -> None:
        self.wire.send({"say": "going"})
        if self.process is None or self.process.poll() is not None:
            self.wire.close()

    def _run(self, message: Message) -> None:
        """Start this node's ranks; what they say goes to the node that leads."""
        party = message["party"]
        try:
            launch = Launch(**message["launch"])
            plan, arrivals = self._plan(message, launch)
        except DamagedPartError as error:
            self.wire.send({"say": "damaged", "party": party, "why": str(error)})
            self._fail(party, error)
            return
        except SeqmillError as error:
            self._fail(party, error)
            return
        folder = tempfile.TemporaryDirectory(prefix="seqmill-")
        try:
            plan_path = Path(folder.name) / "plan.json"
            plan_path.write_bytes(orjson.dumps(plan))
            command = agent_command(launch.command(WORKER, plan_path), self.settings, launch.environment())
        except SeqmillError as error:
            self._fail(party, error)
            folder.cleanup()
            return
        log.info("%s: %d of %d ranks", plan["label"], launch.ranks[launch.node], sum(launch.ranks))
        # By this thread, which lives as long as this process: ranks die with the thread that started them.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.process = process

        def follow() -> None:
            with folder, arrivals:
                for line in ranks_lines(process, lambda: False):
                    self.wire.send({"say": "line", "party": party, "text": line})
                code = process.wait()
            self.wire.send({"say": "ended", "party": party, "code": code})
            if self.is_going:
                self._go()

        threading.Thread(target=follow, name="ranks", daemon=True).start()
        arrivals.start(lambda error: self._give_up(party, error))

    def _plan(self, message: Message, launch: Launch) -> tuple[dict[str, Any], Arrivals]:
        """The plan with this node's paths, and what brings its files here where the store is not a folder of this node."""
        first = sum(launch.ranks[: launch.node])
        ranks = range(first, first + launch.ranks[launch.node])
        self._end_share()
        told = {"plan": message["plan"], "seen": message.get("seen")}
        if kept := message.get("kept"):
            assert self.folder
            self.share = Share(self.store, self.folder, kept)
            plan = localized(told, {**self.roots, CHECKPOINTS: self.share.root})["plan"]
            self.share.fetch(plan, ranks)
        else:
            read = localized(told, self.roots)
            plan = read["plan"]
            _await_sight(Path(read["seen"]))
        arrivals = Arrivals(self.store, plan, ranks)
        return {**plan, "is_arriving": arrivals.is_needed}, arrivals

    def _keep(self, message: Message) -> None:
        """Put this node's parts of a checkpoint into the bucket, beside the training."""
        share, party, step = self.share, message["party"], message["step"]

        def keep() -> None:
            why = share.send(step, message["files"]) if share else "no training is under way"
            self.wire.send({"say": "kept", "party": party, "step": step, "why": why})

        threading.Thread(target=keep, name="keep", daemon=True).start()

    def _end_share(self) -> None:
        """Else this process would not end before all that is being sent has been."""
        if self.share:
            self.share.end()
        self.share = None

    def _go(self) -> None:
        """Leave, once this node's ranks have ended; where the last checkpoint goes into a bucket, when it is there."""
        if self.share:  # the node that leads lets this one go
            timer = threading.Timer(self.settings.stop_seconds, self.wire.close)
            timer.daemon = True
            timer.start()
        else:
            self.wire.close()

    def _fail(self, party: int, error: BaseException) -> None:
        self.wire.send({"say": "line", "party": party, "text": failure_line(-1, error)})
        self.wire.send({"say": "ended", "party": party, "code": 1})

    def _give_up(self, party: int, error: BaseException) -> None:
        """A file does not come: the ranks that wait for it are ended, and the node that leads hears why."""
        self.wire.send({"say": "line", "party": party, "text": failure_line(-1, error)})
        self.stop()
