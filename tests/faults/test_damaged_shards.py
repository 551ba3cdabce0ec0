"""A shard that is not what its manifest says is seen, set aside and built again; the other shards stay as they are."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Digest
from tests.faults.corpus import Sources, build_all
from tests.faults.harness import Unbroken, contents, damaged, finished, rebuilt

LISTS = {"documents-shard": "documents", "tokens-shard": "tokens", "blocks-shard": "blocks"}
FILES = {"documents-shard": "documents.parquet", "tokens-shard": "tokens.arrow", "blocks-shard": "blocks.arrow"}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def remove(file: Path) -> None:
    file.unlink()


def remove_manifest(file: Path) -> None:
    (file.parent / "manifest.json").unlink()


def spoil_manifest(file: Path) -> None:
    (file.parent / "manifest.json").write_bytes(b'{"kind": \x00')


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def middle_shard(store: ArtifactStore, kind: str) -> Artifact:
    """A shard from the middle of its list."""
    listed = list(next(store.artifacts(LISTS[kind])).shards())
    found = store.load(kind, listed[len(listed) // 2].key)
    assert found
    return found


@pytest.mark.parametrize("damage", [cut, remove, remove_manifest, spoil_manifest])
@pytest.mark.parametrize("kind", LISTS)
def test_a_damaged_shard_alone_is_set_aside_and_built_again(
    kind: str, damage: Callable[[Path], None], store: ArtifactStore, sources: Sources, unbroken: Unbroken
) -> None:
    shard, before = middle_shard(store, kind), finished(store.root)
    damage(shard.file(FILES[kind]))
    assert store.find(kind, shard.key) is None
    build_all(store, Machine(), sources)
    parent = next(store.artifacts(LISTS[kind]))
    assert rebuilt(before, finished(store.root)) == sorted([shard.ref, parent.ref])  # what lists a lost shard is not whole
    assert [path.name[:-20] for path in sorted((store.root / ".damaged").iterdir())] == sorted(
        one.ref.replace("/", "-") for one in (shard, parent)
    )
    assert contents(store.root) == unbroken.contents
    assert damaged(store.root) == []


@pytest.mark.parametrize("kind", LISTS)
def test_a_flipped_bit_is_seen_by_digests_and_mended_once_set_aside(
    kind: str, store: ArtifactStore, sources: Sources, unbroken: Unbroken
) -> None:
    shard, before = middle_shard(store, kind), finished(store.root)
    flip_bit(shard.file(FILES[kind]))
    assert store.find(kind, shard.key)
    problem = store.damage(shard, digests=True)
    assert problem
    assert re.fullmatch(rf"{FILES[kind]} has the digest [0-9a-f]{{12}}, its manifest says [0-9a-f]{{12}}", problem)
    assert len(damaged(store.root)) == 2  # the shard, and the artifact that lists it
    with store.lock(kind, Digest(shard.key)):
        store.set_aside(kind, Digest(shard.key), problem)
    build_all(store, Machine(), sources)
    assert len(rebuilt(before, finished(store.root))) == 2
    assert contents(store.root) == unbroken.contents
    assert damaged(store.root) == []
