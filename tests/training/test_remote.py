"""Checkpoints in a bucket, which here is a folder that speaks like one: whole or not there."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import StoreError
from tasks.machine import Machine, quiet
from tasks.store import SharedStore, digest_file, digest_json
from tasks.training.checkpoints import newest_checkpoint, read_manifest
from tasks.training.remote import KEPT, METRICS, Kept, RemoteCheckpoints, check_files, check_manifest, remote_at, sweep_remote
from tasks.training.resuming import files_to_fetch, needed_files, newest_anywhere, overlapping, take_up_metrics
from tests.training.sealing import seal
from tests.training.small_inputs import InputSpec, build_tokenizer

KEY = "a" * 64
FACTS = {"data": "d" * 64, "spec": {"seed": 0}, "num_ranks": 2, "zero_stage": 3}
PARTS = ("rank-0.safetensors", "rank-1.safetensors", "progress.json")


def nothing(amount: int) -> None:
    pass


@pytest.fixture
def open_remote(tmp_path: Path) -> Callable[[], RemoteCheckpoints]:
    """As a machine opens it that knows nothing yet."""
    return lambda: RemoteCheckpoints(SharedStore(f"file://{tmp_path}/bucket", tmp_path / "cache"), "pretrained", KEY)


@pytest.fixture
def remote(open_remote: Callable[[], RemoteCheckpoints]) -> RemoteCheckpoints:
    return open_remote()


def saved(root: Path, step: int, salt: str = "") -> Path:
    """A whole checkpoint here."""
    folder = root / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in PARTS:
        (folder / name).write_text(f"{name} {step} {salt}")
    seal(folder, {**FACTS, "step": step})
    return folder


def kept(remote: RemoteCheckpoints, folder: Path, metrics: bytes = b"") -> None:
    manifest = read_manifest(folder)
    remote.put(folder, manifest["facts"]["step"], manifest["files"], nothing)
    remote.keep(manifest, metrics)


def steps(remote: RemoteCheckpoints) -> list[int]:
    return [one.step for one in remote.kept()]


def objects(remote: RemoteCheckpoints) -> list[str]:
    """Below the training's folder, without digests."""
    names = (one.name.removeprefix(f"{remote.folder}/").split("/") for one in remote.bucket.objects(remote.folder))
    return sorted("/".join(part for part in name if len(part) != 64) for name in names)


def of_step(step: int) -> list[str]:
    return sorted(f"checkpoint-{step}/{name}" for name in (METRICS, *PARTS))


def damage(remote: RemoteCheckpoints, folder: Path, name: str, data: bytes) -> None:
    remote.bucket.put(f"{remote.folder}/{folder.name}/{digest_file(folder / name)}/{name}", data)


def test_parts_alone_are_no_checkpoint_and_are_removed_when_the_training_begins_again(
    remote: RemoteCheckpoints, tmp_path: Path
) -> None:
    folder = saved(tmp_path, 5)
    remote.put(folder, 5, read_manifest(folder)["files"], nothing)
    assert steps(remote) == []
    assert len(objects(remote)) == len(PARTS)
    remote.begin(0)
    assert objects(remote) == []


def test_what_is_kept_is_what_another_machine_finds(
    remote: RemoteCheckpoints, open_remote: Callable[[], RemoteCheckpoints], tmp_path: Path
) -> None:
    folder = saved(tmp_path, 5)
    kept(remote, folder, b'{"step": 5}\n')
    (found,) = open_remote().kept()
    assert found.manifest == read_manifest(folder)
    assert open_remote().metrics(found) == b'{"step": 5}\n'


def test_a_part_that_never_arrived_keeps_the_checkpoint_from_being(remote: RemoteCheckpoints, tmp_path: Path) -> None:
    kept(remote, saved(tmp_path, 4))
    folder = saved(tmp_path, 5)
    manifest = read_manifest(folder)
    (folder / "rank-1.safetensors").unlink()
    remote.put(folder, 5, manifest["files"], nothing)
    with pytest.raises(StoreError, match=r"checkpoint-5: rank-1\.safetensors is not there; give all nodes the same"):
        remote.keep(manifest, b"")
    assert steps(remote) == [4]


