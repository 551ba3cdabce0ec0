"""Bad lines that come in any order: on disk, and as one table in the end."""

from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.corpus import quarantine
from tasks.corpus.quarantine import Refusals, write_rows
from tasks.corpus.reader import BadLine
from tasks.schemas import QUARANTINE


def refusals(folder: Path, lines: list[int]) -> Refusals:
    refused = Refusals(folder / "refused.jsonl")
    for line in lines:
        refused.add(line, BadLine(f"reason {line % 7}", b"\xff\n" + str(line).encode()))
    return refused


def test_they_are_told_in_the_order_of_their_lines(tmp_path: Path) -> None:
    refused = refusals(tmp_path, [30, 2, 11])
    assert (len(refused), refused.first()) == (3, (2, "reason 2"))
    refused.add(1, BadLine("late", b""))
    assert [row["line"] for row in refused.rows()] == [1, 2, 11, 30]
    assert list(refused.rows())[1] == {"line": 2, "reason": "reason 2", "excerpt": b"\xff\n2"}


def test_however_many_there_are_few_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "WAITING_BYTES", 100)
    refused = refusals(tmp_path, list(range(1000)))
    assert len(refused.waiting) < 100
    assert [row["line"] for row in refused.rows()] == list(range(1000))


def test_what_an_earlier_try_left_does_not_count(tmp_path: Path) -> None:
    refusals(tmp_path, [1, 2]).first()
    assert list(refusals(tmp_path, []).rows()) == []


@pytest.mark.parametrize("number", [0, 1, 10_240, 25_000])
def test_the_table_has_the_bytes_of_one_written_at_once(tmp_path: Path, number: int) -> None:
    lines = Random(1).sample(range(10 * number), number)
    refused = refusals(tmp_path, lines)
    write_rows(refused.rows(), tmp_path / "found")
    table = pa.Table.from_pylist(list(refused.rows()), schema=QUARANTINE)
    pq.write_table(table, tmp_path / "expected", compression="zstd")
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
