"""Metrics: what the ranks report, kept in a file that a resumed run continues.

Reads   metrics.jsonl   of an earlier try
Writes  metrics.jsonl   one JSON object a report
"""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from tasks.store import write_atomically

LN2 = math.log(2)


class MetricsFile:
    """The metrics of one training run so far."""

    def __init__(self, path: Path, step: int) -> None:
        """Take up the file where a checkpoint of ``step`` left it: what was reported later is about to be trained again."""
        self.path = path
        self.rows = [row for row in read_metrics(path) if row["step"] <= step] if step else []
        write_atomically(path, b"".join(orjson.dumps(row) + b"\n" for row in self.rows))

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("ab") as target:
            target.write(orjson.dumps(row) + b"\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole row of a metrics file; nothing where there is no file. What a crash cut short or left empty is passed over."""
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for line in lines:
        with suppress(orjson.JSONDecodeError):
            rows.append(orjson.loads(line))
    return rows


def final_loss(rows: list[dict[str, Any]], num_steps: int) -> float | None:
    """The mean training loss over the last tenth of the steps (at least the last report)."""
    losses = [(row["step"], row["loss"], row["num_steps"]) for row in rows if "loss" in row]
    late = [entry for entry in losses if entry[0] > num_steps * 0.9] or losses[-1:]
    weight = sum(steps for _, _, steps in late)
    return sum(loss * steps for _, loss, steps in late) / weight if weight else None


def tokens_per_second(rows: list[dict[str, Any]]) -> float | None:
    """The median rate over all reports, which leaves out the first steps' warming up and a busy neighbor's moments."""
    rates = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    return rates[len(rates) // 2] if rates else None


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """A loss in nats a token as bits a byte of text, which compares models of different tokenizers."""
    return loss / LN2 * num_tokens / num_bytes


def follow(
    metrics: MetricsFile, kind: str, advance: Callable[[int], None], on_metrics: Callable[[dict[str, Any]], None] | None
) -> Callable[[dict[str, Any]], None]:
    """What hears the ranks' reports: keeps them, moves the progress bar, tells the machine."""
    seen = max((row["step"] for row in metrics.rows), default=0)
    advance(seen)

    def hear(row: dict[str, Any]) -> None:
        nonlocal seen
        metrics.append(row)
        advance(row["step"] - seen)
        seen = row["step"]
        if on_metrics:
            on_metrics({"kind": kind, **row})

    return hear
