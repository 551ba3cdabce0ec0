"""What tests have workers do. Named here, where a worker can import it."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tasks.cluster.parcel import Cache
from tasks.errors import CorpusError, StoreError
from tasks.machine import Machine
from tasks.store import Artifact, Built, Spec, Work, stage, store_of

CACHE_VARIABLE = "SEQMILL_TEST_CACHE"


def cache() -> Cache:
    """This worker's own scratch folder."""
    return Cache(Path(os.environ[CACHE_VARIABLE]))


def double(number: int) -> int:
    return 2 * number


def refuse(number: int) -> int:
    if number == 3:
        raise CorpusError("shard 3: planted; mend it")
    return number


def refuse_for_want_of_room(number: int) -> int:
    raise StoreError("here: no room; free some")


@dataclass(frozen=True)
class Mark:
    """Which items were begun, and by whom: a file each in ``folder``."""

    folder: Path
    number: int

    def begun(self) -> int:
        """How often it was begun, this time with it."""
        (self.folder / f"{self.number}-{os.getpid()}-{time.time_ns()}").touch()
        return len(list(self.folder.glob(f"{self.number}-*")))


def die_once(mark: Mark) -> int:
    """Item 3 kills the worker that begins it first."""
    if mark.begun() == 1 and mark.number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return mark.number


def die_always(mark: Mark) -> int:
    if mark.number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return mark.begun() and mark.number


GO_ON = "go-on"  # a file by which a test ends what it made slow
MOST_SECONDS = 60


def stand_still_once(mark: Mark) -> int:
    """The worker that begins item 3 first does not come back before the test lets it."""
    if mark.begun() == 1 and mark.number == 3:
        end = time.monotonic() + MOST_SECONDS
        while not (mark.folder / GO_ON).exists() and time.monotonic() < end:
            time.sleep(0.05)
    return mark.number


def take_a_while(mark: Mark) -> int:
    mark.begun()
    if not (mark.folder / GO_ON).exists():
        time.sleep(0.2)
    return mark.number


class NumberSpec(Spec):
    number: int


@stage("number", revision=1)
def build_number(work: Work, spec: NumberSpec) -> Built:
    (work.folder / "number").write_text(str(spec.number))
    return Built({"number": spec.number})


def next_number(artifact: Artifact) -> Artifact:
    return build_number(store_of(artifact), Machine(), NumberSpec(number=int(artifact.file("number").read_text()) + 1))
