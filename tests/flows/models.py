"""A store with a tiny model, an adapter on it and what they were made from: for tests of what models are used for."""

from pathlib import Path

import orjson

from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Built, Spec, Work, stage
from tests.training.tiny import save_tiny_adapter, save_tiny_model


class FolderSpec(Spec):
    learning_rate: float | None = None
    method: str | None = None


@stage("examples", revision=1)
def build_examples(work: Work, spec: FolderSpec) -> Built:
    (work.folder / "train.arrow").write_bytes(b"rows")
    return Built(stats={"end_markers": {"<|im_end|>": 258}})


@stage("pretrained", revision=1)
def build_pretrained(work: Work, spec: FolderSpec) -> Built:
    save_tiny_model(work.folder)
    return Built(stats={"num_parameters": 123})


@stage("pretrained", revision=1)
def build_untemplated(work: Work, spec: FolderSpec) -> Built:
    save_tiny_model(work.folder, chat_template=None)
    return Built()


@stage("published", revision=1)
def build_published_untemplated(work: Work, spec: FolderSpec) -> Built:
    save_tiny_model(work.folder, chat_template=None)
    return Built()


@stage("finetuned", revision=1)
def build_finetuned(work: Work, spec: FolderSpec, base: Artifact, examples: Artifact) -> Built:
    save_tiny_model(work.folder, seed=1)
    return Built(stats={"num_parameters": 123, "train_loss": 2.5})


@stage("adapter", revision=1)
def build_adapter(work: Work, spec: FolderSpec, base: Artifact, examples: Artifact) -> Built:
    save_tiny_adapter(base.path, work.folder)
    (work.folder / "README.md").unlink(missing_ok=True)  # PEFT's own
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (work.folder / name).write_bytes(base.file(name).read_bytes())
    return Built(stats={"num_trainable_parameters": 7, "base_content": base.content})


@stage("evaluation", revision=1)
def build_evaluation(work: Work, spec: FolderSpec, model: Artifact) -> Built:
    (work.folder / "evaluation.json").write_bytes(orjson.dumps({}))
    return Built(stats={"validation_loss": 2.25, "held_out_accuracy": 0.75, "harness": {"ceval.acc": 0.5}})


def small_store(root: Path) -> ArtifactStore:
    """pretrained, finetuned and adapter, each made from the one before; an evaluation of finetuned."""
    store = ArtifactStore(root)
    examples = build_examples(store, Machine(), FolderSpec())
    pretrained = build_pretrained(store, Machine(), FolderSpec())
    finetuned = build_finetuned(store, Machine(), FolderSpec(learning_rate=0.002), base=pretrained, examples=examples)
    build_adapter(store, Machine(), FolderSpec(method="lora"), base=finetuned, examples=examples)
    build_evaluation(store, Machine(), FolderSpec(), model=finetuned)
    return store
