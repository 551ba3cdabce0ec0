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

from tasks.errors import SeqmillError, StoppedError, WorkerError
from tasks.machine import Nodes, TrainingSettings
from tasks.store import ArtifactStore, SharedStore
from tasks.training.arrivals import Arrivals
from tasks.training.launch import agent_command, ranks_lines
from tasks.training.lines import failure_line
from tasks.training.nodes.crew import PROTOCOL
from tasks.training.nodes.nodes import CHECKPOINTS, STORE, Launch
from tasks.training.nodes.release import release
from tasks.training.nodes.secret import introduce
from tasks.training.nodes.wire import Message, Wire
from tasks.training.preparing import Preparing, own_error
from tasks.training.run import WORKER
from tasks.training.share import DamagedPartError, own_folder

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0


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
    hello = {"say": "hello", "protocol": PROTOCOL, "release": release(), "name": platform.node(), "slots": slots}
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
        self.preparing: Preparing | None = None  # of the newest party
        self.process: subprocess.Popen[bytes] | None = None
        self.is_going = False

    def serve(self) -> bool:
        """Do as the node that leads says; returns whether it has let this one go, or is gone."""
        try:
            is_let_go = self._obey()
        finally:
            if self.preparing:  # else this process would not end before all that is being sent has been
                self.preparing.drop()
        if self.preparing and not self.is_going:
            self.preparing.join()  # the next party's writes the same files
        return is_let_go

    def _obey(self) -> bool:
        while (message := self.wire.receive()) is not None:
            match message["say"]:
                case "run":
                    self._prepare(message)
                case "go":
                    self._start(message)
                case "keep":
                    self._keep(message)
                case "stop":
                    self._drop()
                    self.stop()
                case "leave":
                    return True
        return False

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

    def _prepare(self, message: Message) -> None:
        """Bring here what this node's ranks read; the node that leads hears when all of it is here."""
        before, party = self.preparing, message["party"]
        if before:
            before.drop()
        self.preparing = Preparing(
            self.store,
            self.roots,
            self.folder,
            message,
            on_ready=lambda: self.wire.send({"say": "ready", "party": party}),
            on_failure=lambda error: self._fail(party, error),
            before=before,
        )

    def _drop(self) -> None:
        """What is not started is not wanted any more; the node that leads waits to hear that it is over."""
        preparing = self.preparing
        if preparing and not preparing.is_started:
            preparing.drop()
            self.wire.send({"say": "ended", "party": preparing.party, "code": 1})

    def _start(self, message: Message) -> None:
        """Start this node's ranks; what they say goes to the node that leads."""
        party, preparing = message["party"], self.preparing
        if not preparing or preparing.party != party or preparing.is_dropped:
            return  # it was told to stop before
        plan, arrivals, launch = preparing.plan, preparing.arrivals, Launch(**message["launch"])
        assert plan is not None
        assert arrivals is not None
        preparing.is_started = True
        folder = tempfile.TemporaryDirectory(prefix="seqmill-", ignore_cleanup_errors=True)
        try:
            plan_path = Path(folder.name) / "plan.json"
            plan_path.write_bytes(orjson.dumps(plan))
            command = agent_command(launch.command(WORKER, plan_path), self.settings, launch.environment())
            # By this thread, which lives as long as this process: ranks die with the thread that started them.
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except (OSError, SeqmillError) as error:
            folder.cleanup()
            self._fail(party, error if isinstance(error, SeqmillError) else own_error(error, folder.name))
            return
        log.info("%s: %d of %d ranks", plan["label"], launch.ranks[launch.node], sum(launch.ranks))
        self.process = process
        threading.Thread(target=self._follow, args=(party, process, folder, arrivals), name="ranks", daemon=True).start()
        arrivals.start(lambda error: self._give_up(party, process, error))

    def _follow(
        self, party: int, process: "subprocess.Popen[bytes]", folder: "tempfile.TemporaryDirectory[str]", arrivals: Arrivals
    ) -> None:
        try:
            with folder, arrivals:
                for line in ranks_lines(process, lambda: False):
                    self.wire.send({"say": "line", "party": party, "text": line})
        except Exception:
            log.exception("the ranks are not heard any more, and ended")
            process.kill()
        finally:  # whatever it is: the node that leads waits for it
            self.wire.send({"say": "ended", "party": party, "code": process.wait()})
        if self.is_going:
            self._leave()

    def _keep(self, message: Message) -> None:
        """Put this node's parts of a checkpoint into the bucket, beside the training."""
        share, party, ask = self.preparing and self.preparing.share, message["party"], message["ask"]
        if share:
            share.newest_ask = ask

        def keep() -> None:
            why = share.send(message["step"], message["files"], ask) if share else "no training is under way"
            self.wire.send({"say": "kept", "party": party, "ask": ask, "why": why})

        threading.Thread(target=keep, name="keep", daemon=True).start()

    def _leave(self) -> None:
        """Leave, once this node's ranks have ended; where the last checkpoint goes into a bucket, when it is there."""
        if self.preparing and self.preparing.share:  # the node that leads lets this one go
            timer = threading.Timer(self.settings.stop_seconds, self.wire.close)
            timer.daemon = True
            timer.start()
        else:
            self.wire.close()

    def _fail(self, party: int, error: BaseException) -> None:
        if isinstance(error, DamagedPartError):
            self.wire.send({"say": "damaged", "party": party, "why": str(error), "part": error.part})
        self.wire.send({"say": "line", "party": party, "text": failure_line(-1, error)})
        self.wire.send({"say": "ended", "party": party, "code": 1})

    def _give_up(self, party: int, process: "subprocess.Popen[bytes]", error: BaseException) -> None:
        """A file does not come: the ranks that wait for it are ended, and the node that leads hears why."""
        self.wire.send({"say": "line", "party": party, "text": failure_line(-1, error)})
        if process.poll() is None:
            process.kill()
