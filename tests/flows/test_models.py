"""The commands that use models, on a store with tiny ones."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.commands.models import harmless
from flows.models import folders_of
from tasks.errors import RecipeError, RefError
from tasks.machine import Machine
from tasks.store import ArtifactStore
from tasks.store.lease import end_lease
from tests.flows.models import FolderSpec, build_examples, build_published_untemplated, build_untemplated


def seqmill(store: ArtifactStore, *arguments: str, typed: str = "") -> Result:
    result = CliRunner().invoke(app, [*arguments, "--store", str(store.root)], input=typed)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


KINDS = ("pretrained", "finetuned", "adapter")
WARM = ("--temperature", "2", "--max-new-tokens", "4")


def test_an_adapter_is_used_on_the_base_that_it_was_trained_on(store: ArtifactStore) -> None:
    adapter, finetuned = store.resolve("adapter"), store.resolve("finetuned")
    assert folders_of(store, adapter) == (finetuned.path, adapter.path)
    assert folders_of(store, finetuned) == (finetuned.path, None)
    with pytest.raises(RefError, match="not a model; name an artifact of kind finetuned, pretrained, published or adapter"):
        folders_of(store, store.resolve("examples"))


def test_a_model_that_is_in_use_is_not_collected(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    model = build_untemplated(store, Machine(), FolderSpec())
    seqmill(store, "pin", build_examples(store, Machine(), FolderSpec()).ref)
    end_lease(store.root)
    gc = ("gc", "--grace", "0", "--json")
    assert json.loads(seqmill(store, *gc, "--dry-run").stdout)["taken_bytes"] >= model.num_bytes
    folders_of(store, model)
    assert json.loads(seqmill(store, *gc).stdout)["taken_bytes"] == 0
    assert model.path.is_dir()


def test_a_chat_answers_every_line_and_the_same_again_once_it_is_reset(store: ArtifactStore) -> None:
    told = seqmill(store, "chat", "finetuned", *WARM, typed="hi\n\nhi\n/reset\nhi\n")
    first, second, again = told.stdout.split("\n\n")[:3]
    assert again.strip() == first.strip()
    assert second.strip() != first.strip()
    assert told.exit_code == 0


def test_a_chat_goes_on_behind_what_cannot_be_said(store: ArtifactStore) -> None:
    told = seqmill(store, "chat", "finetuned", *WARM, typed=f"{'x' * 99}\nhi\n")
    assert "the model has 64 positions; say it in fewer words" in told.stderr
    assert told.stdout.strip()


def test_a_model_without_a_chat_template_is_refused_before_anything_is_said(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    build_untemplated(store, Machine(), FolderSpec())
    with pytest.raises(RefError, match="its tokenizer has no chat template; name a finetuned model, or give seqmill generate"):
        seqmill(store, "chat", "pretrained", typed="hi\n")


def test_a_published_model_without_a_chat_template_goes_on_from_a_text(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    build_published_untemplated(store, Machine(), FolderSpec())
    told = seqmill(store, "generate", "published", "--prompt", "ab", *WARM, "--json")
    plain = seqmill(store, "generate", "published", "--prompt", "ab", *WARM, "--json", "--plain")
    assert json.loads(told.stdout)["text"] == json.loads(plain.stdout)["text"] != ""
    with pytest.raises(RecipeError, match="no chat template; leave chat out"):
        seqmill(store, "generate", "published", "--prompt", "ab", "--chat")


def test_what_would_steer_a_terminal_is_told_instead_of_sent() -> None:
    assert harmless("\x1b]0;title\x07 好\n\tb\x9b\r") == "\ufffd]0;title\ufffd 好\n\tb\ufffd\ufffd"


def test_the_export_tells_what_it_wrote_and_where(store: ArtifactStore, tmp_path: Path) -> None:
    told = json.loads(seqmill(store, "export", "adapter", str(tmp_path / "out"), "--json").stdout)
    assert told["path"] == str(tmp_path / "out")
    assert told["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "chat_template.jinja"} <= set(told["files"])


def test_generate_tells_the_text_of_each_kind_of_model(store: ArtifactStore) -> None:
    texts = [json.loads(seqmill(store, "generate", kind, "--prompt", "ab", *WARM, "--json").stdout)["text"] for kind in KINDS]
    assert len(set(texts)) == len(KINDS)
