"""Measures programs with every process that they start: wall and CPU seconds, peak memory, bytes left on disk. Linux only.

A program is run in a process of its own by ``run_program``, and times its phases with ``Phases``. The CPU seconds of a phase
are those of the program's threads, of its ended children, and of the live processes below it, read from /proc: so workers
that outlive a phase count in the phase in which they worked. The peak is that of the largest single process (wait4(2)), and
an upper bound: a process starts with its parent's peak. So whoever calls ``run_program`` imports nothing large.
"""

import argparse
import json
import os
import resource
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
MAXRSS_BYTES = 1024  # getrusage(2) on Linux


@dataclass(frozen=True)
class Cost:
    """What one phase took."""

    wall_seconds: float
    cpu_seconds: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.wall_seconds + other.wall_seconds, self.cpu_seconds + other.cpu_seconds)


NOTHING = Cost(0.0, 0.0)


def read_program(description: str | None) -> argparse.Namespace:
    """The command line of every program that corpus_vs_recipe measures: ARCHIVE FOLDER --tokenizer DIR --workers N."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a tokenizer.json")
    parser.add_argument("--workers", type=int, required=True)
    return parser.parse_args()


@dataclass(frozen=True)
class Run:
    """One run of a program."""

    phases: dict[str, Cost]
    facts: dict[str, Any]  # what the program told of its work
    process: Cost  # the whole of it, with the interpreter's start and imports
    peak_rss_bytes: int
    disk_bytes: int

    def cost(self, *names: str) -> Cost:
        """The sum of these phases; of all where none is named."""
        return sum((self.phases[name] for name in names or self.phases), NOTHING)


class ProgramError(Exception):
    """A program that was to be measured failed."""


@dataclass
class Phases:
    """The phases of the program that is running."""

    costs: dict[str, Cost] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), tree_cpu_seconds()
        yield
        self.costs[name] = Cost(time.perf_counter() - wall, tree_cpu_seconds() - cpu)

    def tell(self, **facts: Any) -> None:
        """Print what ``run_program`` reads, as the last line of standard output."""
        print(json.dumps({"phases": {name: asdict(cost) for name, cost in self.costs.items()}, "facts": facts}), flush=True)


def run_program(command: Sequence[str], folder: Path) -> Run:
    """Run ``command``, which ends by ``Phases.tell``; ``folder`` is where it leaves its files. Raises ProgramError."""
    os.sync()  # what an earlier run has still to write is not this run's cost
    folder.mkdir(parents=True)
    log_path, told_path = folder.with_suffix(".log"), folder.with_suffix(".told")
    with log_path.open("wb") as log, told_path.open("wb") as told:
        wall = time.perf_counter()
        program = subprocess.Popen(command, stdout=told, stderr=log)
        _, status, usage = os.wait4(program.pid, 0)
        seconds = time.perf_counter() - wall
        program.returncode = os.waitstatus_to_exitcode(status)
    if program.returncode:
        raise ProgramError(f"{' '.join(command)}: exit {program.returncode}; {log_path} ends:\n{_last_lines(log_path)}")
    told_line = json.loads(told_path.read_text().splitlines()[-1])
    return Run(
        phases={name: Cost(**cost) for name, cost in told_line["phases"].items()},
        facts=told_line["facts"],
        process=Cost(seconds, usage.ru_utime + usage.ru_stime),
        peak_rss_bytes=usage.ru_maxrss * MAXRSS_BYTES,
        disk_bytes=disk_bytes(folder),
    )


def _last_lines(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-12:])


def disk_bytes(folder: Path) -> int:
    """Bytes that the files below a folder hold on disk, each file once however many names it has."""
    found = {(stat.st_dev, stat.st_ino): stat.st_blocks * 512 for stat in _stats_below(folder)}
    return sum(found.values())


def _stats_below(folder: Path) -> Iterator[os.stat_result]:
    return (path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def tree_cpu_seconds() -> float:
    """CPU seconds so far of this process, its ended children, and the live processes below it."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) + _live_cpu_seconds(os.getpid())


def _live_cpu_seconds(ancestor: int) -> float:
    """Of the live processes below ``ancestor``, with the children that each of them has waited for."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat_fields(entry)):
            parents[int(entry.name)], ticks[int(entry.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    return sum(ticks[pid] for pid in parents if _is_below(pid, ancestor, parents)) / TICKS_PER_SECOND


def _stat_fields(process: Path) -> list[str]:
    """The fields of /proc/PID/stat behind the command's name (proc(5)); none where the process is gone."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _is_below(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == ancestor:
            return True
    return False
