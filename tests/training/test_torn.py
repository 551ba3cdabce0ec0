"""A checkpoint with any of its files damaged in any way is passed over, with the reason, for the newest one that is whole."""

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.errors import StoreError, WorkerError
from tasks.training.checkpoints import MANIFEST_NAME, newest_checkpoint, prune_checkpoints
from tasks.training.saving import PROGRESS, TRAINER_STATE, CheckpointWriter, Ranks
from tasks.training.state import MOMENTS, WEIGHT, SavedState, write_snapshot
from tests.training.sealing import seal

FACTS: dict[str, Any] = {"data": "d" * 64, "spec": {"seed": 0}, "num_ranks": 2, "zero_stage": 2}
FILES = ("rank-0.safetensors", "rank-1.safetensors", PROGRESS, TRAINER_STATE, MANIFEST_NAME)


def halves(step: int) -> list[dict[str, torch.Tensor]]:
    """What two ranks write of a weight of 10 numbers, cut between them."""
    whole = torch.arange(10.0) + step
    return [{f"{part}:{start}:layer": whole[start : start + 5].clone() for part in (WEIGHT, *MOMENTS)} for start in (0, 5)]


def saved(root: Path, step: int) -> Path:
    folder = root / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for rank, tensors in enumerate(halves(step)):
        write_snapshot(folder / f"rank-{rank}.safetensors", tensors)
    for name in (PROGRESS, TRAINER_STATE):
        (folder / name).write_bytes(b'{"num_steps": %d, "schedule": {"last_epoch": %d}}' % (step, step))
    seal(folder, {**FACTS, "step": step})
    return folder


