"""Train on the nodes that are there: muster them, and go on without one that is lost.

Writes  <checkpoints>/<kind>/<key>/   where the settings name a folder for them; swept once the artifact is in the store, as are
                                      those in a bucket
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tasks.errors import StoreError, WorkerError
from tasks.store import ArtifactStore, Digest, SharedStore, Work
from tasks.training.checkpoints import checkpoint_folders, step_of
from tasks.training.nodes.crew import Crew, crew_of
from tasks.training.nodes.nodes import CHECKPOINTS, STORE
from tasks.training.nodes.party import NodeLostError, Party
from tasks.training.plan import most_ranks
from tasks.training.remote import forget, remote_of, sweep_remote

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST_VAIN = 5  # losses in a row, without progress: a node that dies at every start is no node


def on_nodes(work: Work, kind: str, global_batch_size: int, train: Callable[[Work, Party | None], T]) -> T:
    """Call ``train`` with a machine that has as many ranks as all nodes of a party; again, with another, after a loss."""
    settings = work.machine.training
    if settings.checkpoints:
        sweep(settings.checkpoints, work.store)
    elif isinstance(work.store, SharedStore):
        sweep_remote(work.store)
    if settings.nodes is None:
        return train(work, None)
    slots = most_ranks(settings)
    crew = crew_of(settings.nodes)
    step, num_vain = -1, 0
    with crew.turn():
        while num_vain < MOST_VAIN:
            party = _party(crew, work, kind, slots, global_batch_size)
            own = replace(settings, nodes=None, num_ranks=sum(party.ranks))
            try:
                return train(replace(work, machine=replace(work.machine, training=own)), party if party.members else None)
            except NodeLostError as error:
                log.warning("%s; the others go on from the newest whole checkpoint", error)
            reached = _newest_step(work)
            step, num_vain = (reached, 0) if reached > step else (step, num_vain + 1)
    raise WorkerError(
        f"{kind}: nodes were lost {MOST_VAIN} times in a row without a checkpoint in between; look at what ends them, or lower "
        "checkpoint_steps in the recipe, and run again to go on"
    )


def _newest_step(work: Work) -> int:
    folder = next(checkpoint_folders(checkpoint_root(work)), None)
    return step_of(folder) if folder else 0


def _party(crew: Crew, work: Work, kind: str, slots: int, global_batch_size: int) -> Party:
    remote = remote_of(work)
    # Of a bucket, each node has a folder of its own for them.
    checkpoints = checkpoint_root(work) if remote else work.machine.training.checkpoints
    roots = {**({CHECKPOINTS: checkpoints} if checkpoints else {}), STORE: work.store.root}
    cache = work.store.cache if isinstance(work.store, SharedStore) else None
    return Party(crew, crew.muster(kind, slots, global_batch_size), roots, work.machine.training.launcher, remote, cache=cache)


def checkpoint_root(work: Work) -> Path:
    """The folder of one artifact's checkpoints."""
    shared = work.machine.training.checkpoints
    return shared / work.folder.parent.name / work.folder.name if shared else work.scratch / "checkpoints"


def forget_checkpoints(work: Work) -> None:
    """Delete the checkpoints of what is in the store now. Those in its staging went with that."""
    if remote := remote_of(work):
        try:
            forget(remote.store, remote.kind, remote.key)
        except StoreError as error:
            log.warning("%s; the next training deletes its checkpoints", error)
    elif work.machine.training.checkpoints:
        shutil.rmtree(checkpoint_root(work), ignore_errors=True)


def sweep(checkpoints: Path, store: ArtifactStore) -> None:
    """Delete the checkpoints of what is in the store by now."""
    for folder in checkpoints.glob("*/*"):
        if len(folder.name) == 64 and store.load(folder.parent.name, Digest(folder.name)):
            log.info("%s: the artifact is built; its checkpoints are deleted", folder)
            shutil.rmtree(folder, ignore_errors=True)
