"""What a build does to its store, seen by an audit hook in each of its processes; the hook can end a process at any of it.

An event is named by what it does and to which path of the store, so that it is the same in every run, whichever process of
the pool comes to it: "rename .staging/tokens-shard/1f0c22d1a9b3 1". The number counts the same event in one process.

Writes  <trace>/<pid>   the events of one process, one a line, each behind its time in nanoseconds
"""

import os
import re
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

ENVIRONMENT = "SEQMILL_FAULTS"  # carries a Watch from the harness to the build and on to its pool
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
KEY = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")
CHANCE = re.compile(r"\.[0-9a-f]{8}\.partial$")

Victim = Literal["self", "parent", "tree", "stopped"]


@dataclass(frozen=True)
class Kill:
    """Where a process is to end.

    event: the kill comes just before it is done. victim: the process that does it, its parent, or all; "stopped" kills none
    and lets that process wait for ever. num_bytes: instead of that, the process dies where, from then on, it writes the byte
    behind so many into one file, so that the file is torn.
    """

    event: str
    victim: Victim = "self"
    num_bytes: int | None = None


@dataclass(frozen=True)
class Watch:
    """The store that is looked at, where its events are written, and where to kill."""

    store: str
    trace: str
    kill: Kill | None = None

    def environment(self) -> dict[str, str]:
        return {ENVIRONMENT: orjson.dumps(asdict(self)).decode()}


def watch_this_process() -> None:
    """Install the hook, where the harness asks for it; call it in the main thread, before the work."""
    if text := os.environ.get(ENVIRONMENT):
        fields = orjson.loads(text)
        kill = Kill(**fields.pop("kill")) if fields["kill"] else None
        _Hook(Watch(**{**fields, "kill": kill})).install()


def kind_of(event: str) -> str:
    """The kind of artifact that an event is about."""
    path = event.split()[1].split("/")
    where = path[1] if path[0].startswith(".") and len(path) > 1 else path[0]
    return re.sub(r"-[0-9a-f]{12}$", "", where)


def read_trace(trace: Path) -> list[tuple[int, str]]:
    """The events of all processes in the order of their times, each behind its process."""
    lines = ((int(path.name), line.partition(" ")) for path in trace.glob("*") for line in path.read_text().splitlines())
    return [(pid, event) for _, pid, event in sorted((int(when), pid, event) for pid, (when, _, event) in lines)]


class _Hook:
    def __init__(self, watch: Watch) -> None:
        self.root, self.kill = f"{watch.store}/", watch.kill
        self.counts: Counter[str] = Counter()
        self.is_quiet, self.writing = False, threading.Lock()
        Path(watch.trace).mkdir(parents=True, exist_ok=True)
        self.trace = os.open(f"{watch.trace}/{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.names: dict[str, Callable[[Any], tuple[str, str] | None]] = {
            "open": _opened,
            "os.mkdir": lambda args: ("mkdir", _full(args[0], args[2])),
            "os.rename": lambda args: ("rename", _full(args[0], args[2])),
            "os.remove": lambda args: ("remove", _full(args[0], args[1])),
            "os.rmdir": lambda args: ("rmdir", _full(args[0], args[1])),
            "os.link": lambda args: ("link", _full(args[1], args[3])),
            "fcntl.flock": lambda args: ("flock", _of_descriptor(args[0])),
        }

    def install(self) -> None:
        if self.kill and self.kill.num_bytes is not None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and the write would fail instead
        sys.addaudithook(self.hear)
        fsync = os.fsync  # raises no audit event

        def watched_fsync(descriptor: int) -> None:
            self.see("fsync", _of_descriptor(descriptor))
            fsync(descriptor)

        os.fsync = watched_fsync  # type: ignore[assignment]

    def hear(self, name: str, args: Any) -> None:
        if (read := self.names.get(name)) and (seen := read(args)):
            self.see(*seen)

    def see(self, what: str, path: str) -> None:
        if not path.startswith(self.root):
            return
        path = CHANCE.sub(".partial", KEY.sub(r"\1", path.removeprefix(self.root)))
        self.counts[f"{what} {path}"] += 1
        event = f"{what} {path} {self.counts[f'{what} {path}']}"
        if self.kill and self.kill.event == event:
            self.end(self.kill)
        self.write(event)

    def write(self, event: str) -> None:
        with self.writing:
            if not self.is_quiet:
                os.write(self.trace, f"{time.monotonic_ns()} {event}\n".encode())

    def end(self, kill: Kill) -> None:
        self.write(f"kill {kind_of(kill.event)}")
        if kill.num_bytes is not None:
            with self.writing:  # the trace is a file too, and may be longer: no thread may be about to write to it
                self.is_quiet = True
                resource.setrlimit(resource.RLIMIT_FSIZE, (kill.num_bytes, resource.RLIM_INFINITY))
        elif kill.victim == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kill.victim == "tree":
            os.killpg(0, signal.SIGKILL)
        else:
            in_pool = "--multiprocessing-fork" in sys.orig_argv
            os.kill(os.getppid() if kill.victim == "parent" and in_pool else os.getpid(), signal.SIGKILL)


def _opened(args: Any) -> tuple[str, str] | None:
    path, _, flags = args
    if not isinstance(path, str | bytes | os.PathLike):
        return None
    return ("create" if flags & WRITING else "read", _full(path, -1))


def _full(path: Any, folder: int) -> str:
    """A path as text; under the folder of a descriptor where the call names one."""
    text = os.fsdecode(path)
    return f"{_of_descriptor(folder)}/{text}" if folder >= 0 and not text.startswith("/") else text


def _of_descriptor(descriptor: Any) -> str:
    number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    return os.readlink(f"/proc/self/fd/{number}")
