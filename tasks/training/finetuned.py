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

from tasks.store import Artifact, Built, Work, stage
from tasks.training.model import check_fits, read_config
from tasks.training.optimization import OptimizationSpec
from tasks.training.run import Rows, Start, train

CHAT_TEMPLATE = "chat_template.jinja"
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


class FinetunedSpec(OptimizationSpec):
    """How the model is finetuned."""


@stage("finetuned", revision=1)
def build_finetuned(work: Work, spec: FinetunedSpec, base: Artifact, examples: Artifact) -> Built:
    """Train every weight of the base on examples."""
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
        vocab_size=config["vocab_size"],
        adapter=adapter,
        generation=generation_fields(base.path, examples.stats.get("end_markers", {}).values()),
    )


def generation_fields(folder: Path, end_markers: Iterable[int]) -> dict[str, Any]:
    """Where a model that answers is to stop: at the end of a document, and at what closes an answer of its examples."""
    fields = orjson.loads((folder / "generation_config.json").read_bytes())
    ends = fields.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    return {"eos_token_id": [*ends, *(end for end in end_markers if end not in ends)], "pad_token_id": fields.get("pad_token_id")}


def copy_tokenizer(base: Artifact, examples: Artifact, target: Path) -> None:
    """Copy a model folder's files but those of the model itself, and the chat template that the examples were made with.

    Without that a tokenizer that has none of its own could not ask the model as it was trained.
    """
    for entry in base.manifest.files:
        if "/" not in entry.name and not any(Path(entry.name).match(pattern) for pattern in MODEL_FILES):
            shutil.copyfile(base.file(entry.name), target / entry.name)
    if examples.has_file(CHAT_TEMPLATE):
        shutil.copyfile(examples.file(CHAT_TEMPLATE), target / CHAT_TEMPLATE)
