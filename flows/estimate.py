"""What a stage will take, from what the nearest artifact took: bytes, tokens, seconds, memory, disk.

Reads   manifests: num_bytes, stats, produced_by (seconds, peak_rss_bytes, scratch_bytes, num_bytes_built)

A stage of the corpus grows with the bytes that it reads, documents to max_documents and a tokenizer's training to max_bytes;
training with rows, block_size and parameters. An evaluation and a report are of one size. Nothing is estimated where the store
holds no artifact of the kind.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.dag import Node
from tasks.corpus.archive import ArchiveSpec
from tasks.corpus.documents import DocumentsSpec
from tasks.corpus.fetch import ask
from tasks.corpus.sources import resolve
from tasks.corpus.tokenizer import TokenizerSpec
from tasks.errors import SeqmillError
from tasks.machine import Machine
from tasks.schemas import SPLITS
from tasks.store import Spec
from tasks.store.records import Record, Records
from tasks.training.optimization import OptimizationSpec

MODEL_KINDS = ("pretrained", "finetuned")
ONE_SIZE = ("evaluation", "gate", "report")  # figures, plots and samples, of however many tokens
SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """What a build of all of an artifact will take; None where the manifest that it is from does not tell.

    peak_rss_bytes: of the largest single process. peak_disk_bytes: the artifact with what its build keeps beside it.
    """

    num_bytes: int
    num_tokens: int | None
    seconds: float | None
    peak_rss_bytes: int | None
    peak_disk_bytes: int
    nearest: str | None
    host: str | None

    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Given:
    """What is known of an input: how large it is, or is estimated to be, and its block_size where it has one."""

    num_bytes: int | None
    block_size: int | None
    num_rows: int | None


def estimate(
    node: Node, nearest: Record | None, inputs: Mapping[str, Given], records: Records, published_bytes: int | None = None
) -> Estimate | None:
    """What ``node`` will take; None where there was no earlier run, and where nobody says how large a source is.

    published_bytes: of an archive, which has no inputs to grow with.
    """
    if nearest is None:
        return Estimate(published_bytes, None, None, None, published_bytes, None, None) if published_bytes else None
    larger = published_bytes / max(nearest.num_bytes, 1) if published_bytes else input_scale(nearest, inputs, records)
    larger = min(larger, document_scale(node.spec, nearest))
    if larger == math.inf:  # nobody knows how much is read
        return None
    work, weight = larger, 1.0 if node.kind in ONE_SIZE else larger
    if isinstance(node.spec, TokenizerSpec):
        work, weight = tokenizer_scale(node.spec, nearest, records, larger)
    if isinstance(node.spec, OptimizationSpec):
        weight = parameter_scale(node, nearest)
        work = training_scale(node.spec, nearest, inputs, records, larger) * weight
    told = nearest.produced_by
    seconds, memory = whole_seconds(nearest), max(told.get("peak_rss_bytes") or 0, told.get("peak_child_rss_bytes") or 0)
    tokens, scratch_bytes = num_tokens(nearest), told.get("scratch_bytes") or 0
    return Estimate(
        num_bytes=round(nearest.num_bytes * weight),
        num_tokens=None if tokens is None else round(tokens * larger),
        seconds=None if seconds is None else round(seconds * work, 1),
        peak_rss_bytes=round(memory * (weight if node.kind in MODEL_KINDS else 1)) or None,
        peak_disk_bytes=round((nearest.num_bytes + scratch_bytes) * weight),
        nearest=nearest.ref,
        host=told.get("host"),
    )


def whole_seconds(record: Record) -> float | None:
    """How long a build of all of it takes: one that found some of its shards took less. None where it found them all."""
    seconds, num_bytes_built = record.produced_by.get("seconds"), record.produced_by.get("num_bytes_built")
    if seconds is None or num_bytes_built is None:
        return seconds
    return seconds * max(record.num_bytes, 1) / num_bytes_built if num_bytes_built else None


def num_tokens(record: Record) -> int | None:
    """The tokens that an artifact holds; None where it counts none."""
    splits = [record.stats[split].get("num_tokens") for split in SPLITS if isinstance(record.stats.get(split), dict)]
    found = [number for number in (*splits, record.stats.get("num_tokens")) if isinstance(number, int)]
    return sum(found) if found else None


def input_scale(nearest: Record, inputs: Mapping[str, Given], records: Records) -> float:
    """How many times the bytes that the nearest artifact was made from; 1 where those are not known.

    Infinite where nobody knows what is read now. A tokenizer counts for nothing: it reads, and is not read.
    """
    read = {name: given for name, given in inputs.items() if name != "tokenizer"}
    before = [record.num_bytes if (record := records.input_of(nearest, name)) else None for name in read]
    after = [given.num_bytes for given in read.values()]
    if nearest.kind in ONE_SIZE or not read:
        return 1.0
    if None in after:
        return math.inf
    if None in before:
        return 1.0
    return sum(filter(None, after)) / max(sum(filter(None, before)), 1)


def document_scale(spec: Spec, nearest: Record) -> float:
    """How many times the documents, at most; no bound where the spec has none."""
    before = nearest.stats.get("num_documents")
    most = spec.max_documents if isinstance(spec, DocumentsSpec) else None
    return most / before if most and before else math.inf


def tokenizer_scale(spec: TokenizerSpec, nearest: Record, records: Records, larger: float) -> tuple[float, float]:
    """How many times the text that a tokenizer is trained on, and the tokens that it has; 1 where either is not known."""
    documents, before = records.input_of(nearest, "documents"), nearest.identity["spec"].get("train")
    if spec.train is None or not before or documents is None:
        return 1.0, 1.0
    text = documents.stats["train"]["num_bytes"]
    work = min(text * larger, spec.train.max_bytes) / max(min(text, before["max_bytes"]), 1)
    return work, spec.train.vocab_size / before["vocab_size"]


def training_scale(
    spec: OptimizationSpec, nearest: Record, inputs: Mapping[str, Given], records: Records, larger: float
) -> float:
    """How many times the tokens that the nearest model was trained on: steps, rows a step, ids a row."""
    name = next((name for name in ("blocks", "examples") if name in inputs), None)
    read = records.input_of(nearest, name) if name else None
    steps_before, batch_before = nearest.stats.get("num_steps"), nearest.identity["spec"].get("global_batch_size")
    if name is None or not steps_before or not batch_before:
        return larger
    given = inputs[name]
    steps = spec.num_steps or (spec.steps(given.num_rows) if given.num_rows else steps_before * larger)
    size_before = read.stats.get("block_size") if read else None
    longer = given.block_size / size_before if given.block_size and size_before else 1.0
    return float(steps * spec.global_batch_size / (steps_before * batch_before) * longer)


def parameter_scale(node: Node, nearest: Record) -> float:
    """How many times the parameters, by the models' configs; 1 where a model's config is not in its spec."""
    before, after = (spec.get("model", {}).get("config") or {} for spec in (nearest.identity["spec"], node.spec.identity()))
    return config_parameters(after) / max(config_parameters(before), 1) if config_parameters(before) else 1.0


def config_parameters(config: Mapping[str, Any]) -> int:
    """About how many parameters a model of this config has; 0 where the config does not say."""
    if any(not isinstance(config.get(name, 1), int) or config.get(name, 1) < 1 for name in SIZES):
        return 0  # what is wrong with it, the model's own class says
    hidden, layers = int(config.get("hidden_size", 0)), int(config.get("num_hidden_layers", 0))
    heads = int(config.get("num_attention_heads", 1))
    kv_share = int(config.get("num_key_value_heads", heads)) / heads
    attention = hidden * hidden * (2 + 2 * kv_share)
    mlp = 3 * hidden * int(config.get("intermediate_size", 4 * hidden))
    embeddings = int(config.get("vocab_size", 0)) * hidden * (1 if config.get("tie_word_embeddings", True) else 2)
    return int(embeddings + layers * (attention + mlp))


def published(spec: Spec, machine: Machine) -> int | None:
    """The size of the bytes that an archive's URL names; None where it cannot be known now, and of what is no archive."""
    with suppress(SeqmillError):
        if isinstance(spec, ArchiveSpec):
            where = resolve(spec.url, machine.endpoints)
            return _local_bytes(where) if isinstance(where, Path) else ask(where).num_bytes
    return None


def _local_bytes(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
