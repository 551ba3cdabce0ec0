"""Exported folders, loaded with plain transformers and PEFT."""

import shutil
from pathlib import Path

import orjson
import pytest
import torch

from flows.card import model_card
from flows.export import end_markers, export_model
from tasks.errors import RefError, UserError
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Built, Spec, Work, stage, unkeyed
from tasks.training.rules import is_read_alike
from tests.flows.models import FolderSpec, build_adapter, build_examples, build_untemplated, small_store
from tests.training.test_generate import sentence_tokenizer
from tests.training.tiny import save_tiny_model

IDS = torch.tensor([[1, 2, 3, 4, 5]])


class PublishedSpec(Spec):
    weights: str = unkeyed(description="as a recipe names it")
    source: str = unkeyed(description="what it is identified by")


@stage("adapter", revision=1)
def build_bottleneck(work: Work, spec: FolderSpec, base: Artifact, examples: Artifact) -> Built:
    (work.folder / "adapter_config.json").write_text("{}")
    return Built()


@stage("published", revision=1, identify_source=lambda spec, store, machine: spec.source)
def build_published(work: Work, spec: PublishedSpec) -> Built:
    save_tiny_model(work.folder)
    return Built()


@stage("pretrained", revision=1)
def build_sentences(work: Work, spec: FolderSpec) -> Built:
    save_tiny_model(work.folder)
    sentence_tokenizer().save(str(work.folder / "tokenizer.json"))
    return Built()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def logits_of(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS).logits
    return found


def test_a_model_is_written_whole_with_a_card_that_tells_its_figures_and_lineage(store: ArtifactStore, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    finetuned = store.resolve("finetuned")
    folder = export_model(store, Machine(), finetuned, tmp_path / "out", merged=False)
    assert names(folder) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert torch.equal(logits_of(folder), logits_of(finetuned.path))
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| learning_rate | 0.002 |" in card
    assert "| validation loss, nats a token | 2.25 |" in card
    assert "| ceval.acc | 0.5 |" in card
    for kind in ("finetuned", "pretrained", "examples"):
        made = store.resolve(kind)
        assert f"| {kind} | {made.key[:12]} | {made.content[:12]} |" in card
    assert str(store.root) not in card


def test_an_adapter_names_a_base_that_peft_finds(store: ArtifactStore, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    folder = export_model(store, Machine(), store.resolve("adapter"), tmp_path / "out", merged=False)
    fields = orjson.loads((folder / "adapter_config.json").read_bytes())
    assert fields["base_model_name_or_path"] == str(store.resolve("finetuned").path)
    assert "library_name: peft" in (folder / "README.md").read_text()
    with torch.inference_mode():
        adapted = AutoPeftModelForCausalLM.from_pretrained(folder)(input_ids=IDS).logits
    assert not torch.allclose(adapted, logits_of(store.resolve("finetuned").path))


def test_a_base_from_the_hub_is_named_by_its_commit_and_one_from_a_folder_by_its_place(tmp_path: Path) -> None:
    for source, named in (("a" * 40, ("owner/name", "a" * 40)), ("b" * 64, None)):
        store = ArtifactStore(tmp_path / f"store-{source[0]}")
        examples = build_examples(store, Machine(), FolderSpec())
        base = build_published(store, Machine(), PublishedSpec(weights="owner/name", source=source))
        adapter = build_adapter(store, Machine(), FolderSpec(), base=base, examples=examples)
        folder = export_model(store, Machine(), adapter, tmp_path / source, merged=False)
        fields = orjson.loads((folder / "adapter_config.json").read_bytes())
        assert (fields["base_model_name_or_path"], fields["revision"]) == (named or (str(base.path), None))


def test_the_card_shows_a_call_that_the_folder_can_answer(store: ArtifactStore, tmp_path: Path) -> None:
    plain = ArtifactStore(tmp_path)
    base, examples = build_untemplated(plain, Machine(), FolderSpec()), build_examples(plain, Machine(), FolderSpec())
    assert 'ask("...")' in model_card(plain, base, merged=False)
    bottleneck = build_bottleneck(plain, Machine(), FolderSpec(method="bottleneck"), base=base, examples=examples)
    assert "import tasks.training.adapters.bottleneck\nfrom peft" in model_card(plain, bottleneck, merged=False)
    assert "import tasks" not in model_card(store, store.resolve("finetuned"), merged=False)
    assert 'ask([{"role": "user", "content": "..."}])' in model_card(store, store.resolve("finetuned"), merged=False)


def test_a_tokenizer_that_transformers_reads_by_other_rules_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import PreTrainedTokenizerFast

    store = ArtifactStore(tmp_path / "store")
    folder = export_model(store, Machine(), build_sentences(store, Machine(), FolderSpec()), tmp_path / "out", merged=False)
    assert "AutoTokenizer has rules of its own" in caplog.text
    assert "PreTrainedTokenizerFast.from_pretrained" in (folder / "README.md").read_text()
    as_told = PreTrainedTokenizerFast.from_pretrained(folder)
    assert as_told.decode(as_told.encode("one 好", add_special_tokens=False)) == "one 好"
    caplog.clear()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert is_read_alike(folder)


def test_a_link_to_an_empty_folder_is_written_through(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert export_model(store, Machine(), store.resolve("finetuned"), tmp_path / "link", merged=False) == tmp_path / "real"
    assert "model.safetensors" in names(tmp_path / "link")


def test_where_a_merged_adapter_stops_is_known_without_its_examples(tmp_path: Path) -> None:
    store = small_store(tmp_path)
    assert end_markers(store, store.resolve("adapter")) == [258]
    shutil.rmtree(store.resolve("examples").path)
    assert end_markers(store, store.resolve("adapter")) == [258]


@pytest.mark.slow  # starts the merging process
def test_a_merged_adapter_is_a_plain_model_that_says_the_same_and_stops_where_its_examples_did(
    store: ArtifactStore, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    adapter = store.resolve("adapter")
    folder = export_model(store, Machine(), adapter, tmp_path / "out", merged=True)
    assert "adapter_config.json" not in names(folder)
    assert orjson.loads((folder / "generation_config.json").read_bytes())["eos_token_id"] == [256, 258]
    apart = export_model(store, Machine(), adapter, tmp_path / "apart", merged=False)
    with torch.inference_mode():
        adapted = AutoPeftModelForCausalLM.from_pretrained(apart)(input_ids=IDS).logits
    assert torch.allclose(logits_of(folder), adapted, atol=1e-4)


def test_what_is_there_is_never_written_over(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder; name another, or empty it"):
        export_model(store, Machine(), store.resolve("finetuned"), tmp_path, merged=False)
    assert names(tmp_path) == ["notes.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "model.safetensors" in names(export_model(store, Machine(), store.resolve("finetuned"), empty, merged=False))
    assert names(tmp_path) == ["empty", "notes.txt"]


def test_what_cannot_be_exported_is_said(store: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter, so there is nothing to merge; leave --merged out"):
        export_model(store, Machine(), store.resolve("finetuned"), tmp_path / "out", merged=True)
    with pytest.raises(RefError, match="not a model; name an artifact of kind finetuned, "):
        export_model(store, Machine(), store.resolve("examples"), tmp_path / "out", merged=False)
    assert names(tmp_path) == []
