"""explain, lineage, diff, card, provenance, pin and gc, as commands on a small store from archive to blocks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.croissant import COLUMNS, croissant
from flows.dag import ending_with, nodes_of
from flows.recipe import load_recipe
from tasks.errors import UserError
from tasks.machine import Machine
from tasks.schemas import DOCUMENTS, TOKENS, blocks_schema, examples_schema
from tasks.store import Artifact, ArtifactStore
from tasks.store.lease import end_lease
from tasks.store.pins import recorded_run
from tests.flows.conftest import MINIMAL
from tests.flows.test_plan import TEXT

CHANGED = {"documents.min_characters": 7}


def built(folder: Path, store: ArtifactStore, overrides: dict[str, Any] | None = None) -> dict[str, Artifact]:
    """Archive to blocks, recorded as a run."""
    artifacts: dict[str, Artifact] = {}
    recipe = load_recipe(str(folder / "minimal.yaml"), {"archive.url": str(folder / "corpus.jsonl"), **(overrides or {})})
    with recorded_run(store.notes, recipe.name, ["blocks"], overrides) as record:
        for node in ending_with(nodes_of(recipe), ["blocks"]):
            inputs = {name: artifacts[source] for name, source in node.inputs.items()}
            artifacts[node.name] = node.stage(store, replace(Machine(), recipe=recipe.name), node.spec, **inputs)
            record(node.name, artifacts[node.name].ref)
    return artifacts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lineage")
    (folder / "minimal.yaml").write_text(MINIMAL)
    (folder / "corpus.jsonl").write_text(TEXT)
    store = ArtifactStore(folder / "store")
    built(folder, store, CHANGED)
    built(folder, store)
    end_lease(store.root)
    return folder


@pytest.fixture
def store(folder: Path) -> ArtifactStore:
    return ArtifactStore(folder / "store")


def told(store: ArtifactStore, *arguments: str) -> Any:
    """What a command prints, as JSON where it is."""
    result = CliRunner().invoke(app, [*arguments, "--store", str(store.root)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in arguments or arguments[0] == "provenance" else result.stdout


def pair(store: ArtifactStore, kind: str) -> tuple[Artifact, Artifact]:
    """The artifact of the recipe as changed, and as it is."""
    first, second = store.artifacts(kind)
    is_first = first.manifest.produced_by["reason"].startswith("no ")
    return (first, second) if is_first else (second, first)


def test_explain_tells_the_reason_that_was_stored(store: ArtifactStore) -> None:
    before, after = pair(store, "documents")
    explained = told(store, "explain", after.ref, "--json")
    assert (explained["reason"], explained["nearest"]) == ("spec.min_characters 7 -> absent", before.ref)
    assert (explained["is_stored"], explained["recipe"]) == (True, "minimal")
    assert "built because spec.min_characters 7 -> absent" in told(store, "explain", after.ref)
    tokens = pair(store, "tokens")[1]
    assert told(store, "explain", tokens.ref, "--json")["reason"].endswith("because documents.min_characters 7 -> absent")


def test_of_a_manifest_that_has_no_reason_the_store_as_it_is_tells_one(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "store", tmp_path / "store")
    store = ArtifactStore(tmp_path / "store")
    after = pair(store, "documents")[1]
    manifest = json.loads((after.path / "manifest.json").read_text())
    del manifest["produced_by"]["reason"]
    (after.path / "manifest.json").write_text(json.dumps({**manifest, "created": "9999"}))
    explained = told(store, "explain", after.ref, "--json")
    assert (explained["reason"], explained["is_stored"]) == ("spec.min_characters 7 -> absent", False)
    shard = store.resolve("documents-shard")
    assert "a shard is built where" in told(store, "explain", shard.ref, "--json")["reason"]


def test_lineage_is_the_tree_down_to_the_archive_with_digests_recipe_and_host(store: ArtifactStore) -> None:
    blocks = pair(store, "blocks")[1]
    tree = told(store, "lineage", blocks.ref, "--json")
    (tokens,) = tree["inputs"]
    documents, tokenizer = tokens["inputs"]
    (archive,) = documents["inputs"]
    assert [line["name"] for line in (tree, tokens, documents, tokenizer, archive)] == [
        "blocks", "tokens", "documents", "tokenizer", "archive",
    ]  # fmt: skip
    assert (tree["content"], tree["recipe"]) == (blocks.content, "minimal")
    assert {"host", "packages", "commit", "is_dirty", "python", "created"} <= set(archive)
    assert archive["source"].startswith("sha256:")
    assert tokenizer["inputs"] == [
        {"name": "documents", "ref": documents["ref"], "content": documents["content"], "in_store": True}
    ]  # told above
    lines = told(store, "lineage", blocks.ref).splitlines()
    assert lines[0].startswith(f"blocks: blocks/{blocks.key[:12]}, content {blocks.content[:12]}, built ")
    assert lines[2].startswith("    documents: documents/")
    assert lines[-1].endswith("(above)")


def test_what_the_store_lost_is_said_to_be_gone(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "store", tmp_path / "store")
    store = ArtifactStore(tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "archive")
    assert "no longer in the store" in told(store, "lineage", pair(store, "documents")[1].ref)


def test_diff_names_fields_causes_counts_and_shards(store: ArtifactStore) -> None:
    before, after = pair(store, "documents")
    difference = told(store, "diff", before.ref, after.ref, "--json")
    assert difference["identity"] == ["spec.min_characters 7 -> absent"]
    assert "num_documents 40 -> 80" in difference["stats"]
    assert difference["shards"]["num_same"] == 0
    assert difference["shards"]["num_added"] >= 1
    assert not difference["same_content"]
    first, second = (artifact.ref for artifact in pair(store, "tokens"))
    assert "documents.min_characters 7 -> absent" in told(store, "diff", first, second, "--json")["because"]
    same = told(store, "diff", after.ref, after.ref)
    assert "the same content" in same
    assert "0 removed" in same


def test_provenance_is_an_in_toto_statement_with_every_files_digest(store: ArtifactStore) -> None:
    tokens = pair(store, "tokens")[1]
    statement = told(store, "provenance", tokens.ref)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    digests = {
        file.digest for entry in tokens.shards() if (shard := store.load(entry.kind, entry.key)) for file in shard.manifest.files
    }
    assert {subject["digest"]["sha256"] for subject in statement["subject"]} == digests
    definition, details = (statement["predicate"][name] for name in ("buildDefinition", "runDetails"))
    dependencies = {dependency["name"]: dependency for dependency in definition["resolvedDependencies"]}
    assert dependencies["documents"]["digest"] == {"seqmillContent": tokens.manifest.identity["inputs"]["documents"]}
    assert definition["externalParameters"]["spec"] == tokens.spec
    # https://github.com/in-toto/attestation: a resource has a uri, a digest or a content.
    assert all("uri" in resource or "digest" in resource for resource in [*dependencies.values(), *details["byproducts"]])
    archive = told(store, "provenance", store.resolve("archive").ref)
    source = archive["predicate"]["buildDefinition"]["resolvedDependencies"][0]
    assert source["digest"]["sha256"] == store.resolve("archive").stats["sha256"]


@pytest.mark.parametrize("kind", ["archive", "documents", "tokenizer", "tokens", "blocks"])
def test_a_croissant_card_names_every_file_by_digest_and_its_sets_hold_together(store: ArtifactStore, kind: str) -> None:
    artifact = list(store.artifacts(kind))[-1]
    card = croissant(store, artifact, terms="https://www.apache.org/licenses/LICENSE-2.0")
    assert card["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    objects = {found["@id"]: found for found in card["distribution"] if found["@type"] == "cr:FileObject"}
    sets = {found["@id"]: found for found in card["distribution"] if found["@type"] == "cr:FileSet"}
    for found in objects.values():
        assert (store.root / found["contentUrl"]).is_file()
        assert len(found["sha256"]) == 64
    paths = {found["contentUrl"] for found in objects.values()}
    assert all(path in paths for found in sets.values() for path in found["includes"])
    fields = [field for records in card["recordSet"] for field in records["field"]]
    assert all(field["source"]["fileSet"]["@id"] in sets for field in fields)
    assert {field["name"] for field in fields} == {name for name, *_ in COLUMNS.get(kind, ())}
    assert card["license"].endswith("LICENSE-2.0")


def test_a_croissant_card_is_one_by_the_rules_of_mlcommons(store: ArtifactStore, tmp_path: Path) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")  # not among the project's packages: it asks for 20 more
    for kind in ("archive", "documents", "tokenizer", "tokens", "blocks"):
        card = croissant(store, list(store.artifacts(kind))[-1])
        assert not mlcroissant.Dataset(jsonld=card).metadata.issues.errors


def test_the_columns_of_a_card_are_those_of_the_files() -> None:
    columns = {kind: [name for name, *_ in told] for kind, told in COLUMNS.items()}
    assert columns["documents"] == DOCUMENTS.names
    assert columns["tokens"] == TOKENS.names
    assert columns["blocks"] == blocks_schema(8).names
    assert set(columns["examples"]) <= set(examples_schema(8).names)


def test_what_is_no_part_of_the_corpus_has_no_croissant_card(store: ArtifactStore) -> None:
    blocks = store.resolve("blocks")
    report = replace(blocks, manifest=blocks.manifest.model_copy(update={"kind": "report"}))
    with pytest.raises(UserError, match="a report is no part of the corpus"):
        croissant(store, report)


def test_a_card_is_written_where_it_is_asked_for(store: ArtifactStore, tmp_path: Path) -> None:
    documents = pair(store, "documents")[1]
    told(store, "card", documents.ref, "--out", str(tmp_path / "cards"))
    (path,) = (tmp_path / "cards").iterdir()
    assert path.name == f"documents-{documents.key[:12]}-croissant.json"
    assert json.loads(path.read_text())["identifier"] == documents.ref


def test_pins_and_gc_as_commands(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "store", tmp_path / "store")
    store = ArtifactStore(tmp_path / "store")
    before, after = pair(store, "blocks")
    told(store, "pin", before.ref, "--note", "mine")
    assert [pinned["note"] for pinned in told(store, "pin", "--json")] == ["mine"]
    options = ("--keep-last", "1", "--grace", "0", "--json")
    assert told(store, "gc", "--dry-run", *options)["taken"] == []
    assert "unpinned" in told(store, "unpin", before.ref)
    tried = told(store, "gc", "--dry-run", *options)
    assert before.ref in [taken["what"] for taken in tried["taken"]]
    assert store.load("blocks", before.key)
    collected = told(store, "gc", *options)
    assert collected["taken"] == tried["taken"]
    assert collected["deleted_bytes"] == tried["taken_bytes"]
    assert store.load("blocks", before.key) is None
    assert store.load("blocks", after.key)
    assert "0 B moved to the trash" in told(store, "gc")
