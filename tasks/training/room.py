"""The memory there is for a rank: its GPU's, and its share of this machine's.

Always of the whole memory, never of what is free now: a run that is taken up again has to come to the same micro batch.
"""

import functools
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

# Where a driver shows its GPUs; asking torch for them costs 2 s, so it is asked only where one of these exists.
GPU_DEVICES = (Path("/proc/driver/nvidia/gpus"), Path("/dev/kfd"))
ASK_TORCH = (
    "import torch as t; print(*(t.cuda.get_device_properties(number).total_memory for number in range(t.cuda.device_count())))"
)
MEMORY_INFO = Path("/proc/meminfo")
# What a container or a job of Slurm may take: limits of the control groups, v2 or v1, that this process is in. Each group is
# bounded by those around it, too; "max", or more than any memory, is no limit.
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
# The rest is the system's, the allocator's holes, and the estimate's error.
SHARE = 0.9


@dataclass(frozen=True)
class Room:
    """What one rank may take, in bytes."""

    host_bytes: int
    device_bytes: int | None = None  # None: it trains on CPU, and everything lies in the host's memory

    @property
    def bytes(self) -> int:
        """Of where it trains."""
        return self.host_bytes if self.device_bytes is None else self.device_bytes


def room_here(num_ranks: int) -> Room:
    """The room of each of ``num_ranks`` ranks; with several hosts, that of this one stands for all."""
    gpus = gpu_bytes()
    on_host = min(num_ranks, len(gpus)) if gpus else num_ranks
    host = int(SHARE * host_bytes() / max(1, on_host))
    return Room(host, int(SHARE * min(gpus)) if gpus else None)


def host_bytes() -> int:
    """This machine's memory, or what its container may take of it."""
    found = [_total()] if MEMORY_INFO.exists() else []
    for path in _limits():
        if path.exists() and (text := path.read_text().strip()).isdigit():
            found.append(int(text))
    return min(found, default=1 << 62)  # where nothing tells, nothing is refused


def _limits() -> Iterator[Path]:
    """The files that may hold a limit. A container mostly sees its own group as the outermost one."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else ():
        _, controllers, group = line.split(":", 2)  # "0::/a/b" of v2, "4:memory:/a/b" of v1
        if not controllers or "memory" in controllers.split(","):
            root, name = (GROUPS / "memory", "memory.limit_in_bytes") if controllers else (GROUPS, "memory.max")
            own = root / group.strip("/")
            yield from (folder / name for folder in (own, *own.parents) if folder.is_relative_to(root))


def _total() -> int:
    (line,) = (line for line in MEMORY_INFO.read_text().splitlines() if line.startswith("MemTotal:"))
    return int(line.split()[1]) * 1024


@functools.cache
def gpu_bytes() -> tuple[int, ...]:
    """The memory of every GPU that torch sees; torch is not imported here, and not asked where there is no driver."""
    if not any(path.exists() for path in GPU_DEVICES):
        return ()
    result = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, check=False)
    if result.returncode:
        log.warning("GPUs: torch cannot count them (%s); training on CPU", result.stderr.strip().splitlines()[-1:])
        return ()
    return tuple(map(int, result.stdout.split()))
