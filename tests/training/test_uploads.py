"""Checkpoints on their way into a bucket, beside a training that is made up."""

import logging
import platform
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.errors import SettingsError, StoreError, WorkerError
from tasks.store import ArtifactStore, SharedStore
from tasks.training.checkpoints import read_manifest
from tasks.training.nodes.party import DamagedError
from tasks.training.remote import Files, Kept, RemoteCheckpoints
from tasks.training.share import Share, own_folder
from tasks.training.uploading import uploading
from tasks.training.uploads import LINKS, Uploads, await_earlier, linked
from tests.training.test_remote import FACTS, KEY, PARTS, damage, kept, objects, saved, steps

WAIT_SECONDS = 20.0


class Line(RemoteCheckpoints):
    """A bucket behind a line that is told, for every checkpoint, to "pass" it, to be "down" after a part, or "broken"."""

    def __init__(self, store: SharedStore) -> None:
        super().__init__(store, "pretrained", KEY)
        self.begun: queue.Queue[int] = queue.Queue()
        self.fates: queue.Queue[str] = queue.Queue()

    def put(self, folder: Path, step: int, files: Files, advance: Callable[[int], None]) -> None:
        self.begun.put(step)
        fate = self.fates.get(timeout=WAIT_SECONDS)
        if fate == "broken":
            raise RuntimeError("cannot start new thread")
        if fate == "down":
            super().put(folder, step, {name: files[name] for name in PARTS[:1]}, advance)
            raise StoreError("no answer")
        super().put(folder, step, files, advance)


class Others:
    """Other nodes, which say what they are told to."""

    def __init__(self, problem: str | None) -> None:
        self.problem, self.asked, self.is_lost = problem, list[int](), False

    def ask_to_keep(self, step: int, files: Files) -> None:
        self.asked.append(step)

    def has_lost(self) -> bool:
        return self.is_lost

    def await_kept(self, is_ended: Callable[[], bool]) -> str | None:
        return self.problem


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(SharedStore(f"file://{tmp_path}/bucket", tmp_path / "cache"))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.training.uploads.END_SECONDS", 0.05)


@pytest.fixture
def start(line: Line, tmp_path: Path) -> Iterator[Callable[..., Uploads]]:
    started: list[Uploads] = []

    def start(others: Others | None = None) -> Uploads:
        started.append(Uploads(line, tmp_path, kept_step=0, metrics=lambda step: b"%d" % step, others=others))
        return started[-1]

    yield start
    for uploads in started:
        uploads.end()
    for _ in range(9):
        line.fates.put("down")


