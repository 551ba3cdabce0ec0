"""What can be known to fail before anything runs: ranks that do not divide a batch, too little disk.

Factors over the archive's bytes, measured on Chinese text packed by bzip2 (README, "Figures"): an archive byte is about
4.5 bytes of text; text in Parquet zstd takes about as much as the archive; a token stands for 3.3 bytes of text or more
with a vocabulary of the usual size and takes 4 bytes, once in tokens and once in blocks.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flows.dag import Node
from flows.estimate import config_parameters
from flows.plan import Step
from flows.recipe import Recipe
from flows.settings import free_bytes
from tasks.errors import DiskSpaceError
from tasks.machine import Machine
from tasks.report.numbers import size
from tasks.store import ArtifactStore
from tasks.store.reason import listed
from tasks.training.adapter import AdapterSpec, check_machine
from tasks.training.optimization import OptimizationSpec
from tasks.training.plan import derive_batch

TEXT_PER_ARCHIVE_BYTE = 4.5
PER_ARCHIVE_BYTE = {"archive": 1.0, "documents": 1.2, "tokens": 5.5, "blocks": 5.5, "examples": 12.0}
# Twice what documents of Sequence Monkey have (100,000 are 57 million ids): where documents are counted, they are what is read.
TEXT_BYTES_PER_DOCUMENT = 4_000
# Weights in bf16 and, for two checkpoints, weights, fp32 weights and two Adam moments.
BYTES_PER_PARAMETER = {"pretrained": 2 + 2 * 14, "finetuned": 2 + 2 * 14, "adapter": 2}


def check_ranks(nodes: Iterable[Node], machine: Machine) -> None:
    """Raise SettingsError where this machine's ranks and a global batch, or its ZeRO stage and an adapter, do not go together."""
    for node in nodes:
        if isinstance(node.spec, OptimizationSpec):
            derive_batch(node.spec.global_batch_size, machine.training)
        if isinstance(node.spec, AdapterSpec):
            check_machine(node.spec, machine.training)


@dataclass(frozen=True)
class Space:
    """The disk that a plan needs: bytes by the stage still to be built, those of which it is not known, and on what it rests.

    is_by_rule: nothing of the store tells what some of the stages take, and the factors above are all there is.
    """

    needed: Mapping[str, int]
    unknown: tuple[str, ...]
    is_by_rule: bool

    @property
    def num_bytes(self) -> int:
        return sum(self.needed.values())

    def told(self) -> str:
        """In a line."""
        if not self.needed:
            return "nothing to be written"
        parts = [f"about {size(self.num_bytes)} to be written"]
        if self.is_by_rule and self.num_bytes:
            parts.append("by rules of thumb, for the store has no run of such a recipe to go by")
        if self.unknown:
            parts.append(f"without {listed(list(self.unknown))}: how large the source is cannot be known now")
        return "; ".join(parts)


def check_space(recipe: Recipe, steps: Iterable[Step], store: ArtifactStore) -> Space:
    """What the steps still to be built need. Raises DiskSpaceError where the store's disk has less."""
    space, free = space_of(recipe, list(steps)), free_bytes(store.root)
    if space.num_bytes > free:
        largest = max(space.needed, key=lambda name: space.needed[name])
        raise DiskSpaceError(
            f"{store.root}: {size(free)} free, the plan needs about {size(space.num_bytes)} "
            f"({largest} {size(space.needed[largest])}); free some or name another store with --store"
        )
    return space


def space_of(recipe: Recipe, steps: Sequence[Step]) -> Space:
    """What the steps still to be built need: by what the nearest artifact took where there is one, else by the factors."""
    waiting = [step for step in steps if step.status != "found"]
    by_rule = {step.node.name: _by_rule(recipe, step, steps) for step in waiting if step.estimate is None}
    told = {step.node.name: step.estimate.peak_disk_bytes for step in waiting if step.estimate}
    known = {name: num_bytes for name, num_bytes in by_rule.items() if num_bytes is not None}
    return Space({**told, **known}, tuple(name for name, num_bytes in by_rule.items() if num_bytes is None), bool(known))


def _by_rule(recipe: Recipe, step: Step, steps: Iterable[Step]) -> int | None:
    """What a step needs, by the factors; None where its source's size is not known."""
    node = step.node
    if node.kind in BYTES_PER_PARAMETER:
        return BYTES_PER_PARAMETER[node.kind] * num_parameters(recipe)
    source = {"archive": node.name, "examples": "conversations"}.get(node.kind, "archive")
    archive = next((other for other in steps if other.node.name == source), None)
    if archive is None or node.kind not in PER_ARCHIVE_BYTE:
        return 0
    num_bytes = archive.artifact.num_bytes if archive.artifact else archive.published_bytes
    most = recipe.documents.max_documents if recipe.documents and source == "archive" and node.kind != "archive" else None
    if most is not None:  # known whatever the archive's size is
        num_bytes = min(num_bytes or sys.maxsize, int(most * TEXT_BYTES_PER_DOCUMENT / TEXT_PER_ARCHIVE_BYTE))
    return None if num_bytes is None else int(num_bytes * PER_ARCHIVE_BYTE[node.kind])


def num_parameters(recipe: Recipe) -> int:
    """About how many parameters the recipe's model has, from its config; 0 where it comes from published weights."""
    return config_parameters((recipe.pretrained.model.config if recipe.pretrained else None) or {})
