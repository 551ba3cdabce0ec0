"""Runs the users' recipe and ours on the same corpus, in turn, and prints what each took and the ratios.

Reads   ARCHIVE                a .jsonl.tar.bz2, one ``{"text": ...}`` a line; benchmarks.poetry makes one
Prints  a table, and as the last line one JSON object

`python -m benchmarks.corpus_vs_recipe ARCHIVE --tokenizer DIR --work DIR | tee results.txt`, and
`tail -1 results.txt >> benchmarks/results/corpus-vs-recipe.jsonl` keeps the line. The machine must do nothing else.

Every run is a program of its own in an empty folder (recipe.py, road.py), measured with all processes below it
(process_tree.py); figures are medians of --runs. A ratio is the recipe's figure over ours:
  cpu_ratio_maps   CPU seconds of its two maps over those of our stages tokens and blocks, both with the tokenizer's load
  cpu_ratio_all    CPU seconds from .tar.bz2 to blocks; wall_ratio_all the same in wall time
Phases are summed; the start of the interpreter and its imports, seconds for the recipe, are shown and left out of both.
Disk is all that lies in the folder afterwards: for ours the store with its own copy of the archive, for the recipe
the unpacked text and the cache, without the archive that it was given.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.process_tree import Cost, Run, run_program

PACKAGES = ("seqmill", "datasets", "transformers", "tokenizers", "fastokens", "pyarrow", "numpy", "indexed_bzip2", "orjson")
MAPS = ("tokenize", "group")  # of the recipe
OURS = ("tokens", "blocks")  # what stands against them


@dataclass(frozen=True)
class Told:
    """The command line, and what programs are run with."""

    archive: Path
    tokenizer: str
    work: Path
    workers: int
    runs: int
    every: int
    flatness: bool
    peer_python: str | None

    def run(self, module: str, name: str, archive: Path, workers: int, python: str = sys.executable) -> Run:
        """Run a program once, in a folder that does not exist yet."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{name} ...", file=sys.stderr, flush=True)
        arguments = [str(archive), str(folder), "--tokenizer", self.tokenizer, "--workers", str(workers)]
        return run_program([python, "-m", f"benchmarks.{module}", *arguments], folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        told = read_told(Path(folder))
        runs = measure(told)
        same = compare(told, runs[f"ours {told.workers}"][-1])
        heads = flatness(told) if told.flatness else {}
    print_table(runs, told.workers)
    for name, run in heads.items():
        print(f"{name:18} {run.facts['text_bytes'] / 1e6:9.1f} MB of text: peak {run.peak_rss_bytes / 1e6:6.0f} MB a process")
    print(json.dumps(result(told, runs, same, heads)), flush=True)


def read_told(scratch: Path) -> Told:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with tokenizer.json and its config")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of ours, and num_proc of the recipe's maps")
    parser.add_argument("--runs", type=int, default=3, help="of each; figures are medians")
    parser.add_argument("--every", type=int, default=1, help="compare the ids of every n-th document with the reference's")
    parser.add_argument("--flatness", action="store_true", help="measure our peak memory on 10 MB and on 1 GB too")
    parser.add_argument("--peer", choices=["datatrove"], help="run this peer too; needs --peer-python")
    parser.add_argument("--peer-python", help="the Python of the environment that has the peer (benchmarks/peers.py)")
    parser.add_argument("--work", type=Path, default=scratch, help="a folder for all that is made; it is kept when given")
    given = parser.parse_args()
    if given.peer and not given.peer_python:
        parser.error(
            f"--peer {given.peer}: no --peer-python; give the python of an environment that has it (benchmarks/peers.py)"
        )
    given.work.mkdir(parents=True, exist_ok=True)
    return Told(
        given.archive.absolute(), str(given.tokenizer.absolute()), given.work.absolute(), given.workers, given.runs,
        given.every, given.flatness, given.peer_python if given.peer else None,
    )  # fmt: skip


def measure(told: Told) -> dict[str, list[Run]]:
    """All runs by name, each program once in every round, so that what disturbs the machine meets all of them."""
    runs: dict[str, list[Run]] = {}
    numbers = sorted({1, 2, told.workers})
    for _ in range(told.runs):
        runs.setdefault("recipe", []).append(told.run("recipe", "recipe", told.archive, told.workers))
        shutil.rmtree(told.work / "recipe")
        for number in numbers:
            runs.setdefault(f"ours {number}", []).append(told.run("road", f"ours-{number}", told.archive, number))
        if told.peer_python:
            runs.setdefault("datatrove", []).append(told.run("peers", "datatrove", told.archive, told.workers, told.peer_python))
    return runs


def compare(told: Told, ours: Run) -> dict[str, Any]:
    """How many documents' ids were compared with the reference's, and how many differ."""
    print("comparing ids ...", file=sys.stderr, flush=True)
    folder, store = told.work / "same-ids", told.work / f"ours-{told.workers}"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.same_ids", str(told.archive), str(store), ours.facts["tokens"]]
    return run_program([*command, "--tokenizer", told.tokenizer, "--every", str(told.every)], folder).facts


