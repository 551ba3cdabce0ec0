"""Blocks to a pretrained model.

Reads   blocks      BLOCKS, shards and tails
        tokenizer   its files, which go along with the model
        source      published weights, where the model spec names them
Writes  config.json, generation_config.json, model.safetensors, the tokenizer's files
"""

import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from tasks.errors import RecipeError
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Built, Work, stage
from tasks.training.metrics import bits_per_byte
from tasks.training.model import ModelSpec, check_fits, completed_config, identify_weights, read_config
from tasks.training.optimization import OptimizationSpec
from tasks.training.run import Rows, Start, train
from tasks.training.starting_weights import starting_folder


class PretrainedSpec(OptimizationSpec):
    """How the model is pretrained."""

    model: ModelSpec = Field(description="what the model starts from")
    document_attention: Literal["across", "within"] | None = Field(
        None,
        description="whether a token sees the documents before its own in its block; within: it does not, and positions "
        "restart at every document; absent: across",
    )

    @field_validator("document_attention")
    @classmethod
    def _absent_is_across(cls, value: str | None) -> str | None:
        # One spelling of what needs no field: said or not, the key is the same.
        return None if value == "across" else value


def identify_source(spec: PretrainedSpec, store: ArtifactStore, machine: Machine) -> str | None:
    """Published weights by content; None for a model that starts from a config."""
    return identify_weights(spec.model, store, machine)


@stage("pretrained", revision=2, identify_source=identify_source)
def build_pretrained(work: Work, spec: PretrainedSpec, blocks: Artifact, tokenizer: Artifact) -> Built:
    """Train a causal language model on blocks."""
    rows = block_rows(blocks, tokenizer, work.source, spec.document_attention == "within")
    check_tokenizer(blocks, tokenizer)
    start = starting_model(work, spec.model, blocks)
    outcome = train(work, spec, "pretrained", rows, start)
    copy_files(tokenizer, work.folder)
    return outcome.built(validation_bits_per_byte=validation_bits_per_byte(outcome.validation_loss, blocks))


def block_rows(blocks: Artifact, tokenizer: Artifact, source: str | None, is_within: bool) -> Rows:
    """The files of both splits: every shard's blocks in order, then those made of all shards' tails.

    is_within: the documents of a block are told apart by the id that closes each, and do not see each other.
    """
    return Rows(
        train_files=block_files(blocks, "train"),
        validation_files=block_files(blocks, "validation"),
        block_size=blocks.stats["block_size"],
        vocab_size=blocks.stats["vocab_size"],
        content=f"{blocks.content}{tokenizer.content}{source or ''}",
        boundary_id=blocks.stats["end_of_document_id"] if is_within else None,
        origin=blocks,
    )


def block_files(blocks: Artifact, split: str) -> list[Path]:
    """The Arrow streams of one split."""
    files = [blocks.shard_file(entry, "blocks.arrow") for entry in blocks.shards(split)]
    tail = f"{split}-tail.arrow"
    return [*files, blocks.file(tail)] if blocks.has_file(tail) else files


def check_tokenizer(blocks: Artifact, tokenizer: Artifact) -> None:
    """Raise RecipeError where the blocks are not this tokenizer's."""
    made, given = blocks.stats["vocab_size"], tokenizer.stats["vocab_size"]
    if made != given:
        raise RecipeError(
            f"pretrained: {blocks.short} was made with {made} ids, {tokenizer.short} has {given}; "
            "give the tokenizer of the blocks"
        )


def starting_model(work: Work, model: ModelSpec, blocks: Artifact) -> Start:
    """The model spec, completed and checked against the blocks."""
    end_id = blocks.stats["end_of_document_id"]
    block_size, vocab_size = blocks.stats["block_size"], blocks.stats["vocab_size"]
    folder = None
    if model.config is not None:
        config = completed_config(model.config, vocab_size, end_id)
    else:
        folder = starting_folder(work, model)
        config = read_config(folder)
    check_fits(config, block_size, vocab_size, "pretrained.model")
    return Start(
        config=None if folder else config,
        folder=folder,
        attention=model.attention,
        vocab_size=config.get("vocab_size", vocab_size),
        generation={"eos_token_id": end_id, "pad_token_id": end_id},
    )


def validation_bits_per_byte(loss: float | None, blocks: Artifact) -> float | None:
    """Bits per byte of the validation split's text."""
    counts: dict[str, Any] = blocks.stats.get("validation") or {}
    if loss is None or not counts.get("num_bytes"):
        return None
    return bits_per_byte(loss, counts["num_tokens"], counts["num_bytes"])


def copy_files(artifact: Artifact, target: Path) -> None:
    """Copy an artifact's own files into staging."""
    for entry in artifact.manifest.files:
        shutil.copyfile(artifact.file(entry.name), target / entry.name)
