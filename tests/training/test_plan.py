from pathlib import Path

import pytest

from tasks.errors import SettingsError
from tasks.machine import TrainingSettings
from tasks.training.plan import Batch, count_slots, derive_batch


def settings(num_ranks: int = 2, micro_batch_size: int | None = None) -> TrainingSettings:
    return TrainingSettings(num_ranks=num_ranks, micro_batch_size=micro_batch_size)


def test_ranks_times_accumulation_times_micro_batch_is_the_global_batch() -> None:
    assert derive_batch(128, settings(2, 16)) == Batch(num_ranks=2, accumulation=4, micro_batch_size=16)


def test_a_micro_batch_takes_as_many_rows_as_there_is_memory_for() -> None:
    assert derive_batch(8, settings(2)) == Batch(2, 1, 4)
    assert derive_batch(8, settings(2), most_rows=9) == Batch(2, 1, 4)
    assert derive_batch(8, settings(2), most_rows=2) == Batch(2, 2, 2)
    assert derive_batch(6, settings(2), most_rows=2) == Batch(2, 3, 1)


def test_a_row_that_fits_nowhere_is_tried_by_itself() -> None:
    assert derive_batch(8, settings(2), most_rows=0) == Batch(2, 4, 1)


def test_ranks_that_do_not_divide_are_refused_with_all_numbers() -> None:
    with pytest.raises(SettingsError, match=r"4 ranks do not divide the recipe's global_batch_size 6; .* one of 1, 2, 3"):
        derive_batch(6, settings(4))


def test_a_micro_batch_that_does_not_divide_is_refused_with_all_numbers() -> None:
    with pytest.raises(SettingsError, match=r"3 x 2 ranks does not divide the recipe's global_batch_size 16; .* 1, 2, 4, 8"):
        derive_batch(16, settings(2, 3))


def test_no_ranks_are_refused() -> None:
    with pytest.raises(SettingsError, match="num_ranks: 0; give 1 or more"):
        derive_batch(4, settings(0))


def test_a_hostfile_gives_the_sum_of_its_slots(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two hosts\nnode-1 slots=8\nnode-2 slots = 4\n")
    assert count_slots(hostfile) == 12
    assert derive_batch(24, TrainingSettings(launcher="deepspeed", hostfile=hostfile)).num_ranks == 12


def test_a_hostfile_without_slots_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node-1\n")
    with pytest.raises(SettingsError, match="no line reads `host slots=8`"):
        count_slots(tmp_path / "hosts")
