"""Published models: folders, packages and what is wrong with them."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import orjson
import pytest

from tasks.corpus.tokenizer import TokenizerSpec, build_tokenizer
from tasks.errors import SourceError
from tasks.machine import Machine
from tasks.store import ArtifactStore
from tasks.training.finetuned import generation_fields
from tasks.training.published import PublishedSpec, build_published, gguf_file
from tests.training.tiny import VOCAB_SIZE, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def publish(root: Path, weights: Path | str) -> "ArtifactStore":
    store = ArtifactStore(root)
    build_published(store, Machine(), PublishedSpec(weights=str(weights)))
    return store


def test_a_folder_is_copied_whole_and_nothing_else_of_it(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling.py").write_text("raise SystemExit")
    artifact = publish(tmp_path, folder).resolve("published")
    assert sorted(entry.name for entry in artifact.manifest.files) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert artifact.file("model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert artifact.stats["vocab_size"] == VOCAB_SIZE
    assert artifact.stats["num_parameters"] == sum(shape for shape in sizes(folder))


def sizes(folder: Path) -> list[int]:
    from safetensors.torch import load_file

    return [tensor.numel() for tensor in load_file(folder / "model.safetensors").values()]


def test_where_a_text_ends_is_taken_from_the_config_where_the_publisher_says_it_nowhere_else(
    folder: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in folder.iterdir():
        if path.name != "generation_config.json":
            (bare / path.name).write_bytes(path.read_bytes())
    artifact = publish(tmp_path / "store", bare).resolve("published")
    assert orjson.loads(artifact.file("generation_config.json").read_bytes()) == {"eos_token_id": 256}


@pytest.mark.parametrize("ends", [None, [], [None]])
def test_an_end_that_the_publishers_generation_config_leaves_empty_is_taken_from_the_config(
    folder: Path, tmp_path: Path, ends: object
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "temperature": 0.5}))
    artifact = publish(tmp_path / "store", copy).resolve("published")
    assert orjson.loads(artifact.file("generation_config.json").read_bytes()) == {"eos_token_id": 256, "temperature": 0.5}
    assert generation_fields(artifact.path, [258])["eos_token_id"] == [256, 258]


def test_an_end_that_nobody_tells_is_left_out(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "generation_config.json").write_text('{"eos_token_id": null}')
    config = orjson.loads((copy / "config.json").read_bytes())
    (copy / "config.json").write_bytes(orjson.dumps({**config, "eos_token_id": None}))
    artifact = publish(tmp_path / "store", copy).resolve("published")
    assert orjson.loads(artifact.file("generation_config.json").read_bytes()) == {}
    assert generation_fields(artifact.path, [258])["eos_token_id"] == [258]


def test_its_tokenizer_is_an_artifact_by_its_own_bytes(folder: Path, tmp_path: Path) -> None:
    store = publish(tmp_path, folder)
    tokenizer = build_tokenizer(store, Machine(), TokenizerSpec(of_published=True), published=store.resolve("published"))
    assert sorted(entry.name for entry in tokenizer.manifest.files) == [
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert tokenizer.stats["vocab_size"] == VOCAB_SIZE


def test_a_changed_byte_is_another_model_and_another_place_is_not(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    store = publish(tmp_path / "store", folder)
    build_published(store, Machine(), PublishedSpec(weights=str(copy)))
    assert len(list(store.artifacts("published"))) == 1
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    build_published(store, Machine(), PublishedSpec(weights=str(copy)))
    assert len(list(store.artifacts("published"))) == 2


def test_every_keyed_field_changes_the_key() -> None:
    plain = PublishedSpec(weights="a").identity()
    assert PublishedSpec(weights="b", weights_revision="v2").identity() == plain
    assert PublishedSpec(weights="a", number_format="float32").identity() != plain


def test_a_folder_without_a_fast_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(SourceError, match=r"no tokenizer.json; only fast tokenizers can be used"):
        publish(tmp_path / "store", tmp_path)


def test_a_package_is_named_by_its_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "some_model-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n")
    (info / "RECORD").write_text("some_model/a.gguf,,\nsome_model/__init__.py,,\n")
    for name in ("__init__.py", "a.gguf", "b.gguf"):  # importlib_metadata, where a package brings it, lists what is there
        (tmp_path / "some_model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "some_model" / name).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    assert gguf_file("package:some-model") == tmp_path / "some_model" / "a.gguf"
    with pytest.raises(SourceError, match="package:another: no such package is installed here"):
        gguf_file("package:another")
    (info / "RECORD").write_text("some_model/a.gguf,,\nsome_model/b.gguf,,\n")
    with pytest.raises(SourceError, match=r"2 \.gguf files in the package; name one file by its path"):
        gguf_file("package:some-model")
    with pytest.raises(SourceError, match=r"no such file; name a \.gguf file that is here"):
        gguf_file(str(tmp_path / "absent.gguf"))
