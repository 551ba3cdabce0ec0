"""Runs a piece of work and prints one JSON line: what went through it, in how long, with how much memory."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from tasks.store.origin import environment

# getrusage(2): kilobytes on Linux, bytes on macOS.
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


def measure(stage: str, run: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Run ``run`` once and print its JSON line; ``run`` returns what went through it: "bytes", "tokens", whatever else counts.

    peak_rss_bytes is that of the largest single process, cpu_seconds that of all.
    """
    wall, cpu = time.perf_counter(), _cpu_seconds()
    counts = dict(run())
    seconds, cpu_seconds = time.perf_counter() - wall, _cpu_seconds() - cpu
    line = {
        "stage": stage,
        "bytes": counts.pop("bytes", None),
        "tokens": counts.pop("tokens", None),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "peak_rss_bytes": _peak_rss_bytes(),
        **counts,
        "num_cores": os.cpu_count(),
        "versions": environment()["packages"],
    }
    print(json.dumps(line), flush=True)
    return line


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _peak_rss_bytes() -> int:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(usage.ru_maxrss for usage in used) * MAXRSS_BYTES
