"""What can be known to fail before anything runs: ranks that do not divide a batch, too little disk.

Factors over the archive's bytes, measured on Chinese text packed by bzip2 (README, "Figures"): an archive byte is about
4.5 bytes of text; text in Parquet zstd takes about as much as the archive; a token stands for 3.3 bytes of text or more
with a vocabulary of the usual size and takes 4 bytes, once in tokens and once in blocks.
"""

from collections.abc import Iterable
from pathlib import Path

from flows.dag import Node
from flows.plan import Step
from flows.recipe import Recipe
from flows.settings import free_bytes
from tasks.corpus.archive import ArchiveSpec
from tasks.corpus.fetch import ask
from tasks.corpus.sources import resolve
from tasks.errors import DiskSpaceError
from tasks.machine import Machine
from tasks.store import ArtifactStore, Spec
from tasks.training.optimization import OptimizationSpec
from tasks.training.plan import derive_batch

PER_ARCHIVE_BYTE = {"archive": 1.0, "documents": 1.2, "tokens": 5.5, "blocks": 5.5, "examples": 12.0}
# Weights in bf16 and, for two checkpoints, weights, fp32 weights and two Adam moments.
BYTES_PER_PARAMETER = {"pretrained": 2 + 2 * 14, "finetuned": 2 + 2 * 14, "adapter": 2}


_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
)  # fmt: skip


def check_ranks(nodes: Iterable[Node], machine: Machine) -> None:
    """Raise SettingsError where this machine's ranks and a global batch do not go together."""
    for node in nodes:
        if isinstance(node.spec, OptimizationSpec):
            derive_batch(node.spec.global_batch_size, machine.training, row_logits=1)


def check_space(recipe: Recipe, steps: Iterable[Step], store: ArtifactStore, machine: Machine) -> int:
    """The bytes that the steps still to be built need. Raises DiskSpaceError where the store's disk has fewer."""
    steps = list(steps)
    needed = {step.node.name: _needed(recipe, step.node, steps, machine) for step in steps if step.status != "found"}
    total, free = sum(needed.values()), free_bytes(store.root)
    if total > free:
        largest = max(needed, key=lambda name: needed[name])
        raise DiskSpaceError(
            f"{store.root}: {free / 1e9:.1f} GB free, the plan needs about {total / 1e9:.1f} GB "
            f"({largest} {needed[largest] / 1e9:.1f} GB); free some or name another store with --store"
        )
    return total


def _needed(recipe: Recipe, node: Node, steps: list[Step], machine: Machine) -> int:
    if node.kind in BYTES_PER_PARAMETER:
        return BYTES_PER_PARAMETER[node.kind] * num_parameters(recipe)
    source = {"archive": node.name, "examples": "conversations"}.get(node.kind, "archive")
    archive = next((step for step in steps if step.node.name == source), None)
    if archive is None or node.kind not in PER_ARCHIVE_BYTE:
        return 0
    num_bytes = archive.artifact.num_bytes if archive.artifact else published_num_bytes(archive.node.spec, machine)
    return int((num_bytes or 0) * PER_ARCHIVE_BYTE[node.kind])


def num_parameters(recipe: Recipe) -> int:
    """About how many parameters the recipe's model has, from its config; 0 where it comes from published weights."""
    config = (recipe.pretrained.model.config if recipe.pretrained else None) or {}
    if any(not isinstance(config.get(name, 1), int) or config.get(name, 1) < 1 for name in _SIZES):
        return 0  # what is wrong with it, the model's own class says
    hidden, layers = int(config.get("hidden_size", 0)), int(config.get("num_hidden_layers", 0))
    heads = int(config.get("num_attention_heads", 1))
    kv_share = int(config.get("num_key_value_heads", heads)) / heads
    attention = hidden * hidden * (2 + 2 * kv_share)
    mlp = 3 * hidden * int(config.get("intermediate_size", 4 * hidden))
    embeddings = int(config.get("vocab_size", 0)) * hidden * (1 if config.get("tie_word_embeddings", True) else 2)
    return int(embeddings + layers * (attention + mlp))


def published_num_bytes(spec: Spec, machine: Machine) -> int | None:
    """The size of what an archive's URL names; None where its server does not tell. May raise SourceError."""
    assert isinstance(spec, ArchiveSpec)
    where = resolve(spec.url, machine.endpoints)
    if isinstance(where, Path):
        return where.stat().st_size if where.is_file() else None
    return ask(where).num_bytes