def test_the_newest_two_are_kept_and_nothing_of_older_ones_is_left(remote: RemoteCheckpoints, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        kept(remote, saved(tmp_path, step))
    assert steps(remote) == [3, 2]
    assert objects(remote) == sorted([*of_step(2), *of_step(3), KEPT])


def test_a_step_made_again_takes_the_place_of_the_one_before(remote: RemoteCheckpoints, tmp_path: Path) -> None:
    for name in ("first", "second"):
        folder = saved(tmp_path / name, 5, salt=name)
        kept(remote, folder)
    assert [one.manifest for one in remote.kept()] == [read_manifest(folder)]
    assert objects(remote) == sorted([*of_step(5), KEPT])


def test_what_is_about_to_be_trained_again_is_forgotten(remote: RemoteCheckpoints, tmp_path: Path) -> None:
    for step in (1, 2):
        kept(remote, saved(tmp_path, step))
    remote.begin(1)
    assert steps(remote) == [1]
    assert objects(remote) == sorted([*of_step(1), KEPT])


def test_a_run_that_another_has_taken_over_from_keeps_nothing_more(
    remote: RemoteCheckpoints, open_remote: Callable[[], RemoteCheckpoints], tmp_path: Path
) -> None:
    kept(remote, saved(tmp_path, 1))
    other = open_remote()
    other.kept()
    kept(other, saved(tmp_path, 2))
    for step in (3, 4):
        with pytest.raises(StoreError, match="another run keeps this training's checkpoints by now; end one of the two"):
            kept(remote, saved(tmp_path, step))
    assert steps(open_remote()) == [2, 1]


ANOTHER = b'[{"manifest": {"facts": {}, "files": {}, "digest": ""}, "metrics": {}}]'


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", ANOTHER])
def test_what_cannot_be_read_ends_the_run_and_takes_no_checkpoint_away(
    remote: RemoteCheckpoints, tmp_path: Path, data: bytes
) -> None:
    kept(remote, saved(tmp_path, 1))
    remote.bucket.put(f"{remote.folder}/{KEPT}", data)
    for ask in (remote.kept, lambda: remote.begin(0), lambda: find(tmp_path, remote)):
        with pytest.raises(StoreError, match=rf"{KEPT}: cannot be read .*, or delete {remote.address} to start over"):
            ask()
    assert objects(remote) == sorted([*of_step(1), KEPT])


def test_reports_whose_name_leads_out_of_a_folder_are_refused(remote: RemoteCheckpoints, tmp_path: Path) -> None:
    kept(remote, saved(tmp_path, 1))
    (one,) = remote.kept()
    entry = {"manifest": one.manifest, "metrics": {"num_bytes": 1, "digest": "../../other"}}
    remote.bucket.put(f"{remote.folder}/{KEPT}", orjson.dumps([entry]))
    with pytest.raises(StoreError, match=f"{KEPT}: cannot be read"):
        remote.kept()


@pytest.mark.parametrize("name", ["../rank-0.safetensors", "/etc/x.json", "a/b.json", ".x.json", "rank-0.pt", ""])
def test_names_that_lead_out_of_a_folder_are_refused(name: str) -> None:
    files = {name: {"num_bytes": 1, "digest": "0" * 64}}
    body = {"facts": {"step": 1}, "files": files}
    with pytest.raises(ValueError, match="is no part of a checkpoint"):
        check_manifest({**body, "digest": digest_json(body)})
    with pytest.raises(ValueError, match="is no part of a checkpoint"):
        check_files({"progress.json": {"num_bytes": 1, "digest": "../x"}})


@pytest.mark.parametrize(("kind", "key"), [("..", KEY), ("pretrained", ".."), ("pretrained", None), ("Pre", KEY)])
def test_a_place_that_is_no_artifacts_is_refused(remote: RemoteCheckpoints, kind: Any, key: Any) -> None:
    with pytest.raises(ValueError, match="/"):
        remote_at(remote.store, kind, key)
    assert remote_at(remote.store, "pretrained", KEY).folder == remote.folder


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_of_as_many_ranks_under_the_same_stage_a_node_needs_its_own_ranks_files(stage: int) -> None:
    files = {name: {} for name in (*(f"rank-{rank}.safetensors" for rank in range(4)), "progress.json")}
    facts = {"num_ranks": 4, "zero_stage": stage, "cut": "c"}
    own = ["rank-2.safetensors", "rank-3.safetensors", "progress.json"]
    assert needed_files({"files": files, "facts": facts}, facts, range(2, 4)) == own
    for other in ({**facts, "num_ranks": 2}, {**facts, "zero_stage": 3 - stage}):
        assert needed_files({"files": files, "facts": facts}, other, range(2)) == list(files)


@pytest.mark.parametrize(("stage", "num_needed"), [(0, 5), (1, 5), (2, 5), (3, 3)])
def test_another_file_of_deepspeeds_may_lay_weights_in_another_order_below_zero_3(stage: int, num_needed: int) -> None:
    files = {name: {} for name in (*(f"rank-{rank}.safetensors" for rank in range(4)), "progress.json")}
    facts = {"num_ranks": 4, "zero_stage": stage}
    for written in ({"cut": "other"}, {}):  # {}: of a release that did not tell it
        assert len(needed_files({"files": files, "facts": facts | written}, {**facts, "cut": "c"}, range(2))) == num_needed


def part(pieces: dict[str, tuple[int, int]]) -> bytes:
    """The beginning of a rank's file, by start and count of what it has of each weight."""
    header = {f"weight:{start}:{name}": {"dtype": "F32", "shape": [count]} for name, (start, count) in pieces.items()}
    data = orjson.dumps({**header, "exp_avg:0:a": {}})
    return len(data).to_bytes(8, "little") + data


def cut_in_bucket(remote: RemoteCheckpoints, folder: Path, parts: list[bytes]) -> Kept:
    folder.mkdir(parents=True)
    for rank, data in enumerate(parts):
        (folder / f"rank-{rank}.safetensors").write_bytes(data)
    (folder / "progress.json").write_text("{}")
    seal(folder, {**FACTS, "step": 1, "num_ranks": len(parts)})
    kept(remote, folder)
    return remote.kept()[0]


def test_of_other_ranks_under_zero_3_a_node_fetches_the_files_in_which_its_cuts_lie(
    remote: RemoteCheckpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cuts = [{"a": (0, 3), "b": (0, 1)}, {"a": (3, 3), "b": (1, 1)}, {"a": (6, 3)}, {"a": (9, 2)}]
    one = cut_in_bucket(remote, tmp_path / "checkpoint-1", [part(cut) for cut in cuts])
    facts, everything = {**FACTS, "num_ranks": 2}, sorted(one.files)

    def fetched(ranks: range, **changed: int) -> list[str]:
        return sorted(files_to_fetch(remote, one, {**facts, **changed}, ranks))

    # Of 11 numbers of a, rank 0 of 2 reads 0 to 6, and rank 1 the others; of b, one each.
    assert fetched(range(1)) == ["progress.json", "rank-0.safetensors", "rank-1.safetensors"]
    assert fetched(range(1, 2)) == ["progress.json", *(f"rank-{rank}.safetensors" for rank in (1, 2, 3))]
    assert fetched(range(2)) == everything
    assert fetched(range(1), zero_stage=2) == everything
    other = cut_in_bucket(remote, tmp_path / "other" / "checkpoint-1", [b"x" * 40, part(cuts[1])])
    assert len(files_to_fetch(remote, other, {**facts, "num_ranks": 4}, range(1))) == 3
    assert "checkpoint-1: all of it is fetched (rank-0.safetensors: a header of " in caplog.text


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 6), st.data())
def test_all_that_a_nodes_ranks_read_lies_in_the_files_that_it_fetches(
    counts: list[int], written: int, now: int, data: st.DataObject
) -> None:
    def cut(count: int, num_ranks: int, rank: int) -> tuple[int, int]:
        size = -(-count // num_ranks)
        return min(count, rank * size), min(count, (rank + 1) * size)

    files = {
        f"rank-{rank}": {
            str(number): place for number, count in enumerate(counts) if (place := cut(count, written, rank))[0] < place[1]
        }
        for rank in range(written)
    }
    first = data.draw(st.integers(0, now - 1))
    ranks = range(first, data.draw(st.integers(first + 1, now)))
    found = overlapping(files, now, ranks)
    read = {(number, place) for rank in ranks for number, count in enumerate(counts) for place in range(*cut(count, now, rank))}
    holds = {file: {(int(name), place) for name, ends in held.items() for place in range(*ends)} for file, held in files.items()}
    assert read <= {place for file in found for place in holds[file]}
    assert all(read & holds[file] for file in found)  # none in vain


def find(root: Path, remote: RemoteCheckpoints, ranks: range = range(2)) -> Path | None:
    return newest_anywhere(root, remote, FACTS, ranks, quiet)


def test_a_machine_with_an_empty_disk_fetches_the_newest_and_has_it_whole(remote: RemoteCheckpoints, tmp_path: Path) -> None:
    for step in (1, 2):
        kept(remote, saved(tmp_path / "there", step))
    here = tmp_path / "here"
    assert find(here, remote) == here / "checkpoint-2"
    assert newest_checkpoint(here, FACTS) == here / "checkpoint-2"
    assert sorted(path.name for path in (here / "checkpoint-2").iterdir()) == sorted((*PARTS, "manifest.json"))


def test_a_node_of_several_fetches_what_its_ranks_read(remote: RemoteCheckpoints, tmp_path: Path) -> None:
    kept(remote, saved(tmp_path / "there", 1))
    assert find(tmp_path / "here", remote, range(1, 2)) == tmp_path / "here" / "checkpoint-1"
    assert sorted(path.name for path in (tmp_path / "here" / "checkpoint-1").glob("rank-*")) == ["rank-1.safetensors"]


def test_of_a_fetch_that_was_cut_off_nothing_is_left_once_the_checkpoint_is_here(
    remote: RemoteCheckpoints, tmp_path: Path
) -> None:
    """Such as a part that other ranks would have read, who began it."""
    kept(remote, saved(tmp_path / "there", 1))
    folder = tmp_path / "here" / "checkpoint-1"
    folder.mkdir(parents=True)
    for name in (".rank-0.safetensors.fetched", ".rank-0.safetensors.fetched.ranges"):
        (folder / name).touch()
    assert find(tmp_path / "here", remote, range(1, 2)) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "progress.json", "rank-1.safetensors"]