def flatness(told: Told) -> dict[str, Run]:
    """Our road on the first 10 MB of the corpus, and on the corpus repeated up to 1 GB, each document with another prefix."""
    runs = {}
    for name, num_bytes in (("10 MB", 10_000_000), ("1 GB", 1_000_000_000)):
        print(f"writing {name} ...", file=sys.stderr, flush=True)
        archive = told.work / f"{num_bytes}.jsonl.tar.bz2"
        if not archive.exists():  # a given --work folder keeps it: it takes minutes
            shutil.rmtree(told.work / f"writer-{num_bytes}", ignore_errors=True)
            write_copy = [sys.executable, "-m", "benchmarks.repeated", str(told.archive), str(archive), str(num_bytes)]
            run_program(write_copy, told.work / f"writer-{num_bytes}")
        runs[name] = told.run("road", f"ours-{num_bytes}", archive, told.workers)
        shutil.rmtree(told.work / f"ours-{num_bytes}")
    return runs


def median(runs: list[Run], name: str, *phases: str) -> float:
    """The median of ``wall_seconds`` or ``cpu_seconds`` over these phases, or over all."""
    return float(statistics.median(getattr(run.cost(*phases), name) for run in runs))


def result(told: Told, runs: dict[str, list[Run]], same: dict[str, Any], heads: dict[str, Run]) -> dict[str, Any]:
    recipe, ours, facts = runs["recipe"], runs[f"ours {told.workers}"], runs[f"ours {told.workers}"][-1].facts
    walls = {number: median(runs[f"ours {number}"], "wall_seconds") for number in (1, 2)}
    return {
        "benchmark": "corpus-vs-recipe",
        "cpu_ratio_maps": _ratio(median(recipe, "cpu_seconds", *MAPS), median(ours, "cpu_seconds", *OURS)),
        "cpu_ratio_all": _ratio(median(recipe, "cpu_seconds"), median(ours, "cpu_seconds")),
        "wall_ratio_all": _ratio(median(recipe, "wall_seconds"), median(ours, "wall_seconds")),
        "peak_rss_bytes_ours": max(run.peak_rss_bytes for run in ours),
        "bytes_per_token_blocks": round(facts["blocks_bytes"] / facts["num_tokens"], 4),
        "speedup_2_workers": _ratio(walls[1], walls[2]),
        "identical_ids": same["num_different"] == 0 and same["num_compared"] > 0,
        "num_compared": same["num_compared"],
        "peak_rss_bytes_by_size": {name: run.peak_rss_bytes for name, run in heads.items()},
        "medians": {name: medians(of_name) for name, of_name in runs.items()},
        "num_runs": told.runs,
        "num_workers": told.workers,
        "num_cores": os.cpu_count(),
        "archive_bytes": told.archive.stat().st_size,
        "ours": facts,
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}},
    }


def medians(runs: list[Run]) -> dict[str, Any]:
    """Of one program's runs: each phase, the sum of phases, the whole process, the peak and the disk."""
    phases = {
        name: {kind: round(median(runs, kind, name), 3) for kind in ("wall_seconds", "cpu_seconds")} for name in runs[0].phases
    }
    return {
        "phases": phases,
        "wall_seconds": round(median(runs, "wall_seconds"), 3),
        "cpu_seconds": round(median(runs, "cpu_seconds"), 3),
        "process_wall_seconds": round(statistics.median(run.process.wall_seconds for run in runs), 3),
        "process_cpu_seconds": round(statistics.median(run.process.cpu_seconds for run in runs), 3),
        "peak_rss_bytes": int(statistics.median(run.peak_rss_bytes for run in runs)),
        "disk_bytes": int(statistics.median(run.disk_bytes for run in runs)),
    }


def _ratio(theirs: float, ours: float) -> float:
    return round(theirs / ours, 2)


def print_table(runs: dict[str, list[Run]], workers: int) -> None:
    """Every program's phases, then the figures that are compared, with the recipe's over ours."""
    print(f"{'':26}{'wall s':>10}{'CPU s':>10}")
    for name, of_name in runs.items():
        for phase in of_name[0].phases:
            _print_cost(f"{name}: {phase}", Cost(median(of_name, "wall_seconds", phase), median(of_name, "cpu_seconds", phase)))
        whole = statistics.median(run.process.wall_seconds for run in of_name)
        print(f"{name + ': start, imports':26}{whole - median(of_name, 'wall_seconds'):10.2f}")
    recipe, ours = medians(runs["recipe"]), medians(runs[f"ours {workers}"])
    print(f"\n{'':26}{'recipe':>10}{'ours':>10}{'ratio':>8}")
    for label, name, unit in (
        ("wall, s", "wall_seconds", 1), ("CPU, s", "cpu_seconds", 1),
        ("peak of a process, MB", "peak_rss_bytes", 1e6), ("disk, MB", "disk_bytes", 1e6),
    ):  # fmt: skip
        print(f"{label:26}{recipe[name] / unit:10.1f}{ours[name] / unit:10.1f}{recipe[name] / ours[name]:8.1f}")
    maps, stages = (median(runs[name], "cpu_seconds", *of) for name, of in (("recipe", MAPS), (f"ours {workers}", OURS)))
    print(f"{'CPU of the two maps, s':26}{maps:10.1f}{stages:10.1f}{maps / stages:8.1f}\n")


def _print_cost(label: str, cost: Cost) -> None:
    print(f"{label:26}{cost.wall_seconds:10.2f}{cost.cpu_seconds:10.2f}")


if __name__ == "__main__":
    main()