def test_the_newest_goes_next_and_those_between_are_passed_over(
    line: Line, start: Callable[..., Uploads], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uploads = start()
    with caplog.at_level(logging.INFO):
        for step in (1, 2, 3):
            saved(tmp_path, step)
            uploads.add(step)
            if step == 1:
                assert line.begun.get(timeout=WAIT_SECONDS) == 1
        line.fates.put("pass")
        line.fates.put("pass")
        uploads.finish(WAIT_SECONDS)
    assert line.begun.get_nowait() == 3
    assert steps(line) == [3, 1]
    assert "checkpoint-2: not put into the bucket: checkpoint-3 is newer" in caplog.text
    assert "checkpoint-3: in the bucket after" in caplog.text


def test_what_is_pruned_while_it_is_sent_arrives_whole(line: Line, start: Callable[..., Uploads], tmp_path: Path) -> None:
    uploads, folder = start(), saved(tmp_path, 1)
    manifest = read_manifest(folder)
    uploads.add(1)
    assert line.begun.get(timeout=WAIT_SECONDS) == 1
    shutil.rmtree(folder)
    line.fates.put("pass")
    uploads.finish(WAIT_SECONDS)
    assert [one.manifest for one in line.kept()] == [manifest]
    assert list(tmp_path.glob(f"{LINKS}*")) == []


def test_a_bucket_that_is_down_is_told_of_and_the_next_checkpoint_is_tried(
    line: Line, start: Callable[..., Uploads], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uploads = start()
    for step, fate in ((1, "down"), (2, "pass")):
        saved(tmp_path, step)
        line.fates.put(fate)
        uploads.add(step)
        assert line.begun.get(timeout=WAIT_SECONDS) == step
    uploads.finish(WAIT_SECONDS)
    said = "checkpoint-1: not put into the bucket (no answer); training goes on, the next one is tried; none is there yet"
    assert said in caplog.text
    assert steps(line) == [2]


def test_what_nobody_foresaw_keeps_one_checkpoint_away_and_not_the_next(
    line: Line, start: Callable[..., Uploads], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uploads = start()
    for step, fate in ((1, "broken"), (2, "pass")):
        saved(tmp_path, step)
        line.fates.put(fate)
        uploads.add(step)
        assert line.begun.get(timeout=WAIT_SECONDS) == step
    uploads.finish(WAIT_SECONDS)
    assert steps(line) == [2]
    assert "checkpoint-1: not put into the bucket (RuntimeError: cannot start new thread)" in caplog.text


def test_parts_of_those_that_did_not_come_to_be_do_not_pile_up(line: Line, start: Callable[..., Uploads], tmp_path: Path) -> None:
    uploads = start()
    for step in (1, 2, 3):
        saved(tmp_path, step)
        line.fates.put("down")
        uploads.add(step)
        assert line.begun.get(timeout=WAIT_SECONDS) == step
    line.fates.put("down")
    uploads.finish(WAIT_SECONDS)
    assert objects(line) == ["checkpoint-3/rank-0.safetensors"]


def test_at_the_end_the_last_one_that_failed_is_tried_once_more(
    line: Line, start: Callable[..., Uploads], tmp_path: Path
) -> None:
    uploads = start()
    saved(tmp_path, 1)
    line.fates.put("down")
    uploads.add(1)
    assert line.begun.get(timeout=WAIT_SECONDS) == 1
    line.fates.put("pass")
    uploads.finish(WAIT_SECONDS)
    assert steps(line) == [1]


def test_the_end_is_waited_for_no_longer_than_it_is_given(
    line: Line, start: Callable[..., Uploads], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uploads = start()
    saved(tmp_path, 1)
    uploads.add(1)
    assert line.begun.get(timeout=WAIT_SECONDS) == 1
    uploads.finish(0.01)
    assert "checkpoint-1: not in the bucket after 0 s; none is there yet" in caplog.text


def test_what_is_broken_off_leaves_no_checkpoint(line: Line, start: Callable[..., Uploads], tmp_path: Path) -> None:
    uploads = start()
    saved(tmp_path, 1)
    uploads.add(1)
    assert line.begun.get(timeout=WAIT_SECONDS) == 1
    uploads.end()
    line.fates.put("pass")
    uploads.finish(WAIT_SECONDS)
    assert steps(line) == []


@pytest.mark.parametrize(("problem", "there"), [(None, [1]), ("node b is gone", [])])
def test_a_checkpoint_of_several_nodes_is_there_once_all_have_put_their_part(
    line: Line, start: Callable[..., Uploads], tmp_path: Path, problem: str | None, there: list[int]
) -> None:
    others = Others(problem)
    uploads = start(others)
    saved(tmp_path, 1)
    for _ in range(2):
        line.fates.put("pass")
    uploads.add(1)
    uploads.finish(WAIT_SECONDS)
    assert steps(line) == there
    assert set(others.asked) == {1}


def test_nothing_more_of_a_checkpoint_is_sent_once_a_node_is_gone_without_whom_it_is_not_whole(
    line: Line, start: Callable[..., Uploads], tmp_path: Path
) -> None:
    others = Others(None)
    uploads = start(others)
    saved(tmp_path, 1)
    uploads.add(1)
    assert line.begun.get(timeout=WAIT_SECONDS) == 1
    others.is_lost = True
    for _ in range(2):
        line.fates.put("pass")
    uploads.finish(WAIT_SECONDS)
    assert objects(line) == []


def test_a_node_puts_its_own_part_and_fetches_what_it_needs(line: Line, tmp_path: Path) -> None:
    line.sign("here")
    folder = saved(tmp_path / "node" / "pretrained" / KEY, 1)
    manifest = read_manifest(folder)
    share = Share(line.store, tmp_path / "node", {"kind": "pretrained", "key": KEY, "sign": "here", "resume": None})
    for name in PARTS[1:]:
        (folder / name).unlink()
    assert share.send(1, manifest["files"], 0) is None
    found = [one.name.split("/")[-1] for one in line.bucket.objects(f"{line.folder}/checkpoint-1")]
    assert found == ["rank-0.safetensors"]
    assert "is no part of a checkpoint" in str(share.send(1, {"../x": manifest["files"]["progress.json"]}, 0))


def test_a_checkpoint_asked_for_twice_is_sent_twice_at_once(line: Line, tmp_path: Path) -> None:
    """As at the end, where node 0 has failed and tries again while another node still sends."""
    folder = saved(tmp_path, 1)
    with linked(tmp_path, 1) as first:
        with linked(tmp_path, 1) as second:
            assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()} >= set(PARTS)
        assert (first / PARTS[0]).read_bytes() == (folder / PARTS[0]).read_bytes()
    assert list(tmp_path.glob(f"{LINKS}*")) == []


def test_a_disk_that_is_full_is_told_of_with_its_node_and_what_to_do(line: Line, tmp_path: Path) -> None:
    line.fates.put("pass")
    line.sign("here")
    there, own = saved(tmp_path / "there", 1), tmp_path / "node" / "pretrained" / KEY / "checkpoint-1"
    line.put(there, 1, read_manifest(there)["files"], lambda amount: None)
    line.keep(read_manifest(there), b"")
    own.mkdir(parents=True)
    (own / f".{PARTS[0]}.fetched").symlink_to("/dev/full")  # takes nothing: ENOSPC
    place = {"kind": "pretrained", "key": KEY, "sign": "here", "resume": read_manifest(there)}
    share, plan = Share(line.store, tmp_path / "node", place), {"resume_from": "checkpoints/checkpoint-1", "facts": FACTS}
    said = rf"^{platform.node()}: {own}: No space left on device; make room there, or name another cache in SEQMILL_CACHE"
    with pytest.raises(StoreError, match=said):
        share.fetch(plan, range(2))


def test_a_checkpoint_that_is_asked_for_anew_is_not_sent_any_more_for_the_first_asking(line: Line, tmp_path: Path) -> None:
    line.sign("here")
    folder = saved(tmp_path / "node" / "pretrained" / KEY, 1)
    files = read_manifest(folder)["files"]
    share = Share(line.store, tmp_path / "node", {"kind": "pretrained", "key": KEY, "sign": "here", "resume": None})
    share.newest_ask = 2
    assert share.send(1, files, 1) == "checkpoint-1: broken off"
    assert share.send(1, files, 2) is None


def test_a_node_that_is_let_go_sends_nothing_more_and_says_why(line: Line, tmp_path: Path) -> None:
    line.sign("here")
    folder = saved(tmp_path / "node" / "pretrained" / KEY, 1)
    share = Share(line.store, tmp_path / "node", {"kind": "pretrained", "key": KEY, "sign": "here", "resume": None})
    share.end()
    assert share.send(1, read_manifest(folder)["files"], 0) == "checkpoint-1: broken off"
    assert objects(line) == ["sign"]
    assert "KeyError" in str(share.send(1, {PARTS[0]: {}}, 0))


def test_what_a_node_that_stays_has_of_an_earlier_training_goes(line: Line, tmp_path: Path) -> None:
    line.sign("here")
    earlier, now = (saved(tmp_path / "node" / "pretrained" / key, 1) for key in ("b" * 64, KEY))
    Share(line.store, tmp_path / "node", {"kind": "pretrained", "key": KEY, "sign": "here", "resume": None})
    assert (earlier.exists(), now.exists()) == (False, True)


def test_a_node_with_another_store_is_refused(line: Line, tmp_path: Path) -> None:
    line.sign("here")
    told = {"kind": "pretrained", "key": KEY, "sign": "here", "resume": None}
    with pytest.raises(SettingsError, match="give all nodes the same SEQMILL_STORE and SEQMILL_CHECKPOINTS"):
        Share(ArtifactStore(tmp_path), tmp_path, told)
    with pytest.raises(SettingsError, match="is not where the node that leads keeps checkpoints"):
        Share(SharedStore(f"file://{tmp_path}/other", tmp_path / "cache"), tmp_path, told)


def test_the_folder_of_a_process_goes_with_it_and_a_dead_ones_with_the_next(tmp_path: Path) -> None:
    with own_folder(tmp_path) as first:
        dead = first.with_name(f"{platform.node()}-1-0badcafe")
        dead.mkdir()
        (dead / "checkpoint-1").mkdir()
        dead.with_name(f"{dead.name}.lock").touch()
        with own_folder(tmp_path) as second:
            assert (first.exists(), second.exists(), dead.exists()) == (True, True, False)
    assert list((tmp_path / ".joined").iterdir()) == []


def test_a_host_whose_name_has_dots_or_begins_as_anothers_has_folders_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "node", lambda: "node-1.example.com")
    with own_folder(tmp_path) as first:
        assert first.with_name(f"{first.name}.lock").is_file()  # not one of all hosts of the domain, for which they would wait
        other = first.with_name("node-1.example.com-2-7-0badcafe")  # a host "node-1.example.com-2"
        other.mkdir()
        other.with_name(f"{other.name}.lock").touch()
        with own_folder(tmp_path):
            assert (first.exists(), other.exists()) == (True, True)


def test_a_try_waits_for_what_the_one_before_is_still_putting(
    line: Line, start: Callable[..., Uploads], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what the first puts late is taken for another run's, and the second keeps nothing any more."""
    is_written, goes_on = threading.Event(), threading.Event()
    write = RemoteCheckpoints._write

    def write_late(self: RemoteCheckpoints, kept: Any) -> None:
        is_written.set()
        assert goes_on.wait(WAIT_SECONDS)
        write(self, kept)

    monkeypatch.setattr(RemoteCheckpoints, "_write", write_late)
    saved(tmp_path, 1)
    first = start()
    line.fates.put("pass")
    first.add(1)
    assert is_written.wait(WAIT_SECONDS)
    first.end()
    again = RemoteCheckpoints(line.store, "pretrained", KEY)
    threading.Timer(0.2, goes_on.set).start()
    await_earlier(again)
    again.begin(1)
    manifest = read_manifest(saved(tmp_path, 2))
    again.put(tmp_path / "checkpoint-2", 2, manifest["files"], lambda amount: None)
    again.keep(manifest, b"")
    assert steps(again) == [2, 1]


def test_a_try_that_has_ended_puts_no_checkpoint_into_kept_json_any_more(
    line: Line, start: Callable[..., Uploads], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = start()
    confirm = line._confirm

    def end_first(new: Kept) -> None:
        confirm(new)
        uploads._is_ended = True

    monkeypatch.setattr(line, "_confirm", end_first)
    saved(tmp_path, 1)
    line.fates.put("pass")
    uploads.add(1)
    uploads.finish(WAIT_SECONDS)
    await_earlier(line)
    assert steps(line) == []


@pytest.mark.parametrize(("is_damaged", "left"), [(True, [1]), (False, [2, 1])])
def test_a_checkpoint_that_another_node_finds_damaged_is_dropped_where_it_is(
    tmp_path: Path, is_damaged: bool, left: list[int]
) -> None:
    """And not where one node's memory is: it would take one checkpoint after the other away."""
    remote, root = (
        RemoteCheckpoints(SharedStore(f"file://{tmp_path}/bucket", tmp_path / "cache"), "pretrained", KEY),
        tmp_path / "own",
    )
    for step in (1, 2):
        kept(remote, folder := saved(root, step))
    if is_damaged:
        damage(remote, folder, PARTS[1], b"others")
    plan: Any = SimpleNamespace(checkpoint_dir=str(root), resume_from=str(folder))
    metrics, party = SimpleNamespace(upto=lambda step: b""), SimpleNamespace(has_lost=lambda: False)
    said = (
        r"^checkpoint-2: damaged$" if is_damaged else r"^checkpoint-2: damaged, as node b reads it, and not as this one does; run"
    )
    with pytest.raises(DamagedError if is_damaged else WorkerError, match=said), uploading(remote, plan, metrics, party):  # type: ignore[arg-type]
        raise DamagedError("checkpoint-2: damaged", PARTS[1], "b")
    assert steps(remote) == left


def test_an_upload_ends_with_its_thread(start: Callable[..., Uploads]) -> None:
    start().end()
    for thread in threading.enumerate():
        if thread.name == "uploads":
            thread.join(WAIT_SECONDS)
    assert "uploads" not in {thread.name for thread in threading.enumerate()}
