"""`seqmill verify` on a small store: whole, and damaged in every way that a disk, or a person, damages one."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.verify import Verified, verify
from tasks.corpus.blocks import BlocksSpec, build_blocks
from tasks.corpus.documents import DocumentsSpec, build_documents
from tasks.corpus.tokenizer import TokenizerSpec, TokenizerTrainingSpec, build_tokenizer
from tasks.corpus.tokens import TokensSpec, build_tokens
from tasks.errors import RefError
from tasks.machine import Advance, Machine
from tasks.store import Artifact, ArtifactStore, Digest
from tests.corpus.conftest import PRACTICE, json_lines, store_archive


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store from archive to blocks, of several shards."""
    store, machine = ArtifactStore(tmp_path_factory.mktemp("whole")), Machine()
    archive = store_archive(store, json_lines([*PRACTICE, *PRACTICE[:3], ""]) + b"{bad\n")
    spec = DocumentsSpec(validation_fraction=0.2, shard_bytes=3_000, deduplicate=True, max_quarantined_fraction=0.1)
    documents = build_documents(store, machine, spec, archive=archive)
    tokenizer = build_tokenizer(store, machine, TokenizerSpec(train=TokenizerTrainingSpec(vocab_size=380)), documents=documents)
    tokens = build_tokens(store, machine, TokensSpec(), documents=documents, tokenizer=tokenizer)
    build_blocks(store, machine, BlocksSpec(block_size=16), tokens=tokens)
    return store.root


def rewritten(artifact: Artifact, **changes: Any) -> Artifact:
    """The artifact with another manifest."""
    manifest = artifact.manifest.model_copy(update=changes)
    (artifact.path / "manifest.json").write_text(json.dumps(manifest.model_dump(mode="json")))
    return Artifact(artifact.root, manifest, found=True)


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> ArtifactStore:
    """A copy to damage."""
    shutil.copytree(whole, tmp_path / "store")
    return ArtifactStore(tmp_path / "store")


def checked(store: ArtifactStore, *refs: str) -> Verified:
    return verify(store, refs, Machine(num_workers=2))


def told(store: ArtifactStore, *refs: str) -> dict[str, str]:
    """What is said of each damaged artifact, by its kind and the first of its digest."""
    return {problem.ref: problem.problem for problem in checked(store, *refs).problems}


