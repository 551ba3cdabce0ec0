"""Runs a build in its own processes, ends it where asked, and says what is wrong with the store that it leaves."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.store import Artifact, ArtifactStore
from tests.faults.corpus import Pool, Sources
from tests.faults.events import KEY, Kill, Watch, read_trace

ROOT = Path(__file__).parents[2]
RUN_SECONDS = 120  # a run takes 2 s: one that takes so long hangs
ORPHAN_SECONDS = 10  # the pool's processes look for their parent each second; a busy machine is slow

Seen = dict[str, tuple[int, int]]  # ref of an artifact -> inode and modification time of its manifest


@dataclass(frozen=True)
class Delay:
    """A kill from outside, so many seconds behind "begin": of the parent, a process of the pool, or all."""

    seconds: float
    victim: str


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (negative: a signal), what it printed, its events, and the session of its processes."""

    code: int
    stdout: str
    stderr: str
    events: list[str]
    session: int

    @property
    def kills(self) -> list[str]:
        """The kind that was in the making at the kill, where the kill took place."""
        return [event.removeprefix("kill ") for event in self.events if event.startswith("kill ") and self.code != 0]


@dataclass(frozen=True)
class Building:
    """A run that goes on."""

    process: "subprocess.Popen[str]"
    trace: Path

    def wait(self, delay: Delay | None = None) -> Ended:
        pid = self.process.pid
        hit = self._strike(delay) if delay else False
        try:
            stdout, stderr = self.process.communicate(timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            kill_session(pid)
            raise AssertionError(f"a run hangs; its events are in {self.trace}") from None
        return Ended(self.process.returncode, stdout, stderr, [*self.events(), *(["kill delayed"] if hit else [])], pid)

    def events(self) -> list[str]:
        """What its processes have done so far, in order."""
        return [event for _, event in read_trace(self.trace)]

    def until(self, is_there: Callable[[list[str]], bool]) -> None:
        """Wait until its events are as asked."""
        end = time.monotonic() + RUN_SECONDS
        while not is_there(self.events()):
            assert self.process.poll() is None, "the run ended before"
            assert time.monotonic() < end, f"it never came so far; its events are in {self.trace}"
            time.sleep(0.02)

    def pid_that(self, event: str) -> int:
        """The process with this event."""
        return next(pid for pid, found in read_trace(self.trace) if found == event)

    def _strike(self, delay: Delay) -> bool:
        assert self.process.stdout
        self.process.stdout.readline()  # "begin"
        time.sleep(delay.seconds)
        pids = sorted(processes_of(self.process.pid))
        if self.process.poll() is not None or not pids:
            return False
        chosen = [self.process.pid] if delay.victim == "parent" else pids if delay.victim == "tree" else pids[-1:]
        for pid in chosen:
            _kill(pid)
        return True


def start(root: Path, sources: Sources, trace: Path, kill: Kill | None = None, pool: Pool = "processes") -> Building:
    """Start a build into the store at ``root``; its processes are a session of their own."""
    watch = Watch(str(root), str(trace), kill)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.build", pool, str(root), sources.corpus, sources.conversations],
        cwd=ROOT,
        env={**os.environ, **watch.environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return Building(process, trace)


def processes_of(session: int) -> Iterator[int]:
    """The living processes of a session."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, found = path.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue  # it ended while it was looked at
        if int(found) == session and state != "Z":
            yield int(path.parent.name)


def kill_session(session: int) -> None:
    for pid in processes_of(session):
        _kill(pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def outliving(session: int) -> list[int]:
    """What is left of a session after as long as it may take to notice the parent's death."""
    end = time.monotonic() + ORPHAN_SECONDS
    while (left := list(processes_of(session))) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def finished(root: Path) -> Seen:
    """Every finished artifact by its manifest's inode and time: whoever builds it again changes them."""
    found = {}
    for path in root.glob("[!.]*/*/manifest.json"):
        stat = path.stat()
        found[f"{path.parent.parent.name}/{path.parent.name}"] = (stat.st_ino, stat.st_mtime_ns)
    return found


def contents(root: Path) -> dict[str, tuple[str, Any]]:
    """What the store holds: every artifact's key, content and counts."""
    return {artifact.ref: (artifact.content, artifact.stats) for artifact in ArtifactStore(root).artifacts()}


def begun_again(before: Seen, events: list[str]) -> list[str]:
    """Artifacts that stood finished before a run, and that it began to build nonetheless."""
    done = {KEY.sub(r"\1", ref) for ref in before}
    begun = {event.split()[1].removeprefix(".staging/") for event in events if event.startswith("mkdir .staging/")}
    return sorted(done & begun)


def rebuilt(before: Seen, after: Seen) -> list[str]:
    """Artifacts that stood finished before, and are gone or others now."""
    return sorted(ref for ref, state in before.items() if after.get(ref) != state)


def damaged(root: Path) -> list[str]:
    """Every artifact that is not what its manifest says, to the bit."""
    store = ArtifactStore(root)
    found: list[tuple[Artifact, str | None]] = [(one, store.damage(one, digests=True)) for one in store.artifacts()]
    return [f"{artifact.ref}: {problem}" for artifact, problem in found if problem]


def remains(root: Path) -> list[str]:
    """What a run that ended leaves and should not: staging, things set aside, a half-made artifact, partial files."""
    patterns = (".staging/*/*", ".damaged/*", "[!.]*/*/.scratch", ".digests/.*")
    halves = [path for path in root.glob("[!.]*/*") if not (path / "manifest.json").exists()]
    return [str(path.relative_to(root)) for path in [*(path for one in patterns for path in root.glob(one)), *halves]]


@dataclass(frozen=True)
class Unbroken:
    """What a run gives that nobody kills: the line it prints, the store's contents, its events, its files' sizes."""

    stdout: str
    contents: dict[str, tuple[str, Any]]
    events: list[str]
    sizes: dict[str, int]  # of each artifact's largest file, 1 where it has none; its ref has the key as events have it
    seconds: float

    @classmethod
    def run(cls, folder: Path, sources: Sources, pool: Pool = "processes") -> "Unbroken":
        began = time.monotonic()
        ended = start(folder / "store", sources, folder / "trace", None, pool).wait()
        assert ended.code == 0, ended.stderr
        sizes = {
            KEY.sub(r"\1", artifact.ref): max((entry.num_bytes for entry in artifact.manifest.files), default=1)
            for artifact in ArtifactStore(folder / "store").artifacts()
        }
        seen = contents(folder / "store")
        shutil.rmtree(folder)
        return cls(ended.stdout, seen, ended.events, sizes, time.monotonic() - began)


class Broken:
    """A store that is built through kills, one run a kill; ``problems`` collects what is not as promised."""

    def __init__(self, folder: Path, sources: Sources) -> None:
        self.folder, self.root, self.sources = folder, folder / "store", sources
        self.kills: list[tuple[Pool, Kill | Delay]] = []
        self.hits: list[str] = []  # the kind that was in the making at each kill that took place
        self.problems: list[str] = []
        self.sessions: list[int] = []

    def run(self, kill: Kill | Delay | None, pool: Pool = "processes") -> Ended:
        before, number = finished(self.root), len(self.sessions)
        trace = self.folder / f"trace-{number}"
        building = start(self.root, self.sources, trace, kill if isinstance(kill, Kill) else None, pool)
        ended = building.wait(kill if isinstance(kill, Delay) else None)
        self.sessions.append(ended.session)
        if kill:
            self.kills.append((pool, kill))
            self.hits += ended.kills
        self._say("built again", [*rebuilt(before, finished(self.root)), *begun_again(before, ended.events)])
        if "Traceback" in ended.stderr:
            self.problems.append(f"run {number} ends in a traceback: {ended.stderr[-2000:]}")
        return ended

    def finish(self, unbroken: Unbroken) -> None:
        """Run to the end, and compare with the unbroken run."""
        ended = self.run(None)
        for session in self.sessions:
            self._say("processes outlive their run", outliving(session))
        if ended.code != 0 or ended.stdout != unbroken.stdout:
            self.problems.append(f"the last run ends with {ended.code} and other keys or contents: {ended.stdout}{ended.stderr}")
        found = contents(self.root)
        refs = sorted(found.keys() | unbroken.contents.keys())
        self._say("not as in the unbroken run", [ref for ref in refs if found.get(ref) != unbroken.contents.get(ref)])
        self._say("damaged", damaged(self.root))
        self._say("left behind", remains(self.root))

    def _say(self, what: str, found: list[Any]) -> None:
        if found:
            self.problems.append(f"{what}: {found}")