def truncated(tenths: int) -> Callable[[bytes], bytes]:
    return lambda data: data[: len(data) * tenths // 10]


def flipped(tenths: int) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        place = min(len(data) * tenths // 10, len(data) - 1)
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    return flip


def damages() -> Iterator[tuple[str, Callable[[bytes], bytes] | None]]:
    yield "removed", None
    for tenths in range(10):  # 0: emptied
        yield f"cut at {tenths}/10", truncated(tenths)
    for tenths in range(11):
        yield f"a bit flipped at {tenths}/10", flipped(tenths)


@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_every_file_is_seen_and_the_one_before_is_taken(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = saved(tmp_path, 1), saved(tmp_path, 2)
    path = newer / name
    whole = path.read_bytes()
    for label, damage in damages():
        caplog.clear()
        path.unlink() if damage is None else path.write_bytes(damage(whole))
        assert newest_checkpoint(tmp_path, FACTS) == older, label
        (said,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        assert said.startswith(f"{newer}: passed over: "), label
        assert name in said or "manifest" in said, label
    path.write_bytes(whole)
    assert newest_checkpoint(tmp_path, FACTS) == newer


def test_a_part_that_no_manifest_misses_is_missed_by_the_reader(tmp_path: Path) -> None:
    """A checkpoint sealed without one rank's file, as by a program's mistake: no digest is wrong, and numbers are missing."""
    folder = saved(tmp_path, 3)
    (folder / "rank-1.safetensors").unlink()
    with pytest.raises(StoreError, match=r"weight of layer ends at 5, not 10; delete .*checkpoint-3 to go on"):
        SavedState(folder).check({"layer": 10})


def test_a_part_that_a_lost_rank_left_beside_a_checkpoint_is_not_read(tmp_path: Path) -> None:
    folder = saved(tmp_path, 3)
    (folder / "rank-2.safetensors").write_bytes(b"cut short")
    SavedState(folder).check({"layer": 10})


def test_weights_too_many_or_too_few_are_refused_by_name(tmp_path: Path) -> None:
    state = SavedState(saved(tmp_path, 3))
    state.check({"layer": 10})
    with pytest.raises(StoreError, match="weight head is missing"):
        state.check({"layer": 10, "head": 2})
    with pytest.raises(StoreError, match="weight layer is only there"):
        state.check({})


@pytest.mark.parametrize(("start", "count"), [(0, 10), (0, 5), (5, 5), (3, 4), (9, 1)])
def test_any_cut_of_a_weight_is_read_from_the_cuts_that_were_written(tmp_path: Path, start: int, count: int) -> None:
    target = torch.zeros(count)
    SavedState(saved(tmp_path, 3)).read_into(target, WEIGHT, "layer", start)
    assert target.tolist() == [3.0 + number for number in range(start, start + count)]


def test_a_save_cut_by_a_full_disk_fails_with_the_reason_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older = saved(tmp_path, 1)
    cut = tmp_path / "checkpoint-2"
    cut.mkdir()
    (cut / "rank-0.safetensors").symlink_to("/dev/full")  # the kernel's full disk
    writer = CheckpointWriter(tmp_path, FACTS, Ranks())
    writer.begin(2, halves(2)[0], {}, 0.0)
    with pytest.raises(StoreError, match=r"checkpoint-2: rank 0 of 1 cannot write it \(No space left on device\); mend that"):
        writer.finish()
    assert newest_checkpoint(tmp_path, FACTS) == older
    assert f"{cut}: passed over: no manifest: its writing was cut short" in caplog.text


def assert_a_save_fails(root: Path, tensors: dict[str, torch.Tensor], error: type[Exception], reason: str) -> None:
    """A save behind step 1's checkpoint raises, and leaves that one the newest."""
    older = saved(root, 1)
    writer = CheckpointWriter(root, FACTS, Ranks())
    writer.begin(2, tensors, {PROGRESS: b"{}"}, 0.0)
    with pytest.raises(error, match=reason):
        writer.finish()
    assert newest_checkpoint(root, FACTS) == older


def test_numbers_that_are_not_finite_are_never_sealed(tmp_path: Path) -> None:
    reason = "checkpoint-2: not kept: weight:0:layer holds numbers that are not finite; lower"
    assert_a_save_fails(tmp_path, {"weight:0:layer": torch.tensor([1.0, float("nan")])}, WorkerError, reason)


def test_a_part_that_cannot_be_written_for_whatever_reason_is_never_sealed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in a thread ends that thread alone: what it left out must not be taken for written."""

    def no_memory(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        raise MemoryError("4 GB")

    monkeypatch.setattr("tasks.training.saving.write_snapshot", no_memory)
    reason = r"checkpoint-2: rank 0 of 1 cannot write it \(MemoryError: 4 GB\); mend that"
    assert_a_save_fails(tmp_path, halves(2)[0], WorkerError, reason)


def test_a_disk_that_is_full_at_the_manifest_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "manifest.json"))

    monkeypatch.setattr("tasks.training.saving.seal_checkpoint", no_space)
    reason = r"checkpoint-2: cannot be sealed.*No space left on device.*mend that and run again"
    assert_a_save_fails(tmp_path, halves(2)[0], StoreError, reason)


def test_what_the_writer_seals_is_whole_and_older_ones_are_pruned(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, FACTS, Ranks())
    for step in (1, 2, 3):
        writer.begin(step, halves(step)[0], {PROGRESS: b"{}"}, 0.0)
        writer.finish()
    assert not writer.is_writing()
    assert newest_checkpoint(tmp_path, FACTS) == tmp_path / "checkpoint-3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_an_older_one_that_cannot_be_deleted_ends_no_training_whose_newest_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on NFS, where a file that another process has open leaves its folder full."""

    def is_busy(root: Path) -> None:
        raise OSError(39, "Directory not empty", str(root / "checkpoint-1"))

    monkeypatch.setattr("tasks.training.saving.prune_checkpoints", is_busy)
    writer = CheckpointWriter(tmp_path, FACTS, Ranks())
    writer.begin(2, halves(2)[0], {PROGRESS: b"{}"}, 0.0)
    writer.finish()
    assert newest_checkpoint(tmp_path, FACTS) == tmp_path / "checkpoint-2"
    assert f"{tmp_path}/checkpoint-1: cannot be deleted (Directory not empty); tried again at the next checkpoint" in caplog.text


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()

    def write_later(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        assert may_write.wait(10)
        return write_snapshot(path, tensors)

    monkeypatch.setattr("tasks.training.saving.write_snapshot", write_later)
    writer = CheckpointWriter(tmp_path, FACTS, Ranks())
    writer.begin(1, halves(1)[0], {}, 0.0)
    assert writer.is_writing()
    assert newest_checkpoint(tmp_path, FACTS) is None
    may_write.set()
    writer.finish()
    assert newest_checkpoint(tmp_path, FACTS) == tmp_path / "checkpoint-1"


def test_retention_counts_whole_checkpoints_only(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        saved(tmp_path, step)
    for step in (3, 5):
        (tmp_path / f"checkpoint-{step}" / MANIFEST_NAME).unlink()
    prune_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-5"]


def test_a_checkpoint_that_cannot_be_read_is_not_given_up(tmp_path: Path) -> None:
    for step in (1, 2):
        saved(tmp_path, step)
    manifest = tmp_path / "checkpoint-2" / MANIFEST_NAME
    manifest.unlink()
    manifest.mkdir()  # any error but absence: a passing one of a network's file system reads the same
    with pytest.raises(StoreError, match=r"checkpoint-2: cannot be read \(.*\); mend that and run again"):
        newest_checkpoint(tmp_path, FACTS)
