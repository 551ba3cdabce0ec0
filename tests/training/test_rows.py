"""Rows by number: opened as they are asked for, whatever their files' number."""

import threading
from pathlib import Path

import numpy as np
import pytest

from tasks.errors import CorpusError
from tasks.training import rows as module
from tasks.training.rows import Rows
from tests.training.small_inputs import BLOCK_SIZE, write_rows


def numbered(folder: Path, sizes: list[int]) -> list[str]:
    """Files whose rows count through: 0, 1, 2, ..."""
    ends = np.cumsum(sizes)
    for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        write_rows(folder / f"{number}.arrow", np.repeat(np.arange(end - size, end)[:, None], BLOCK_SIZE, axis=1))
    return [str(folder / f"{number}.arrow") for number in range(len(sizes))]


def first_ids(rows: Rows) -> list[int]:
    return [int(row["input_ids"][0]) for row in rows]


def test_where_the_counts_are_known_no_file_is_opened_before_a_row_of_it_is_asked_for(tmp_path: Path) -> None:
    files = numbered(tmp_path, [2, 3])
    Path(files[0]).unlink()
    rows = Rows(files, [2, 3])
    assert len(rows) == 5
    assert int(rows[4]["input_ids"][0]) == 4
    with pytest.raises(CorpusError, match=r"0\.arrow: cannot be read as an Arrow stream"):
        rows[0]


def test_files_without_a_row_are_passed_over(tmp_path: Path) -> None:
    files = numbered(tmp_path, [0, 2, 0, 1, 0])
    assert first_ids(Rows(files)) == first_ids(Rows(files, [0, 2, 0, 1, 0])) == [0, 1, 2]


def test_more_files_than_may_be_open_are_closed_and_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_OPEN", 2)
    rows = Rows(numbered(tmp_path, [1, 1, 1, 1]), [1, 1, 1, 1])
    kept = rows[0]["input_ids"]
    assert first_ids(rows) == first_ids(rows) == [0, 1, 2, 3]
    assert kept.tolist() == [0] * BLOCK_SIZE  # of a file closed since


def test_a_row_that_there_is_not_ends_an_iteration_and_no_other_is_given_for_it(tmp_path: Path) -> None:
    rows = Rows(numbered(tmp_path, [2]))
    for index in (2, -1):
        with pytest.raises(IndexError):
            rows[index]


def test_a_file_on_its_way_is_waited_for(tmp_path: Path) -> None:
    (file,) = numbered(tmp_path, [1])
    away = Path(file).rename(tmp_path / "away")
    rows = Rows([file], [1], is_arriving=True)
    arrival = threading.Timer(0.1, away.rename, [file])
    arrival.start()
    assert int(rows[0]["input_ids"][0]) == 0
    arrival.join()


def test_a_file_that_never_comes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ARRIVAL_SECONDS", 0.0)
    with pytest.raises(CorpusError, match=r"gone\.arrow: not here after 0 s"):
        Rows([str(tmp_path / "gone.arrow")], [1], is_arriving=True)[0]
