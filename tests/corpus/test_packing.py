"""Best-fit packing, and the rows that it fills."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.corpus.packing import Packer, fill_row, pack_best_fit
from tasks.schemas import IGNORED_LABEL, examples_schema


def lengths(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_the_longest_come_first_each_where_least_room_is_left() -> None:
    # 6 and 5 open rows with room for 4 and 5; 4 fits the first exactly, 3 the second, 2 fits there too.
    assert pack_best_fit(lengths(2, 3, 4, 5, 6), 10) == [[0, 1, 3], [2, 4]]


def test_an_example_as_long_as_a_row_has_it_alone() -> None:
    assert pack_best_fit(lengths(10, 10, 1), 10) == [[0], [1], [2]]


def test_no_example_makes_no_row() -> None:
    assert pack_best_fit(lengths(), 10) == []


@given(st.lists(st.integers(1, 50), max_size=200))
def test_every_example_stands_in_one_row_whole(sizes: list[int]) -> None:
    rows = pack_best_fit(lengths(*sizes), 50)
    assert sorted(example for row in rows for example in row) == list(range(len(sizes)))
    assert all(sum(sizes[example] for example in row) <= 50 for row in rows)
    assert rows == sorted(rows)


@given(st.lists(st.integers(1, 50), max_size=200))
def test_all_rows_but_one_are_half_full_at_least(sizes: list[int]) -> None:
    filled = sorted(sum(sizes[example] for example in row) for row in pack_best_fit(lengths(*sizes), 50))
    assert all(total >= 25 for total in filled[1:])


def test_positions_restart_at_every_example_and_at_the_padding() -> None:
    row = np.full(7, 9, np.int32), np.full(7, IGNORED_LABEL, np.int32), np.zeros(7, np.int32)
    learned = [np.array([False, True, True]), np.array([False, True])]
    fill_row([(lengths(1, 2, 3), learned[0]), (lengths(4, 5), learned[1])], *row)
    assert [column.tolist() for column in row] == [
        [1, 2, 3, 4, 5, 9, 9],
        [-100, 2, 3, -100, 5, -100, -100],
        [0, 1, 2, 0, 1, 0, 1],
    ]


def pack(folder: Path, examples: list[tuple[list[int], list[int]]], block_size: int) -> pa.Table:
    packer = Packer(folder, "train", block_size)
    for ids, labels in examples:
        packer.add(lengths(*ids), lengths(*labels))
    packer.write(folder / "train.arrow", 0, lambda amount: None)
    return pa.ipc.open_stream(str(folder / "train.arrow")).read_all()


def test_the_file_holds_rows_of_block_size(tmp_path: Path) -> None:
    table = pack(tmp_path, [([1, 2, 3], [-100, 2, 3]), ([4, 5], [-100, 5]), ([6], [6])], 4)
    assert table.schema == examples_schema(4)
    assert table.to_pydict() == {
        "input_ids": [[1, 2, 3, 6], [4, 5, 0, 0]],
        "labels": [[-100, 2, 3, 6], [-100, 5, -100, -100]],
        "position_ids": [[0, 1, 2, 0], [0, 1, 0, 1]],
    }


def test_without_an_example_there_is_no_file(tmp_path: Path) -> None:
    packer = Packer(tmp_path, "validation", 8)
    assert packer.write(tmp_path / "validation.arrow", 0, lambda amount: None) == 0
    assert not (tmp_path / "validation.arrow").exists()


@pytest.mark.parametrize("num_examples", [1, 600])
def test_ids_come_out_as_they_went_in_over_many_batches(tmp_path: Path, num_examples: int) -> None:
    table = pack(tmp_path, [([n] * 5, [-100, n, n, n, n]) for n in range(1, num_examples + 1)], 8)
    rows = np.stack(table["input_ids"].to_numpy())
    assert rows.shape == (num_examples, 8)
    assert rows[:, :5].tolist() == [[n] * 5 for n in range(1, num_examples + 1)]
    assert not rows[:, 5:].any()
