"""Builds on a disk of its own, which fills up, grows and is closed: `python -m tests.faults.small_disk DISK SOURCES...`.

To be started by `unshare --mount`, so that nothing of it is seen, or left, outside. Prints one line of JSON.
"""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from tasks.corpus.tokens import TokensSpec, build_tokens
from tasks.errors import SeqmillError
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore
from tasks.store.lease import end_lease
from tests.faults.corpus import NODES, Sources, build_all, build_node
from tests.faults.harness import contents, damaged, finished, rebuilt, remains

PAGE_BYTES = os.sysconf("SC_PAGESIZE")
FINE = 6  # so many times the room grows by one alone: the first folders and files of a stage
ROOM = "size=64m,nr_inodes=100k"
MOST_REMOUNTS = 10


class Disk:
    """A tmpfs whose free room is set."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(exist_ok=True)
        mount("-t", "tmpfs", "-o", ROOM, "tmpfs", str(path))
        (path / "ballast").write_text("a tmpfs of size 0 is without limit")

    def remount(self, options: str) -> None:
        mount("-o", f"remount,{options}", str(self.path))

    def close(self, store: ArtifactStore) -> None:
        """Let nothing be written any more; a file that is held open for it, as a lease is, would forbid that."""
        end_lease(store.root)
        self.remount("ro")

    def leave_pages(self, num_pages: int) -> None:
        self._leave(lambda found: f"size={(found.f_blocks - found.f_bfree + num_pages) * PAGE_BYTES},nr_inodes=100k")

    def leave_inodes(self, num_inodes: int) -> None:
        self._leave(lambda found: f"size=64m,nr_inodes={found.f_files - found.f_ffree + num_inodes}")

    def _leave(self, options: Callable[[os.statvfs_result], str]) -> None:
        for _ in range(MOST_REMOUNTS - 1):  # refused where more came into use since it was counted
            try:
                return self.remount(options(os.statvfs(self.path)))
            except subprocess.CalledProcessError:
                continue
        return self.remount(options(os.statvfs(self.path)))


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def told(work: Callable[[], Any]) -> str | None:
    """The error that a user would read, with its class; all of it where it is none of ours; None where there is none."""
    try:
        work()
    except SeqmillError as error:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return traceback.format_exc()
    return None


def fill(disk: Disk, sources: Sources, leave: Callable[[int], None], step: int) -> dict[str, Any]:
    """Build every node with no room left, then with ``step`` more, and more, until it is done; the errors on the way."""
    store, machine = ArtifactStore(disk.path / f"store-{leave.__name__}"), Machine(num_workers=2)
    had: dict[str, Artifact] = {}
    errors: dict[str, list[str]] = {name: [] for name in NODES}
    problems: list[str] = []
    for name in NODES:
        disk.remount(ROOM)
        store.root.mkdir(exist_ok=True)
        room = 0
        while name not in had:
            leave(room)
            before = finished(store.root)
            if error := told(lambda: had.update({name: build_node(name, store, machine, sources, had)})):  # noqa: B023 (called at once)
                errors[name].append(error)
            problems += rebuilt(before, finished(store.root))
            room += 1 if room < FINE else step
    disk.remount(ROOM)
    end_lease(store.root)
    problems += [*damaged(store.root), *remains(store.root)]
    return {"errors": errors, "problems": problems, "contents": contents(store.root)}


def close(disk: Disk, sources: Sources) -> dict[str, Any]:
    """Find everything in a store that cannot be written, then ask it for something new, then for something damaged."""
    store, machine = ArtifactStore(disk.path / "store"), Machine(num_workers=2)
    had = build_all(store, machine, sources)
    lost = next(had["tokens"].shards())
    disk.close(store)
    found = [artifact.found for artifact in build_all(store, machine, sources).values()]
    other = TokensSpec(end_of_document="<|im_end|>")
    new = told(lambda: build_tokens(store, machine, other, documents=had["documents"], tokenizer=had["tokenizer"]))
    disk.remount("rw")
    had["tokens"].shard_file(lost, "tokens.arrow").unlink()
    disk.close(store)
    return {"found": found, "new": new, "damaged": told(lambda: build_all(store, machine, sources)), "where": str(store.root)}


def main(disk_path: str, corpus: str, conversations: str) -> None:
    sources, disk = Sources(corpus, conversations), Disk(Path(disk_path))
    told = {
        "pages": fill(disk, sources, disk.leave_pages, step=5),
        "inodes": fill(disk, sources, disk.leave_inodes, step=3),
        "closed": close(disk, sources),
    }
    print(orjson.dumps(told).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