def state(root: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*"))


def test_a_whole_store_has_no_problem_and_is_left_as_it_was(store: ArtifactStore) -> None:
    before = state(store.root)
    verified = checked(store)
    assert verified.problems == ()
    assert verified.missing_inputs == 0
    assert verified.num_artifacts == len(list(store.artifacts()))
    assert verified.num_bytes == sum(entry.num_bytes for found in store.artifacts() for entry in found.manifest.files)
    assert state(store.root) == before


def test_every_byte_is_told_to_the_bar(store: ArtifactStore) -> None:
    counted: list[int] = []

    @contextmanager
    def progress(label: str, total: int | None, unit: str) -> Iterator[Advance]:
        counted.append(-(total or 0))
        yield counted.append

    verify(store, [], Machine(num_workers=2, progress=progress))
    assert len(counted) > 10
    assert sum(counted) == 0


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("archive", "archive"), ("documents", "quarantine.parquet"), ("documents-shard", "documents.parquet"),
        ("tokenizer", "tokenizer.json"), ("tokens-shard", "tokens.arrow"), ("blocks-shard", "blocks.arrow"),
        ("blocks-shard", "tail.arrow"), ("blocks", "train-tail.arrow"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("damage", "said"),
    [(flip, "has the digest"), (cut, "bytes, its manifest says"), (Path.unlink, "is missing, its manifest says")],
)
def test_a_damaged_file_is_found_and_its_artifact_alone_named(
    store: ArtifactStore, kind: str, name: str, damage: Callable[[Path], None], said: str
) -> None:
    artifact = next(store.artifacts(kind))
    damage(artifact.file(name))
    (problem,) = checked(store).problems
    assert problem.ref == artifact.ref
    assert problem.problem.startswith(name)
    assert said in problem.problem
    assert problem.remedy == f"delete {artifact.path} and run its recipe again"


def test_a_lost_shard_is_said_of_what_lists_it(store: ArtifactStore) -> None:
    documents = store.resolve("documents")
    entry = next(documents.shards())
    shutil.rmtree(store.root / entry.kind / entry.key)
    assert told(store) == {documents.ref: f"shard train/00000 (documents-shard/{entry.key[:12]}) is missing"}


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{")])
def test_a_lost_manifest_is_found(store: ArtifactStore, damage: Callable[[Path], None]) -> None:
    blocks = store.resolve("blocks")
    damage(blocks.path / "manifest.json")
    assert told(store) == {blocks.ref: "manifest.json is missing, cannot be read, or is that of another artifact"}


def test_a_manifest_in_anothers_folder_is_found(store: ArtifactStore) -> None:
    blocks = store.resolve("blocks")
    moved = blocks.path.with_name("f" * 64)
    blocks.path.rename(moved)
    assert told(store) == {f"blocks/{moved.name}": "manifest.json is missing, cannot be read, or is that of another artifact"}


def test_a_manifest_that_contradicts_itself_is_found(store: ArtifactStore) -> None:
    blocks, tokens = store.resolve("blocks"), store.resolve("tokens")
    rewritten(blocks, identity={**blocks.manifest.identity, "revision": 9})
    rewritten(tokens, content=Digest("f" * 64))
    assert told(store) == {
        blocks.ref: "its manifest's key is not the digest of its identity",
        tokens.ref: "its manifest's content is not the digest of its files and shards",
    }


def test_counts_that_do_not_add_up_are_found(store: ArtifactStore) -> None:
    documents = store.resolve("documents")
    rewritten(documents, stats={**documents.stats, "num_blank": 5})
    (said,) = told(store).values()
    assert said.startswith("num_lines is 45, num_documents + ")


def test_counts_that_the_files_contradict_are_found_in_the_shard_and_in_what_lists_it(store: ArtifactStore) -> None:
    documents = store.resolve("documents")
    shard = next(found for found in store.artifacts("documents-shard") if found.key == next(documents.shards()).key)
    rewritten(shard, stats={**shard.stats, "num_characters": 7})
    said = told(store)
    assert said[shard.ref] == f"num_characters is 7 in its manifest and {shard.stats['num_characters']} in its files"
    assert said[documents.ref] == f"shard train/00000 ({shard.kind}/{shard.key[:12]}) counts otherwise than the list says"


def test_quarantined_lines_are_counted_against_their_file(store: ArtifactStore) -> None:
    documents = store.resolve("documents")
    more = {"num_quarantined": documents.stats["num_quarantined"] + 1, "num_lines": documents.stats["num_lines"] + 1}
    rewritten(documents, stats={**documents.stats, **more})
    assert told(store) == {documents.ref: "num_quarantined is 2 in its manifest and 1 in its files"}


def test_a_file_that_no_manifest_names_is_said_to_be_deleted_alone(store: ArtifactStore) -> None:
    tokenizer = store.resolve("tokenizer")
    (tokenizer.path / "added_tokens.json").write_text("{}")
    (problem,) = checked(store).problems
    assert (problem.problem, problem.remedy) == ("added_tokens.json not in its manifest", "delete what is not")


def test_a_reference_restricts_the_check_to_what_it_stands_on(store: ArtifactStore) -> None:
    flip(store.resolve("tokens-shard").file("tokens.arrow"))
    assert told(store, "documents") == {}
    assert len(told(store, "tokens")) == len(told(store, "blocks")) == len(told(store, "documents", "blocks")) == 1
    flip(store.resolve("archive").file("archive"))
    assert len(told(store, "blocks")) == 2
    with pytest.raises(RefError, match="no such artifact"):
        checked(store, "nothing")


def test_an_input_that_the_store_no_longer_holds_is_counted_and_no_damage(store: ArtifactStore) -> None:
    shutil.rmtree(store.resolve("archive").path)
    verified = checked(store)
    assert (verified.problems, verified.missing_inputs) == ((), 1)
    assert verified.summary().endswith("; 1 inputs are no longer in the store")


def test_an_input_of_another_key_and_the_same_content_will_do(store: ArtifactStore) -> None:
    tokens = store.resolve("tokens")
    rewritten(tokens, produced_by={"inputs": {}})
    assert checked(store).missing_inputs == 0


def seqmill(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_the_command_ends_with_0_and_one_line_or_with_1_and_a_line_for_each_that_is_damaged(store: ArtifactStore) -> None:
    code, text = seqmill("verify", "--store", str(store.root))
    assert (code, text.count("\n")) == (0, 1)
    assert ", none damaged, " in text
    blocks = store.resolve("blocks")
    cut(blocks.file("train-tail.arrow"))
    code, text = seqmill("verify", "--all", "--store", str(store.root))
    first, last = text.splitlines()
    assert code == 1
    assert first.startswith(f"damaged blocks/{blocks.key[:12]}: train-tail.arrow is ")
    assert first.endswith(f"; delete {blocks.path} and run its recipe again")
    assert ", 1 damaged, " in last


def test_the_command_prints_json(store: ArtifactStore) -> None:
    cut(store.resolve("blocks").file("train-tail.arrow"))
    code, text = seqmill("verify", "blocks", "--json", "--store", str(store.root))
    said = json.loads(text)
    assert code == 1
    assert list(said) == ["num_artifacts", "num_bytes", "seconds", "missing_inputs", "problems"]
    assert list(said["problems"][0]) == ["ref", "path", "problem", "remedy"]


def test_an_empty_store_has_nothing_damaged(tmp_path: Path) -> None:
    code, text = seqmill("verify", "--store", str(tmp_path / "none"))
    assert (code, text) == (0, f"{tmp_path / 'none'}: 0 artifacts, none damaged, 0 B in 0.0 s\n")
    assert not (tmp_path / "none").exists()
