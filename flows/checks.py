"""What can be known to fail before anything runs: ranks that do not divide a batch, too little disk.

Factors over the archive's bytes, measured on Chinese text packed by bzip2 (README, "Figures"): an archive byte is about
4.5 bytes of text; text in Parquet zstd takes about as much as the archive; a token stands for 3.3 bytes of text or more
with a vocabulary of the usual size and takes 4 bytes, once in tokens and once in blocks.
"""

from collections.abc import Iterable

from flows.dag import Node
from flows.estimate import config_parameters, published_num_bytes
from flows.plan import Step
from flows.recipe import Recipe
from flows.settings import free_bytes
from tasks.errors import DiskSpaceError
from tasks.machine import Machine
from tasks.store import ArtifactStore
from tasks.training.adapter import AdapterSpec, check_machine
from tasks.training.optimization import OptimizationSpec
from tasks.training.plan import derive_batch

PER_ARCHIVE_BYTE = {"archive": 1.0, "documents": 1.2, "tokens": 5.5, "blocks": 5.5, "examples": 12.0}
# Weights in bf16 and, for two checkpoints, weights, fp32 weights and two Adam moments.
BYTES_PER_PARAMETER = {"pretrained": 2 + 2 * 14, "finetuned": 2 + 2 * 14, "adapter": 2}


def check_ranks(nodes: Iterable[Node], machine: Machine) -> None:
    """Raise SettingsError where this machine's ranks and a global batch, or its ZeRO stage and an adapter, do not go together."""
    for node in nodes:
        if isinstance(node.spec, OptimizationSpec):
            derive_batch(node.spec.global_batch_size, machine.training)
        if isinstance(node.spec, AdapterSpec):
            check_machine(node.spec, machine.training)


def check_space(recipe: Recipe, steps: Iterable[Step], store: ArtifactStore, machine: Machine) -> int:
    """The bytes that the steps still to be built need. Raises DiskSpaceError where the store's disk has fewer."""
    steps = list(steps)
    needed = {step.node.name: _needed(recipe, step, steps, machine) for step in steps if step.status != "found"}
    total, free = sum(needed.values()), free_bytes(store.root)
    if total > free:
        largest = max(needed, key=lambda name: needed[name])
        raise DiskSpaceError(
            f"{store.root}: {free / 1e9:.1f} GB free, the plan needs about {total / 1e9:.1f} GB "
            f"({largest} {needed[largest] / 1e9:.1f} GB); free some or name another store with --store"
        )
    return total


def _needed(recipe: Recipe, step: Step, steps: list[Step], machine: Machine) -> int:
    """By what the nearest artifact took where there is one, else by the factors."""
    node = step.node
    if step.estimate:
        return step.estimate.peak_disk_bytes
    if node.kind in BYTES_PER_PARAMETER:
        return BYTES_PER_PARAMETER[node.kind] * num_parameters(recipe)
    source = {"archive": node.name, "examples": "conversations"}.get(node.kind, "archive")
    archive = next((other for other in steps if other.node.name == source), None)
    if archive is None or node.kind not in PER_ARCHIVE_BYTE:
        return 0
    num_bytes = archive.artifact.num_bytes if archive.artifact else published_num_bytes(archive.node.spec, machine)
    return int((num_bytes or 0) * PER_ARCHIVE_BYTE[node.kind])


def num_parameters(recipe: Recipe) -> int:
    """About how many parameters the recipe's model has, from its config; 0 where it comes from published weights."""
    return config_parameters((recipe.pretrained.model.config if recipe.pretrained else None) or {})
