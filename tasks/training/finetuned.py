"""Examples on a base model to a finetuned model.

Reads   base        pretrained: a Hugging Face model folder with its tokenizer
        examples    EXAMPLES, train and validation, and the chat template that made them
Writes  config.json, generation_config.json, model.safetensors, the tokenizer's files, chat_template.jinja
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from tasks.errors import RecipeError
from tasks.store import Artifact, ArtifactStore, Built, Work, stage
from tasks.training.model import check_fits, read_config, vocab_size_of
from tasks.training.optimization import OptimizationSpec
from tasks.training.run import Rows, Start, train

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_JSON = "tokenizer.json"
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


class FinetunedSpec(OptimizationSpec):
    """How the model is finetuned."""


@stage("finetuned", revision=1)
def build_finetuned(work: Work, spec: FinetunedSpec, base: Artifact, examples: Artifact) -> Built:
    """Train every weight of the base on examples."""
    check_tokenizer(work.store, base, examples, "finetuned")
    start = base_model(base, examples, "finetuned")
    outcome = train(work, spec, "finetuned", example_rows(base, examples), start)
    copy_tokenizer(base, examples, work.folder)
    return outcome.built()


def example_rows(base: Artifact, examples: Artifact) -> Rows:
    """The files of both splits."""
    return Rows(
        train_files=[examples.file("train.arrow")],
        validation_files=[examples.file("validation.arrow")] if examples.has_file("validation.arrow") else [],
        block_size=examples.stats["block_size"],
        vocab_size=examples.stats["vocab_size"],
        content=f"{base.content}{examples.content}",
        origin=examples,
    )


def base_model(base: Artifact, examples: Artifact, where: str, adapter: dict[str, Any] | None = None) -> Start:
    """The base, checked against the examples."""
    config = read_config(base.path)
    check_fits(config, examples.stats["block_size"], examples.stats["vocab_size"], where)
    return Start(
        config=None,
        folder=base.path,
        attention="sdpa",
        vocab_size=vocab_size_of(config, where),
        adapter=adapter,
        generation=generation_fields(base.path, examples.stats.get("end_markers", {}).values()),
    )


def generation_fields(folder: Path, end_markers: Iterable[int]) -> dict[str, Any]:
    """Where a model that answers is to stop: at the end of a document, and at what closes an answer of its examples."""
    fields = orjson.loads((folder / "generation_config.json").read_bytes())
    ends = fields.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    return {"eos_token_id": [*ends, *(end for end in end_markers if end not in ends)], "pad_token_id": fields.get("pad_token_id")}


def check_tokenizer(store: ArtifactStore, model: Artifact, rows: Artifact, where: str) -> None:
    """Raise RecipeError where rows were made with another tokenizer than the model's: its ids would mean other text."""
    made = tokenizer_of(store, rows)
    if made is None or not made.has_file(TOKENIZER_JSON) or not model.has_file(TOKENIZER_JSON):
        return
    if made.entry(TOKENIZER_JSON).digest != model.entry(TOKENIZER_JSON).digest:
        raise RecipeError(
            f"{where}: {rows.short} was made with {made.short}, which is not the tokenizer of {model.short}; "
            "leave the recipe's section tokenizer out, or name the model's own"
        )


def tokenizer_of(store: ArtifactStore, rows: Artifact) -> Artifact | None:
    """The tokenizer that examples or blocks were made with; None where the store has it no longer."""
    inputs = rows.manifest.produced_by.get("inputs", {})
    kind, _, key = inputs.get("tokenizer", inputs.get("tokens", "")).partition("/")
    found = store.load(kind, key) if key else None
    return tokenizer_of(store, found) if found and kind == "tokens" else found


def copy_tokenizer(base: Artifact, examples: Artifact, target: Path) -> None:
    """Copy a model folder's files but those of the model itself, and the chat template that the examples were made with.

    Without that a tokenizer that has none of its own could not ask the model as it was trained.
    """
    for entry in base.manifest.files:
        if "/" not in entry.name and not any(Path(entry.name).match(pattern) for pattern in MODEL_FILES):
            shutil.copyfile(base.file(entry.name), target / entry.name)
    if examples.has_file(CHAT_TEMPLATE):
        shutil.copyfile(examples.file(CHAT_TEMPLATE), target / CHAT_TEMPLATE)
