"""A training's checkpoints on their way into a bucket, beside the training: always the newest one that is whole here.

Reads   checkpoints/checkpoint-<step>/*   of this node's ranks; other nodes send their own
Writes  checkpoints/.upload-<random>/     hard links, so that a checkpoint pruned meanwhile is sent whole
"""

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from tasks.errors import SeqmillError, WorkerError
from tasks.training.checkpoints import read_manifest
from tasks.training.remote import Files, RemoteCheckpoints, part_objects

log = logging.getLogger(__name__)

LINKS = ".upload-"
END_SECONDS = 5.0  # for a request that is under way, when nothing more is to be sent


# By the place in a bucket that each puts checkpoints into.
_under_way: dict[str, threading.Thread] = {}


def await_earlier(remote: RemoteCheckpoints) -> None:
    """Wait for what an earlier try of this process is putting still: put later, it would stand for another run's.

    It ends with the request that is under way, for which the bucket itself is not waited for any longer than ever.
    """
    thread = _under_way.pop(remote.address, None)
    if thread and thread.is_alive():
        log.info("%s: waiting for the bucket to answer to what was put before", remote.address)
        thread.join()


class Others(Protocol):
    """The other nodes of a training."""

    def ask_to_keep(self, step: int, files: Files) -> None:
        """Have each send what it has of a checkpoint's files."""

    def has_lost(self) -> bool:
        """Whether one is gone, without whose files no checkpoint of theirs can be whole."""

    def await_kept(self, is_ended: Callable[[], bool]) -> str | None:
        """Wait until each has done what was asked last; what kept one from it, None where nothing did."""


class Uploads:
    """What is sealed in ``root`` goes into the bucket, one checkpoint at a time."""

    def __init__(
        self, remote: RemoteCheckpoints, root: Path, *, kept_step: int, metrics: Callable[[int], bytes], others: Others | None
    ) -> None:
        """metrics: the reports up to a step. kept_step: that of the newest checkpoint in the bucket, 0 where there is none."""
        self.remote, self.root, self.metrics, self.others = remote, root, metrics, others
        self.sealed_step = self.kept_step = kept_step  # the newest here, and in the bucket
        self._tried: set[str] = set()  # what may be in the bucket of checkpoints that did not come to be
        self._pending: int | None = None
        self._is_busy = self._is_ended = False
        self._changed = threading.Condition()
        remove_links(root)
        thread = _under_way[remote.address] = threading.Thread(target=self._run, name="uploads", daemon=True)
        thread.start()

    def add(self, step: int) -> None:
        """A checkpoint is whole here. One that still waits is passed over for it."""
        with self._changed:
            if self._pending is not None:
                log.info("checkpoint-%d: not put into the bucket: checkpoint-%d is newer", self._pending, step)
            self._pending = self.sealed_step = step
            self._changed.notify_all()

    def finish(self, seconds: float) -> None:
        """Wait until the newest is in the bucket, tried once more where it failed; at most so long."""
        deadline = time.monotonic() + seconds
        with self._changed:
            if self.kept_step == self.sealed_step:
                return
            log.info("checkpoint-%d: not in the bucket yet; waiting up to %.0f s", self.sealed_step, max(0.0, seconds))
            is_done = self._await_idle(deadline)
            if is_done and self.kept_step < self.sealed_step and not self._is_ended:
                self._pending = self.sealed_step
                self._changed.notify_all()
                is_done = self._await_idle(deadline)
        if not is_done:
            log.warning("checkpoint-%d: not in the bucket after %.0f s%s", self.sealed_step, seconds, self._fallback())

    def _await_idle(self, deadline: float) -> bool:
        left = max(0.0, deadline - time.monotonic())
        return self._changed.wait_for(lambda: self._pending is None and not self._is_busy, left)

    def end(self) -> None:
        """Send nothing more, and break off what is being sent."""
        with self._changed:
            self._is_ended, self._pending = True, None
            self._changed.notify_all()
            self._await_idle(time.monotonic() + END_SECONDS)

    def _run(self) -> None:
        while (step := self._next()) is not None:
            try:
                self._upload(step)
            except Exception as error:  # whatever it is: it would end this thread, and no later checkpoint would be sent
                if not self._is_ended:
                    log.warning(
                        "checkpoint-%d: not put into the bucket (%s); training goes on, the next one is tried%s",
                        step, told(error), self._fallback(),
                    )  # fmt: skip
            finally:
                with self._changed:
                    self._is_busy = False
                    self._changed.notify_all()

    def _next(self) -> int | None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_ended or self._pending is not None)
            step, self._pending = self._pending, None
            self._is_busy = step is not None
            return step

    def _upload(self, step: int) -> None:
        started, manifest = time.monotonic(), read_manifest(self.root / f"checkpoint-{step}")
        files = manifest["files"]
        objects = part_objects(step, files)
        self.remote.clear(self._tried - objects)
        self._tried = objects
        if self.others:
            self.others.ask_to_keep(step, files)
        send(self.remote, self.root, step, files, lambda: self._is_ended or bool(self.others and self.others.has_lost()))
        if self.others and (problem := self.others.await_kept(lambda: self._is_ended)):
            raise WorkerError(problem)
        self.remote.keep(manifest, self.metrics(step), partial(self._go_on, step))
        self.kept_step, self._tried = step, set()
        size = sum(entry["num_bytes"] for entry in files.values())
        log.info("checkpoint-%d: in the bucket after %.1f s, %.1f MB", step, time.monotonic() - started, size / 1e6)

    def _go_on(self, step: int) -> None:
        if self._is_ended:  # who trains next keeps its own
            raise EndedError(f"checkpoint-{step}: broken off")

    def _fallback(self) -> str:
        return f"; checkpoint-{self.kept_step} is the newest there" if self.kept_step else "; none is there yet"


def told(error: Exception) -> str:
    """An error in a log's line: its own words, behind its name where they are not ours."""
    return str(error) if isinstance(error, SeqmillError | OSError) else f"{type(error).__name__}: {error}"


class EndedError(WorkerError):
    """What was being sent is not wanted any more."""


def send(remote: RemoteCheckpoints, root: Path, step: int, files: Files, is_ended: Callable[[], bool] = lambda: False) -> None:
    """Put those of a checkpoint's files that lie here into the bucket."""

    def go_on(_: int) -> None:
        if is_ended():
            raise EndedError(f"checkpoint-{step}: broken off")

    with linked(root, step) as folder:
        remote.put(folder, step, files, go_on)


@contextmanager
def linked(root: Path, step: int) -> Iterator[Path]:
    """A checkpoint's files by other names: the ranks may delete theirs at any time. Raises OSError where they are gone."""
    links = Path(tempfile.mkdtemp(prefix=LINKS, dir=root))  # by no name of the step: it may be asked for again meanwhile
    try:
        for path in (root / f"checkpoint-{step}").iterdir():
            if path.is_file() and not path.name.startswith("."):
                os.link(path, links / path.name)
        yield links
    finally:
        shutil.rmtree(links, ignore_errors=True)


def remove_links(root: Path) -> None:
    """Remove what an upload that was killed has left."""
    for left in root.glob(f"{LINKS}*"):
        shutil.rmtree(left, ignore_errors=True)
