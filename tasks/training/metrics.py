"""Metrics: what the ranks report, kept in a file that a resumed run continues.

Reads   metrics.jsonl   of an earlier try
Writes  metrics.jsonl   one JSON object a report
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson

from tasks.store import write_atomically

log = logging.getLogger(__name__)

LN2 = math.log(2)


class MetricsFile:
    """The metrics of one training run so far."""

    def __init__(self, path: Path, step: int) -> None:
        """Take up the file where a checkpoint of ``step`` left it: what was reported later is about to be trained again."""
        self.path = path
        self.rows = [row for row in read_metrics(path) if row["step"] <= step] if step else []
        write_atomically(path, b"".join(orjson.dumps(row) + b"\n" for row in self.rows))

    def upto(self, step: int) -> bytes:
        """What was reported up to a step, as the file has it."""
        return b"".join(orjson.dumps(row) + b"\n" for row in tuple(self.rows) if row["step"] <= step)

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


def median_of(rows: list[dict[str, Any]], name: str) -> float | None:
    """The median over all reports, which leaves out the first steps' warming up and a busy neighbor's moments."""
    values = sorted(row[name] for row in rows if name in row)
    return values[len(values) // 2] if values else None


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """A loss in nats a token as bits a byte of text, which compares models of different tokenizers."""
    return loss / LN2 * num_tokens / num_bytes


def in_words(row: dict[str, Any], num_steps: int | None = None) -> str:
    """A report in a line, as the log and the Prefect UI show it; without ``num_steps`` for where a bar tells steps and time."""
    shown = (
        ("loss", "loss {:.4f}"),
        ("validation_loss", "validation loss {:.4f}"),
        ("learning_rate", "learning rate {:.3g}"),
        ("grad_norm", "gradient norm {:.3g}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("mfu", "MFU {:.1%}"),
    )
    told = [form.format(row[name]) for name, form in shown if name in row]
    if "memory_bytes" in row:
        told.append(f"{row['memory_bytes'] / 1e9:.2f} GB")
    if num_steps is None:
        return ", ".join(told)
    if "seconds_left" in row:
        told.append(f"{timedelta(seconds=round(row['seconds_left']))} left")
    return ", ".join([f"step {row['step']} of {num_steps}", *told])


def follow(
    metrics: MetricsFile,
    kind: str,
    num_steps: int,
    advance: Callable[[int], None],
    heard_by: Sequence[Callable[[dict[str, Any]], None]],
) -> Callable[[dict[str, Any]], None]:
    """What hears the ranks' reports: keeps them, logs them, moves the progress bar, tells who listens."""
    seen = max((row["step"] for row in metrics.rows), default=0)
    advance(seen)

    def hear(row: dict[str, Any]) -> None:
        nonlocal seen
        metrics.append(row)
        advance(row["step"] - seen)
        seen = row["step"]
        log.info("%s: %s", kind, in_words(row, num_steps))
        for tell in heard_by:
            tell(row)

    return hear
