"""Conversations to make examples of, and what is read from an examples artifact."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.store import Artifact


def belle(*turns: str) -> bytes:
    """One line in BELLE's form; the turns are the user's and the assistant's by turns."""
    listed = [{"from": ("human", "assistant")[number % 2], "value": value} for number, value in enumerate(turns)]
    return json.dumps({"conversations": listed}).encode() + b"\n"


def numbered(count: int) -> bytes:
    return b"".join(belle(f"问题{number}", f"回答{number}") for number in range(count))


def table(artifact: Artifact, name: str = "train.arrow") -> pa.Table:
    return pa.ipc.open_stream(str(artifact.file(name))).read_all()


def refused(artifact: Artifact) -> list[tuple[int, str]]:
    return [(row["line"], row["reason"]) for row in pq.read_table(artifact.file("quarantine.parquet")).to_pylist()]


def adds_up(stats: dict[str, Any]) -> bool:
    lost = ("num_quarantined", "num_duplicates", "num_in_held_out", "num_too_long", "num_nothing_to_learn")
    return bool(stats["num_conversations"] == stats["num_examples"] + sum(stats[name] for name in lost))
