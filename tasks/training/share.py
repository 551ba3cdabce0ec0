"""A joining node's share of checkpoints that go into a bucket: the files of its own ranks, in a folder of this process's own.

Reads and writes  <cache>/.joined/<host>-<pid>-<number>/checkpoints/checkpoint-<step>/*
"""

import fcntl
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.errors import SettingsError, StoreError
from tasks.store import ArtifactStore
from tasks.store.lease import try_lock
from tasks.store.store import is_at
from tasks.training.checkpoints import clear_torn, step_of
from tasks.training.remote import Kept, RemoteCheckpoints, check_files, check_manifest, remote_at
from tasks.training.resuming import files_to_fetch
from tasks.training.uploads import EndedError, send, told

JOINED = ".joined"
# A file that was just made on another machine shows up late on a network's file system.
SIGHT_SECONDS = 10.0


class DamagedPartError(StoreError):
    """A part of the checkpoint to go on from is damaged in the bucket, as this node reads it."""

    def __init__(self, message: str, part: str) -> None:
        super().__init__(message)
        self.part = part


class Share:
    """This node's part in one training's checkpoints, as the node that leads tells of them."""

    def __init__(self, store: ArtifactStore, folder: Path, place: dict[str, Any]) -> None:
        """place: kind and key of the artifact; a sign; the manifest of the checkpoint to go on from, or None.

        Raises SettingsError where this node's store is another.
        """
        try:
            self.remote: RemoteCheckpoints = remote_at(store, place["kind"], place["key"])
            self.resume = Kept(check_manifest(place["resume"]), {}) if place["resume"] else None
        except (ValueError, KeyError) as error:
            raise SettingsError(
                f"{platform.node()}: checkpoints of {error}, which this node's store {store.address} has no place for; give all "
                "nodes the same SEQMILL_STORE and SEQMILL_CHECKPOINTS"
            ) from error
        if not self.remote.has_sign(place["sign"]):
            raise SettingsError(
                f"{platform.node()}: {self.remote.address} is not where the node that leads keeps checkpoints; give all nodes "
                "the same SEQMILL_STORE"
            )
        self.root, self.is_ended = folder / self.remote.kind / self.remote.key, False
        self.newest_ask = 0  # by the number that the node that leads gives each of its askings for a checkpoint
        for earlier in folder.glob("*/*"):  # of trainings that are over: a node may stay for many
            if earlier != self.root:
                shutil.rmtree(earlier, ignore_errors=True)

    def fetch(self, plan: dict[str, Any], ranks: Sequence[int]) -> None:
        """Bring here what these ranks read of the checkpoint to go on from. Raises DamagedPartError, EndedError, StoreError."""
        self.root.mkdir(parents=True, exist_ok=True)
        resume = Path(plan["resume_from"]) if plan["resume_from"] else None
        clear_torn(self.root, resume)
        if self.resume and resume:
            if self.resume.step != step_of(resume):
                raise SettingsError(f"{platform.node()}: {resume.name} is not its manifest's step {self.resume.step}; run again")
            try:
                names = files_to_fetch(self.remote, self.resume, plan["facts"], ranks)
                problem = self.remote.fetch(self.resume, names, self.root / resume.name, self._go_on)
            except StoreError as error:
                raise StoreError(f"{platform.node()}: {error}") from error
            if problem:
                raise DamagedPartError(f"{self.remote.address}/{resume.name}: {problem}", part=problem.partition(" ")[0])

    def _go_on(self, _: int) -> None:
        if self.is_ended:
            raise EndedError(f"{self.remote.address}: broken off")

    def send(self, step: int, files: Any, ask: int) -> str | None:
        """Put the files of a checkpoint that lie here into the bucket; what kept this node from it, whatever it is.

        ask: broken off once there is a newer one.
        """
        try:
            send(self.remote, self.root, int(step), check_files(files), lambda: self.is_ended or self.newest_ask != ask)
        except Exception as error:  # the node that leads waits for an answer
            return told(error)
        return None

    def end(self) -> None:
        """Send and fetch nothing more, and break off what is under way: nobody waits for it."""
        self.is_ended = True


def is_seen(path: Path) -> bool:
    """Whether something lies in a folder that nodes mount, where the node that leads may just have made it."""
    deadline = time.monotonic() + SIGHT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def own_folder(root: Path) -> Iterator[Path]:
    """A folder of this process's own below ``root``, gone with it; those of processes that were killed are removed."""
    base, host = root / JOINED, platform.node()
    own = re.compile(rf"{re.escape(host)}-\d+-[0-9a-f]{{8}}")  # and not those of a host whose name begins as this one's
    for lock in base.glob("*.lock"):
        folder = lock.with_name(lock.name.removesuffix(".lock"))
        if own.fullmatch(folder.name):
            with try_lock(lock) as is_free:
                if is_free:
                    shutil.rmtree(folder, ignore_errors=True)
                    lock.unlink(missing_ok=True)
    while True:
        folder = base / f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        lock = folder.with_name(f"{folder.name}.lock")
        base.mkdir(parents=True, exist_ok=True)
        with lock.open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not is_at(lock, handle.fileno()):
                continue  # taken for a dead process's, by one that begins
            try:
                folder.mkdir()
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                lock.unlink(missing_ok=True)
            return
