"""What produced an artifact: the host, the packages, the project's commit, the memory and the disk that the build took."""

import contextlib
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tasks.store.artifact import ShardEntry

# Recorded in every manifest: what may explain a difference between two machines.
RECORDED_PACKAGES = (
    "seqmill", "torch", "transformers", "datasets", "deepspeed", "accelerate", "peft", "tokenizers", "fastokens", "pyarrow",
    "numpy", "orjson", "indexed-bzip2", "zstandard", "rensa", "prefect",
)  # fmt: skip

PROJECT_DIR = Path(__file__).parents[2]
GIT_SECONDS = 5  # a checkout on a disk that hangs holds no build up

# getrusage(2): kilobytes on Linux, bytes on macOS.
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
CLOCK_TICK_NS = 20_000_000  # a file system's clock may lie one tick of the kernel, 4 ms or 10, behind the process's
RESET_PEAK = "5"  # proc_pid_clear_refs(5): the peak resident size begins anew at what is resident now


def environment() -> dict[str, Any]:
    """The machine, the package versions and the project's commit; asked for once a process."""
    return dict(_environment())


@lru_cache(maxsize=1)
def _environment() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": {name: found for name in RECORDED_PACKAGES if (found := _version(name))},
        **commit_of(PROJECT_DIR),
    }


def commit_of(folder: Path) -> dict[str, Any]:
    """The git commit of a checkout, and whether a file that git knows differs from it; nothing where there is no checkout."""
    if not (folder / ".git").exists():
        return {}
    commit, changed = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {} if commit is None or changed is None else {"commit": commit, "is_dirty": bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        # --no-optional-locks: to look must not stand in the way of who commits at this moment.
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, check=True, text=True, timeout=GIT_SECONDS).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here, or a checkout that is another user's
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Usage:
    """What one build takes, from where this is made to where it is told.

    is_shard: built beside others in the same process, so that its memory cannot be told apart.
    """

    def __init__(self, is_shard: bool = False) -> None:
        self.is_shard = is_shard
        if not is_shard:
            with contextlib.suppress(OSError):  # not Linux, or a /proc that cannot be written: the peak is the process's
                Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        self.started_ns = time.time_ns()
        self.started = datetime.now(UTC)
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        self.children_rss_bytes = _peak_rss_bytes(resource.RUSAGE_CHILDREN)

    def told(self, scratch: Path) -> dict[str, Any]:
        """Seconds, memory, and the bytes that ``scratch`` holds just before it is removed.

        The peak of processes started (a launcher's ranks) is the greatest of any that this process ever had: it is told only
        where this build raised it.
        """
        told = {
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self.wall, 3),
            "cpu_seconds": round(time.process_time() - self.cpu, 3),
        }
        if self.is_shard:
            return told
        children_rss_bytes = _peak_rss_bytes(resource.RUSAGE_CHILDREN)
        return {
            **told,
            "peak_rss_bytes": high_water() or _peak_rss_bytes(resource.RUSAGE_SELF),
            "peak_child_rss_bytes": children_rss_bytes if children_rss_bytes > self.children_rss_bytes else None,
            "scratch_bytes": folder_bytes(scratch),
        }

    def shards_built(self, root: Path, entries: Sequence[ShardEntry]) -> dict[str, int]:
        """How many of the shards listed, of how many bytes, this build made itself: the others it found."""
        earliest = self.started_ns - CLOCK_TICK_NS
        built = [entry for entry in entries if _modified_ns(f"{root}/{entry.kind}/{entry.key}") >= earliest]
        return {"num_shards_built": len(built), "num_bytes_built": sum(entry.num_bytes for entry in built)} if entries else {}


def _peak_rss_bytes(who: int) -> int:
    return resource.getrusage(who).ru_maxrss * MAXRSS_BYTES


def _modified_ns(folder: str) -> int:
    """When a folder's list of names last changed: what is finished never changes."""
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0


def high_water() -> int | None:
    """VmHWM of proc_pid_status(5), the peak since it was last reset; None where there is no such file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def folder_bytes(folder: Path) -> int:
    """The bytes of the files below a folder, as the disk gives them back: one that has another name counts for nothing."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # gone meanwhile
                stat = os.lstat(os.path.join(base, name))
                total += stat.st_size if stat.st_nlink == 1 else 0
    return total