def test_a_newer_one_on_this_disk_comes_before_the_buckets(remote: RemoteCheckpoints, tmp_path: Path) -> None:
    kept(remote, saved(tmp_path / "there", 1))
    newer = saved(tmp_path / "here", 2)
    assert find(tmp_path / "here", remote) == newer


def test_what_a_disk_has_of_a_checkpoint_is_not_fetched_again(
    remote: RemoteCheckpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a node that wrote one rank's part of it. The bucket's copy of that is damaged, to show that nobody looks at it."""
    here = saved(tmp_path / "here", 1)
    kept(remote, here)
    damage(remote, here, "rank-0.safetensors", b"another")
    (here / "rank-1.safetensors").unlink()
    assert find(tmp_path / "here", remote) == here
    assert newest_checkpoint(tmp_path / "here", FACTS) == here
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_what_a_disk_has_of_another_try_at_the_step_is_not_read_with_what_is_fetched(
    remote: RemoteCheckpoints, tmp_path: Path
) -> None:
    kept(remote, saved(tmp_path / "there", 4))
    (saved(tmp_path / "here", 4, salt="of another try") / "progress.json").unlink()  # as a node has it of which others had parts
    found = find(tmp_path / "here", remote, range(1))
    assert found
    held = {name: (found / name).read_bytes() for name in PARTS if (found / name).exists()}
    assert held == {name: (tmp_path / "there" / "checkpoint-4" / name).read_bytes() for name in held}
    assert held.keys() == {"rank-0.safetensors", "progress.json"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"short", "rank-1.safetensors is missing or shorter than its manifest says"),
        (b"rank-1.safetensors 2!", "rank-1.safetensors has another digest than its manifest says"),
    ],
)
def test_a_damaged_one_is_passed_over_for_the_one_before(
    remote: RemoteCheckpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes, reason: str
) -> None:
    for step in (1, 2):
        kept(remote, folder := saved(tmp_path / "there", step))
    damage(remote, folder, "rank-1.safetensors", data)
    here = tmp_path / "here"
    assert find(here, remote) == here / "checkpoint-1"
    assert f"{remote.address}/checkpoint-2: passed over: {reason}" in caplog.text
    assert not (here / "checkpoint-2" / "manifest.json").exists()
    assert steps(remote) == [2, 1]  # until the training has begun from the other
    remote.begin(1)
    assert steps(remote) == [1]


def test_where_all_are_damaged_the_run_ends_and_none_is_taken_away(remote: RemoteCheckpoints, tmp_path: Path) -> None:
    """To begin from step 0 would delete them; it may be this machine that reads them wrong."""
    for step in (1, 2):
        kept(remote, folder := saved(tmp_path / "there", step))
        damage(remote, folder, "rank-1.safetensors", b"rank-1.safetensors ?!")
    said = rf"{remote.address}: none of its checkpoints \(steps 2, 1\) can be used here; look at the warnings above, or delete"
    with pytest.raises(StoreError, match=said):
        find(tmp_path / "here", remote)
    assert steps(remote) == [2, 1]


def test_the_last_one_is_not_dropped(remote: RemoteCheckpoints, tmp_path: Path) -> None:
    for step in (1, 2):
        kept(remote, saved(tmp_path, step))
    remote.drop(2)
    with pytest.raises(StoreError, match=rf"{remote.address}: checkpoint-1 is damaged, and there is no other; delete"):
        remote.drop(1)
    assert steps(remote) == [1]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_part_that_another_node_finds_damaged_is_read_anew(remote: RemoteCheckpoints, tmp_path: Path, is_damaged: bool) -> None:
    kept(remote, folder := saved(tmp_path, 1))
    if is_damaged:
        damage(remote, folder, "rank-1.safetensors", b"rank-1.safetensors 1!")
    problem = remote.reread(1, "rank-1.safetensors", tmp_path)
    assert problem == ("rank-1.safetensors has another digest than its manifest says" if is_damaged else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bucket", "checkpoint-1"]


def test_one_of_another_spec_is_refused(remote: RemoteCheckpoints, tmp_path: Path) -> None:
    kept(remote, saved(tmp_path / "there", 1))
    with pytest.raises(StoreError, match=rf"written with spec\.seed 0 \(now 1\); delete {remote.address} to start over"):
        newest_anywhere(tmp_path / "here", remote, {**FACTS, "spec": {"seed": 1}}, range(2), quiet)


def test_the_reports_of_the_steps_before_come_along(remote: RemoteCheckpoints, tmp_path: Path) -> None:
    there = b'{"step": 1}\n{"step": 2}\n'
    kept(remote, saved(tmp_path / "there", 2), there)
    path = tmp_path / "metrics.jsonl"
    take_up_metrics(path, remote, 2)
    assert path.read_bytes() == there
    own = b'{"step": 1, "own": 1}\n{"step": 2, "own": 1}\n{"step": 3, "own": 1}\n'
    path.write_bytes(own)
    take_up_metrics(path, remote, 2)
    assert path.read_bytes() == own


def test_checkpoints_of_what_is_built_are_deleted_and_no_others(remote: RemoteCheckpoints, tmp_path: Path) -> None:
    kept(remote, saved(tmp_path, 1))
    built = build_tokenizer(remote.store, Machine(), InputSpec())
    done = RemoteCheckpoints(remote.store, built.kind, built.key)
    kept(done, saved(tmp_path / "done", 1))
    sweep_remote(remote.store)
    assert (objects(done), steps(remote)) == ([], [1])
