import logging
import os
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import StoreError
from tasks.training.checkpoints import clear_torn, newest_checkpoint, prune_checkpoints, written_facts
from tests.training.sealing import seal

SPEC = {"learning_rate": 0.01, "model": {"config": {"hidden_size": 32}}}
FACTS = {"data": "d" * 64, "spec": SPEC, "num_ranks": 2, "zero_stage": 2}


def saved(root: Path, step: int, facts: dict[str, Any] | None = FACTS) -> Path:
    folder = root / f"checkpoint-{step}"
    (folder / f"global_step{step}").mkdir(parents=True)
    (folder / f"global_step{step}" / "model.pt").write_bytes(b"weights")
    (folder / "trainer_state.json").write_bytes(b"{}")
    if facts:
        seal(folder, facts)
    return folder


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_no_folder_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none", FACTS) is None


def test_the_newest_by_number_is_taken(tmp_path: Path) -> None:
    for step in (900, 1000, 99):
        saved(tmp_path, step)
    assert newest_checkpoint(tmp_path, FACTS) == tmp_path / "checkpoint-1000"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing, its manifest says 2"),
        (lambda folder: (folder / "global_step2/model.pt").write_bytes(b"weigh"), "model.pt is 5 bytes, its manifest says 7"),
        (lambda folder: (folder / "global_step2/model.pt").write_bytes(b"Weights"), "model.pt has another digest"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest: its writing was cut short"),
        (lambda folder: (folder / "manifest.json").write_bytes(b'{"facts'), "unreadable manifest"),
        (lambda folder: (folder / "manifest.json").write_bytes(b'{"facts": {}}'), "incomplete manifest (no 'files')"),
    ],
)
def test_a_torn_checkpoint_is_passed_over_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, reason: str
) -> None:
    older, newer = saved(tmp_path, 1), saved(tmp_path, 2)
    damage(newer)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path, FACTS) == older
    assert f"{newer}: passed over: " in caplog.text
    assert reason in caplog.text


def test_where_all_that_were_sealed_are_damaged_nothing_begins_anew(tmp_path: Path) -> None:
    """To begin anew would delete them; it may be this machine that reads them wrong."""
    for step in (1, 2):
        (saved(tmp_path, step) / "trainer_state.json").write_bytes(b"[]")
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(StoreError, match=rf"^{tmp_path}: none of its checkpoints can be used; look at the warnings above, or"):
        newest_checkpoint(tmp_path, FACTS)
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}" / "manifest.json").unlink()
    assert newest_checkpoint(tmp_path, FACTS) is None


def test_a_torn_one_into_which_a_dying_rank_writes_still_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older, torn = saved(tmp_path, 1), tmp_path / "checkpoint-2"
    torn.mkdir()
    rmdir, late = os.rmdir, ["rank-0.safetensors", "rank-1.safetensors"]

    def write_first(path: Any, **options: Any) -> None:
        if late:
            (torn / late.pop()).touch()
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", write_first)
    monkeypatch.setattr("tasks.training.checkpoints.AGAIN_SECONDS", 0.01)
    clear_torn(tmp_path, older)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_changed_data_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    expected = r"checkpoint-5: written with data dddddddddddd\.\.\. \(now eeeeeeeeeeee\.\.\.\); delete"
    with pytest.raises(StoreError, match=expected):
        newest_checkpoint(tmp_path, {**FACTS, "data": "e" * 64})


def test_a_changed_spec_is_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    spec = {"learning_rate": 0.02, "model": {"config": {"hidden_size": 64, "tie_word_embeddings": True}}}
    expected = (
        r"written with spec\.learning_rate 0\.01 \(now 0\.02\), spec\.model\.config\.hidden_size 32 \(now 64\), "
        r"spec\.model\.config\.tie_word_embeddings absent \(now True\); delete"
    )
    with pytest.raises(StoreError, match=expected):
        newest_checkpoint(tmp_path, {**FACTS, "spec": spec})


def test_any_number_of_ranks_under_any_zero_stage_takes_it_up(tmp_path: Path) -> None:
    folder = saved(tmp_path, 5)
    assert newest_checkpoint(tmp_path, {**FACTS, "num_ranks": 1, "zero_stage": 3}) == folder
    assert written_facts(folder) == FACTS


def test_pruning_keeps_the_newest_two_whole_ones_and_what_is_newer(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        saved(tmp_path, step)
    saved(tmp_path, 4, facts=None)
    prune_checkpoints(tmp_path)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}


def test_pruning_never_deletes_the_last_whole_one(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    for step in (2, 3, 4):
        saved(tmp_path, step, facts=None)
    prune_checkpoints(tmp_path)
    assert "checkpoint-1" in names(tmp_path)


def test_what_is_newer_than_the_one_resumed_from_is_cleared(tmp_path: Path) -> None:
    first = saved(tmp_path, 1)
    saved(tmp_path, 2, facts=None)
    clear_torn(tmp_path, first)
    assert names(tmp_path) == {"checkpoint-1"}
    clear_torn(tmp_path, None)
    assert names(tmp_path) == set()


def test_sealing_again_replaces_the_manifest(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1)
    (folder / "trainer_state.json").write_bytes(b'{"step": 1}')
    seal(folder, FACTS)
    assert newest_checkpoint(tmp_path, FACTS) == folder
