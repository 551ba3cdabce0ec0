"""Examples on a base model to a finetuned model.

Reads   base        pretrained: a Hugging Face model folder with its tokenizer
        examples    EXAMPLES, train and validation
Writes  config.json, generation_config.json, model.safetensors, the tokenizer's files
"""

import shutil
from pathlib import Path
from typing import Any

import orjson

from tasks.store import Artifact, Built, Work, stage
from tasks.training.model import check_fits, read_config
from tasks.training.optimization import OptimizationSpec
from tasks.training.run import Rows, Start, train

# The end of a turn in ChatML; a finetuned model stops at it, as at the end of a document.
END_OF_TURN = "<|im_end|>"
MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


class FinetunedSpec(OptimizationSpec):
    """How the model is finetuned."""


@stage("finetuned", revision=1)
def build_finetuned(work: Work, spec: FinetunedSpec, base: Artifact, examples: Artifact) -> Built:
    """Train every weight of the base on examples."""
    start = base_model(base, examples, "finetuned")
    outcome = train(work, spec, "finetuned", example_rows(base, examples), start)
    copy_tokenizer(base, work.folder)
    return outcome.built()


def example_rows(base: Artifact, examples: Artifact) -> Rows:
    """The files of both splits."""
    return Rows(
        train_files=[examples.file("train.arrow")],
        validation_files=[examples.file("validation.arrow")] if examples.has_file("validation.arrow") else [],
        block_size=examples.stats["block_size"],
        vocab_size=examples.stats["vocab_size"],
        content=f"{base.content}{examples.content}",
    )


def base_model(base: Artifact, examples: Artifact, where: str, lora: dict[str, Any] | None = None) -> Start:
    """The base, checked against the examples."""
    config = read_config(base.path)
    check_fits(config, examples.stats["block_size"], examples.stats["vocab_size"], where)
    return Start(
        config=None,
        folder=base.path,
        attention="sdpa",
        vocab_size=config["vocab_size"],
        lora=lora,
        generation=generation_fields(base.path),
    )


def generation_fields(folder: Path) -> dict[str, Any]:
    """Where a model that answers is to stop: at the end of a document and at the end of a turn."""
    fields = orjson.loads((folder / "generation_config.json").read_bytes())
    ends = fields.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    added = orjson.loads((folder / "tokenizer.json").read_bytes()).get("added_tokens", [])
    turn = [token["id"] for token in added if token["content"] == END_OF_TURN]
    return {"eos_token_id": [*ends, *(end for end in turn if end not in ends)], "pad_token_id": fields.get("pad_token_id")}


def copy_tokenizer(base: Artifact, target: Path) -> None:
    """Copy a model folder's files but those of the model itself."""
    for entry in base.manifest.files:
        if "/" not in entry.name and not any(Path(entry.name).match(pattern) for pattern in MODEL_FILES):
            shutil.copyfile(base.file(entry.name), target / entry.name)
