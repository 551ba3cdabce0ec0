"""The bytes of shards are the documents' alone: whatever the workers and batches; and a change rebuilds what it touches."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tasks.corpus import reader, tokens
from tasks.corpus.archive import ArchiveSpec, build_archive
from tasks.corpus.blocks import BlocksSpec, build_blocks
from tasks.corpus.documents import DocumentsSpec, build_documents
from tasks.corpus.tokens import TokensSpec, build_tokens
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore

from .conftest import json_lines

STAGES = ("documents", "tokens", "blocks")


def corpus(num_documents: int) -> list[str]:
    random = Random(11)
    return [f"{i}：" + "天地玄黄宇宙洪荒"[i % 8] * random.randint(1, 60) + f" lesson {i}\n" for i in range(num_documents)]


def build(
    store: ArtifactStore, path: Path, tokenizer: Artifact, machine: Machine, shard_bytes: int = 6_000
) -> dict[str, Artifact]:
    archive = build_archive(store, machine, ArchiveSpec(url=str(path)))
    spec = DocumentsSpec(shard_bytes=shard_bytes, validation_fraction=0.05)
    documents = build_documents(store, machine, spec, archive=archive)
    ids = build_tokens(store, machine, TokensSpec(), documents=documents, tokenizer=tokenizer)
    return {"documents": documents, "tokens": ids, "blocks": build_blocks(store, machine, BlocksSpec(block_size=64), tokens=ids)}


def bytes_of(store: ArtifactStore, built: dict[str, Artifact]) -> dict[str, bytes]:
    """Every file below the built artifacts and their shards, by its path in the store; manifests tell when, and are left out."""
    folders = [artifact.path for artifact in built.values()]
    folders += [store.root / entry.kind / entry.key for artifact in built.values() for entry in artifact.shards()]
    paths = [path for folder in folders for path in folder.iterdir() if path.name != "manifest.json"]
    return {str(path.relative_to(store.root)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def by_one_worker(tmp_path_factory: pytest.TempPathFactory, trained: Artifact) -> tuple[ArtifactStore, dict[str, Artifact]]:
    """600 documents, built by one worker."""
    folder = tmp_path_factory.mktemp("by-one-worker")
    (folder / "corpus.jsonl").write_bytes(json_lines(corpus(600)))
    store = ArtifactStore(folder / "store")
    return store, build(store, folder / "corpus.jsonl", trained, Machine())


@pytest.mark.parametrize(
    "machine",
    [Machine(num_workers=number) for number in (1, 2, 4, 7)] + [Machine(num_workers=2, pool="processes")],
    ids=["1 worker", "2 workers", "4 workers", "7 workers", "2 processes"],
)
def test_keys_and_bytes_are_the_same_for_any_workers_and_batches(
    tmp_path: Path,
    trained: Artifact,
    by_one_worker: tuple[ArtifactStore, dict[str, Artifact]],
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(json_lines(corpus(600)))
    other, (store, expected) = ArtifactStore(tmp_path / "other"), by_one_worker
    monkeypatch.setattr(reader, "BLOCK_BYTES", 777 * machine.num_workers)
    monkeypatch.setattr(tokens, "BATCH_DOCUMENTS", 3 * machine.num_workers)
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 1_000)
    found = build(other, path, trained, machine)
    assert {name: (artifact.key, artifact.content) for name, artifact in found.items()} == {
        name: (artifact.key, artifact.content) for name, artifact in expected.items()
    }
    assert bytes_of(other, found) == bytes_of(store, expected)
    assert len(list(found["blocks"].shards())) > 10


def shard_keys(built: dict[str, Artifact]) -> dict[str, set[str]]:
    return {name: {entry.key for entry in built[name].shards()} for name in STAGES}


NUM_DOCUMENTS = 3_000


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory, trained: Artifact) -> tuple[Path, dict[str, set[str]]]:
    """A store of all documents, and the keys of its shards; tests work on copies."""
    folder = tmp_path_factory.mktemp("unchanged")
    (folder / "corpus.jsonl").write_bytes(json_lines(corpus(NUM_DOCUMENTS)))
    return folder / "store", shard_keys(build(ArtifactStore(folder / "store"), folder / "corpus.jsonl", trained, Machine()))


CHANGES: dict[str, tuple[Callable[[list[str]], list[str]], int, float]] = {
    # what is done, at how many places, the share of the documents that is new
    "append 1%": (lambda texts: [*texts, *(f"appended {i}" * 9 for i in range(NUM_DOCUMENTS // 100))], 1, 0.01),
    "insert ten": (lambda texts: [*texts[:1_500], *(f"inserted {i}" * 9 for i in range(10)), *texts[1_500:]], 1, 10 / 3_000),
    "delete ten": (lambda texts: [*texts[:1_500], *texts[1_510:]], 1, 0.0),
    "delete ten apart": (lambda texts: [text for i, text in enumerate(texts) if i % 300 != 150], 10, 0.0),
    "change one": (lambda texts: [*texts[:1_500], texts[1_500] + "!", *texts[1_501:]], 1, 1 / 3_000),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_rebuilds_the_shards_that_it_touches_and_no_other(
    tmp_path: Path, trained: Artifact, unchanged: tuple[Path, dict[str, set[str]]], name: str
) -> None:
    change, num_places, share = CHANGES[name]
    root, before = unchanged
    store, path = ArtifactStore(shutil.copytree(root, tmp_path / "store")), tmp_path / "corpus.jsonl"
    written = {manifest: manifest.stat().st_mtime_ns for manifest in store.root.glob("*-shard/*/manifest.json")}
    path.write_bytes(json_lines(change(corpus(NUM_DOCUMENTS))))
    after = shard_keys(build(store, path, trained, Machine()))
    assert len(before["documents"]) > 50
    # Of either split a shard a place, and one beside it where the boundary between the two moved.
    most = round(share * len(before["documents"])) + 3 * num_places
    for stage in STAGES:
        rebuilt = len(after[stage] - before[stage])
        assert 1 <= rebuilt <= most, f"{stage}: {rebuilt} of {len(after[stage])} shards"
    assert all(manifest.stat().st_mtime_ns == when for manifest, when in written.items())


def test_the_same_bytes_under_another_name_and_date_rebuild_nothing(tmp_path: Path, trained: Artifact) -> None:
    store, path = ArtifactStore(tmp_path / "store"), tmp_path / "corpus.jsonl"
    path.write_bytes(json_lines(corpus(200)))
    first = build(store, path, trained, Machine())
    moved = path.rename(tmp_path / "another.jsonl")
    os.utime(moved, (1, 1))
    again = build(store, moved, trained, Machine())
    assert all(artifact.found for artifact in again.values())
    assert {name: artifact.key for name, artifact in again.items()} == {name: artifact.key for name, artifact in first.items()}
