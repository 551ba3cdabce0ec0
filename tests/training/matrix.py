"""The whole matrix of resumes, a line a cell: `python -m tests.training.matrix FOLDER`, or `make resume-matrix`.

exact    ZeRO 0-3 x 1 and 2 ranks x fp32 and bf16 x killed at a drawn step and in the middle of a save: losses, gradient norms
         and final weights of the run taken up equal an unbroken one's to the bit, with dropout, accumulation, over an epoch's end
elastic  every (ranks, ZeRO stage) x every other one x fp32 and bf16, without dropout: losses equal an unbroken run's but for
         rounding

Interrupted and started again, it does what is left. Its last line is JSON.

Writes  FOLDER/cells.jsonl   one line a finished cell
"""

import itertools
import json
import logging
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.training.runs import COMMON, Run, carry_out

STAGES = ("zero0", "zero1", "zero2", "zero3")
RANKS = (1, 2)
PRECISIONS = ("fp32", "bf16")
HALF = 4  # steps before an elastic run changes hands
# The largest difference of a loss near 4 that counts as rounding; measured over all cells: 5e-7 and 8e-4.
ROUNDING = {"fp32": 1e-5, "bf16": 5e-3}


class Cells:
    """The finished cells, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            self.rows[row["cell"]] = row

    def add(self, cell: str, *, passed: bool, **facts: Any) -> None:
        row = self.rows[cell] = {"cell": cell, "passed": passed, **facts}
        with self.path.open("a") as target:
            target.write(json.dumps(row) + "\n")
        told = ", ".join(f"{name} {value}" for name, value in facts.items())
        print(f"{'pass' if passed else 'FAIL'}  {cell}: {told}", flush=True)


@dataclass(frozen=True)
class Setup:
    """Who trains, and how."""

    ranks: int
    zero: str
    precision: str

    def __str__(self) -> str:
        return f"{self.zero} {self.ranks} rank{'s' if self.ranks > 1 else ''} {self.precision}"


def setups(ranks: int, precision: str) -> list[Setup]:
    return [Setup(ranks, zero, precision) for zero in STAGES]


def new_run(root: Path, name: str, precision: str, dropout: float) -> Run:
    """A run in a folder of its own, empty."""
    name = name.replace(" ", "-")
    shutil.rmtree(root / name, ignore_errors=True)
    return Run(root, name, dropout=dropout, precision=precision)


def unbroken(root: Path, ranks: int, precision: str, dropout: float) -> dict[Setup, Run]:
    """Each stage's run from the first step to the last."""
    runs = {setup: new_run(root, f"whole {setup} {dropout}", precision, dropout) for setup in setups(ranks, precision)}
    for setup, run in runs.items():
        # A launch each: in bf16 a process that has trained under ZeRO-3 does not train the others to the same bit.
        carry_out([run], [run.plan(ranks, setup.zero)])
    return runs


def exact(root: Path, cells: Cells) -> None:
    """Killed and taken up by the same ranks under the same stage."""
    for ranks, precision in itertools.product(RANKS, PRECISIONS):
        todo = [(setup, way) for setup in setups(ranks, precision) for way in ("kill_at", "kill_in_save_of")]
        todo = [(setup, way) for setup, way in todo if f"exact {setup} {way}" not in cells.rows]
        whole = unbroken(root, ranks, precision, dropout=0.1) if todo else {}
        for setup, way in todo:
            killed = new_run(root, f"killed {setup}", precision, dropout=0.1)
            cell = f"exact {setup} {way}"
            step = drawn_step(cell)
            carry_out([killed], [killed.plan(ranks, setup.zero, {way: step})])
            resumed_from = killed.newest_step()
            carry_out([killed], [killed.plan(ranks, setup.zero)])
            same_trace, same_weights = killed.trace() == whole[setup].trace(), killed.weights() == whole[setup].weights()
            cells.add(
                cell,
                passed=same_trace and same_weights and len(killed.trace()) == COMMON["num_steps"],
                step=step,
                resumed_from=resumed_from,
                losses_and_norms="equal" if same_trace else "differ",
                weights="equal" if same_weights else "differ",
            )


def drawn_step(cell: str) -> int:
    """Where a cell's run dies, behind its first checkpoint: the same step whenever the matrix is run."""
    draw, every, end = random.Random(cell), COMMON["checkpoint_steps"], COMMON["num_steps"]
    return draw.randrange(every, end) if "kill_at" in cell else every * draw.randint(2, end // every - 1)


def elastic(root: Path, cells: Cells) -> None:
    """Told to stop and taken up by other ranks, or under another stage."""
    for precision in PRECISIONS:
        everyone = [setup for ranks in RANKS for setup in setups(ranks, precision)]
        if all(f"elastic {first} to {second}" in cells.rows for first, second in itertools.permutations(everyone, 2)):
            continue
        whole = {setup: run for ranks in RANKS for setup, run in unbroken(root, ranks, precision, dropout=0.0).items()}
        halves = {setup: new_run(root, f"half {setup}", precision, dropout=0.0) for setup in everyone}
        for setup, run in halves.items():
            carry_out([run], [run.plan(setup.ranks, setup.zero, {"stop_after": HALF})])
        for second in sorted(everyone, key=lambda setup: setup.ranks):
            moved = list(moved_runs(root, halves, second))
            carry_out([run for _, run in moved], [run.plan(second.ranks, second.zero) for _, run in moved])
            for first, run in moved:
                cells.add(f"elastic {first} to {second}", **compared(run, whole[first], precision))


def moved_runs(root: Path, halves: dict[Setup, Run], second: Setup) -> Iterator[tuple[Setup, Run]]:
    """A run for every other setup, with the checkpoint that this one left."""
    for first, half in halves.items():
        if first != second:
            run = new_run(root, f"moved {first} to {second}", second.precision, dropout=0.0)
            shutil.copytree(half.checkpoints, run.checkpoints)
            run.metrics = list(half.metrics)
            yield first, run


def compared(run: Run, whole: Run, precision: str) -> dict[str, Any]:
    pairs = list(zip(run.trace(), whole.trace(), strict=False))
    difference = max(abs(here[1] - there[1]) for here, there in pairs)
    passed = len(run.trace()) == len(whole.trace()) == COMMON["num_steps"] and difference <= ROUNDING[precision]
    return {"passed": passed, "largest_loss_difference": float(f"{difference:.2g}")}


def main() -> None:
    root = Path(sys.argv[1]).resolve()
    root.mkdir(parents=True, exist_ok=True)
    logging.getLogger("tasks").setLevel(logging.CRITICAL)  # a killed rank's last lines, the torn checkpoint: as is meant
    cells, started = Cells(root / "cells.jsonl"), time.monotonic()
    exact(root, cells)
    elastic(root, cells)
    rows = list(cells.rows.values())
    failed = [row["cell"] for row in rows if not row["passed"]]
    largest = {
        precision: max(
            row["largest_loss_difference"] for row in rows if row["cell"].endswith(precision) and "elastic" in row["cell"]
        )
        for precision in PRECISIONS
    }
    seconds = round(time.monotonic() - started)
    print(json.dumps({"cells": len(rows), "failed": failed, "largest_loss_difference": largest, "seconds": seconds}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
