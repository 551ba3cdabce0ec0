"""An archive read in ranges makes the artifact that one reader makes, whatever lies where the ranges meet."""

import bz2
import os
import random
from collections.abc import Callable, Sequence
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.corpus import bzip2, documents, many_readers
from tasks.corpus.bzip2 import MOST_BLOCK_BYTES, RangeError, check_chain, decode_range, find_marks
from tasks.corpus.documents import DocumentsSpec, build_documents
from tasks.errors import CorpusError
from tasks.machine import Advance, Machine
from tasks.store import Artifact, ArtifactStore

from .archives import tar_of_one
from .conftest import json_lines, store_archive

CHARACTERS = random.Random(5)


def text(number: int) -> str:
    """Some 100 characters that hardly compress."""
    return f"{number}: " + "".join(chr(0x4E00 + CHARACTERS.randrange(15_000)) for _ in range(CHARACTERS.randrange(40, 160)))


TEXTS = [text(number) for number in range(2_400)]
LINES = json_lines(TEXTS)  # 700 kB: 7 blocks of 100 kB


class HereInstead:
    """In the place of a cluster; counts what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def run(self, function: Callable[[Any], Any], items: Sequence[Any], label: str, advance: Advance) -> list[Any]:
        self.asked.append(label)
        return [function(item) for item in items]


def by_many(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch, num_ranges: int = 4, **fields: Any) -> Artifact:
    """The documents as a cluster makes them; fails where it left them to one reader."""
    size = -(-len(data) // num_ranges)
    monkeypatch.setattr(many_readers, "RANGE_BYTES", size)
    monkeypatch.setattr(many_readers, "PLAIN_RANGE_BYTES", size)
    cluster, store = HereInstead(), ArtifactStore(tmp_path / "many")
    built = build_documents(store, Machine(cluster=cluster), spec_of(**fields), archive=store_archive(store, data))
    assert cluster.asked == ["ranges", "documents"]
    return built


def by_one(tmp_path: Path, data: bytes, **fields: Any) -> Artifact:
    store = ArtifactStore(tmp_path / "one")
    return build_documents(store, Machine(), spec_of(**fields), archive=store_archive(store, data))


def spec_of(**fields: Any) -> DocumentsSpec:
    return DocumentsSpec(**{"shard_bytes": 200_000, "validation_fraction": 0.1, **fields})


def told(artifact: Artifact) -> tuple[str, str, dict[str, Any]]:
    return artifact.key, artifact.content, artifact.stats


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(bz2.compress(tar_of_one(LINES), 1), id="bz2 of a tar"),
        pytest.param(bz2.compress(LINES, 1), id="bz2", marks=pytest.mark.slow),
        pytest.param(tar_of_one(LINES), id="tar", marks=pytest.mark.slow),
        pytest.param(LINES, id="plain", marks=pytest.mark.slow),
    ],
)
def test_ranges_make_what_one_reader_makes(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(by_many(tmp_path, data, monkeypatch)) == told(by_one(tmp_path, data))


def test_bad_blank_filtered_and_repeated_lines_are_where_one_reader_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = LINES.split(b"\n")[:-1]
    shuffled = random.Random(3)
    for place in sorted(shuffled.sample(range(len(lines)), 200), reverse=True):
        lines.insert(place, shuffled.choice([b'{"text": ', b"", b"\xff", b"[1]", lines[0], lines[100], b'{"text": "short"}']))
    data = bz2.compress(b"\xef\xbb\xbf" + b"\n".join(lines), 1)  # no line end behind the last
    fields = {"deduplicate": True, "min_characters": 20, "max_quarantined_fraction": 0.5}
    many = by_many(tmp_path, data, monkeypatch, 5, **fields)
    assert told(many) == told(by_one(tmp_path, data, **fields))
    assert all(many.stats[f"num_{name}"] for name in ("quarantined", "blank", "filtered", "duplicates"))


def test_too_many_bad_lines_fail_at_the_line_at_which_one_reader_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = LINES.split(b"\n")
    data = bz2.compress(b"\n".join([*lines[:1_500], *[b"bad"] * 60, *lines[1_500:]]), 1)
    with pytest.raises(CorpusError, match="lines read are bad") as one:
        by_one(tmp_path, data)
    with pytest.raises(CorpusError) as many:
        by_many(tmp_path, data, monkeypatch)
    assert str(many.value).split(": ", 1)[1] == str(one.value).split(": ", 1)[1]


@pytest.mark.slow
def test_streams_end_to_end_are_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    third = len(LINES) // 3
    data = b"".join(bz2.compress(LINES[start : start + third], 1) for start in range(0, len(LINES), third)) + bz2.compress(b"")
    assert told(by_many(tmp_path, data, monkeypatch)) == told(by_one(tmp_path, data))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flipped", "followed"])
def test_what_is_damaged_is_left_to_one_reader_who_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    whole = bz2.compress(LINES, 1)
    middle = len(whole) // 2
    data = {
        "cut": whole[:-20],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "followed": whole + b"something else",
    }[damage]
    with pytest.raises(CorpusError, match="fetch the archive again"):
        by_many(tmp_path, data, monkeypatch)


@pytest.mark.parametrize(
    ("data", "fields"),
    [
        (bz2.compress(orjson.dumps([{"text": one} for one in TEXTS]), 1), {}),
        (LINES, {"max_documents": 100}),
        (bz2.compress(json_lines(TEXTS[:50]), 1), {}),
    ],
    ids=["an array", "a first part", "small"],
)
def test_what_only_one_reader_can_read_is_left_to_it(tmp_path: Path, data: bytes, fields: dict[str, Any]) -> None:
    cluster, store = HereInstead(), ArtifactStore(tmp_path)
    built = build_documents(store, Machine(cluster=cluster), spec_of(**fields), archive=store_archive(store, data))
    assert (cluster.asked, built.kind) == ([], "documents")


def test_a_mark_by_chance_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bz2.compress(LINES, 1)
    true = list(find_marks(data))
    chance = (true[3][0] + true[4][0]) // 16  # a byte in the middle of a block
    for start, size in ((0, len(data)), (0, chance), (chance, len(data) - chance)):
        found = sorted([*find_marks(data[start:]), (8 * (chance - start), True)] if chance >= start else find_marks(data[start:]))
        monkeypatch.setattr(bzip2, "find_marks", lambda some, found=found: iter(found))
        decoded, pieces = decode_range(data[start:], start, size)
        assert [piece.start for piece in pieces] == [bit for bit, _ in true if 8 * start <= bit < 8 * (start + size)]
        assert decoded in LINES


def test_blocks_in_a_row_are_decoded_together_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bz2.compress(LINES, 1)
    together = decode_range(data, 0, len(data))
    assert together[0] == LINES
    with monkeypatch.context() as patch:
        patch.setattr(bzip2, "_decode_run", lambda some, bits: None)
        assert decode_range(data, 0, len(data)) == together
    monkeypatch.setattr(bzip2, "_decode_block", lambda some, first, last: pytest.fail("a block was decoded alone"))
    assert decode_range(data, 0, len(data)) == together


def test_a_range_that_is_missing_is_seen() -> None:
    data = bz2.compress(LINES, 1)
    _, pieces = decode_range(data, 0, len(data))
    with pytest.raises(RangeError, match="a block is missing near byte"):
        check_chain(pieces[:4] + pieces[5:], len(data))
    with pytest.raises(RangeError, match="truncated"):
        check_chain(pieces[:-1], len(data))


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 20), st.sampled_from([1, 9]))
def test_ranges_of_any_size_decode_to_the_whole(num_ranges: int, level: int) -> None:
    data = COMPRESSED[level]
    size = -(-len(data) // num_ranges)
    decoded, pieces = [], []
    for start in range(0, len(data), size):
        some, more = decode_range(data[start : start + size + MOST_BLOCK_BYTES], start, min(size, len(data) - start))
        decoded.append(some)
        pieces += more
    assert b"".join(decoded) == LINES[:200_000]
    check_chain(pieces, len(data))


COMPRESSED = {level: bz2.compress(LINES[:200_000], level) for level in (1, 9)}


def in_four_ranges(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(many_readers, "RANGE_BYTES", -(-len(data) // 4))


def no_copies(store: ArtifactStore) -> bool:
    return not list(store.root.rglob("range*"))


def open_copies(*processes: int) -> list[str]:
    """Files of ranges that processes hold open: a file server (NFS) keeps the folder of such a file from being removed."""
    links = [link for process in processes for link in Path(f"/proc/{process}/fd").glob("*") if link.is_symlink()]
    return [path for link in links if "/.scratch/ranges/" in (path := os.readlink(link))]


def test_processes_of_this_machine_read_ranges_and_leave_no_copy_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, store = bz2.compress(LINES, 1), ArtifactStore(tmp_path / "many")
    in_four_ranges(monkeypatch, data)
    asked: list[str] = []
    monkeypatch.setattr(Machine, "run_in_pool", counted(asked, Machine.run_in_pool))
    machine = Machine(num_workers=2, pool="processes")
    many = build_documents(store, machine, spec_of(), archive=store_archive(store, data))
    assert asked == ["ranges", "documents"]
    assert told(many) == told(by_one(tmp_path, data))
    assert no_copies(store)
    assert open_copies(os.getpid(), *(worker.pid or 0 for worker in active_children())) == []


def counted(asked: list[str], run: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def run_and_count(machine: Machine, function: Any, items: Sequence[Any], label: str, *rest: Any) -> list[Any]:
        asked.append(label)
        return run(machine, function, items, label, *rest)

    return run_and_count


class Here(Machine):
    """A machine whose pool of processes is this process."""

    def run_in_pool(
        self, function: Callable[[Any], Any], items: Sequence[Any], label: str, advance: Advance = lambda amount: None
    ) -> list[Any]:
        return [function(item) for item in items]


def test_a_build_that_was_cut_off_behind_its_ranges_reads_none_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, store = bz2.compress(LINES, 1), ArtifactStore(tmp_path / "many")
    archive, machine = store_archive(store, data), Here(num_workers=2, pool="processes")
    in_four_ranges(monkeypatch, data)
    with monkeypatch.context() as cut:
        cut.setattr(many_readers, "write_in_pool", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_documents(store, machine, spec_of(), archive=archive)
    with monkeypatch.context() as unread:
        unread.setattr(many_readers, "read_in_pool", interrupt)
        again = build_documents(store, machine, spec_of(), archive=archive)
    assert told(again) == told(by_one(tmp_path, data))
    assert no_copies(store)
    assert open_copies(os.getpid()) == []


def interrupt(item: object) -> Artifact:
    raise KeyboardInterrupt


def test_ranges_that_do_not_fit_together_are_gone_while_one_reader_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, store = bz2.compress(LINES, 1), ArtifactStore(tmp_path / "many")
    archive, machine = store_archive(store, data), Here(num_workers=2, pool="processes")
    in_four_ranges(monkeypatch, data)

    def refuse(*_: object) -> None:
        assert not no_copies(store)
        raise RangeError("a block is missing")

    seen: list[bool] = []
    monkeypatch.setattr(many_readers, "check_chain", refuse)
    read = documents.read_batches
    monkeypatch.setattr(documents, "read_batches", lambda *given: (seen.append(no_copies(store)), read(*given))[1])
    one = build_documents(store, machine, spec_of(), archive=archive)
    assert seen == [True]
    assert told(one) == told(by_one(tmp_path, data))
