"""Saving while training goes on: the state is copied aside, written by a thread of each rank, and sealed at a later step's end.

Writes  checkpoints/checkpoint-<step>/rank-<rank>.safetensors   by each rank
        checkpoints/checkpoint-<step>/progress.json             by rank 0: where AdamW and the schedule stand
        checkpoints/checkpoint-<step>/trainer_state.json        by rank 0: Trainer's count of steps
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tasks.errors import SeqmillError, StoreError, WorkerError
from tasks.store import digest_bytes, write_atomically
from tasks.training.checkpoints import part_name, prune_checkpoints, seal_checkpoint
from tasks.training.rank import local_rank, num_ranks, rank
from tasks.training.state import Snapshot, write_snapshot

log = logging.getLogger(__name__)

PROGRESS = "progress.json"
TRAINER_STATE = "trainer_state.json"


class Ranks:
    """What the ranks tell one another outside training, in host memory: no GPU is waited for."""

    def __init__(self) -> None:
        self.several = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo") if self.several and dist.get_backend() != "gloo" else None

    def any(self, *answers: bool) -> list[bool]:
        """For each answer, whether some rank says yes."""
        if not self.several:
            return list(answers)
        flags = torch.tensor(answers, dtype=torch.uint8)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in flags.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values


@dataclass
class Saving:
    """One checkpoint on its way to disk."""

    folder: Path
    step: int
    stopped_seconds: float
    started: float = field(default_factory=time.monotonic)
    files: dict[str, Any] = field(default_factory=dict)  # written by this rank: size and digest
    error: SeqmillError | None = None
    thread: threading.Thread | None = None


class CheckpointWriter:
    """Writes checkpoints of one run, one at a time.

    is_spread: ``root`` is another folder on every node, and each is sealed. on_sealed: told the step, on rank 0.
    """

    def __init__(
        self,
        root: Path,
        facts: dict[str, Any],
        ranks: Ranks,
        *,
        is_spread: bool = False,
        on_sealed: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.root, self.facts, self.ranks, self.on_sealed = root, facts, ranks, on_sealed
        self.is_sealing = rank() == 0 or (is_spread and local_rank() == 0)
        self.saving: Saving | None = None

    def begin(self, step: int, tensors: Snapshot, notes: dict[str, bytes], stopped_seconds: float) -> None:
        """Write this rank's tensors, and on rank 0 the notes (name: bytes), in the background. The last one must be sealed."""
        assert self.saving is None
        saving = self.saving = Saving(self.root / f"checkpoint-{step}", step, stopped_seconds)
        saving.thread = threading.Thread(target=_write, args=(saving, tensors, notes), name=saving.folder.name, daemon=True)
        saving.thread.start()

    def is_writing(self) -> bool:
        """Whether this rank's part is still being written."""
        return bool(self.saving and self.saving.thread and self.saving.thread.is_alive())

    def finish(self) -> None:
        """Wait until every rank has written its part, and seal; on all ranks at the same step, nothing where none is open.

        Raises, on all ranks, what kept one from writing: StoreError, or WorkerError for numbers that are not finite.
        """
        saving = self.saving
        if saving is None:
            return
        assert saving.thread
        saving.thread.join()
        parts = self.ranks.gather((saving.files, saving.error))
        if errors := [error for _, error in parts if error]:
            raise errors[0]
        if self.is_sealing:
            self._seal(saving, {name: entry for part, _ in parts for name, entry in part.items()})
        if rank() == 0:
            self.on_sealed(saving.step)
            seconds = time.monotonic() - saving.started
            log.info("%s: training stopped %.2f s, sealed after %.1f s", saving.folder.name, saving.stopped_seconds, seconds)
        self.saving = None

    def _seal(self, saving: Saving, files: dict[str, Any]) -> None:
        try:
            seal_checkpoint(saving.folder, {**self.facts, "step": saving.step}, files)
        except OSError as error:
            raise StoreError(
                f"{saving.folder}: cannot be sealed ({error}); mend that and run again, to go on from the newest whole checkpoint"
            ) from error
        try:
            prune_checkpoints(self.root)
        except OSError as error:
            where = error.filename or self.root
            log.warning("%s: cannot be deleted (%s); tried again at the next checkpoint", where, error.strerror or error)


def _write(saving: Saving, tensors: Snapshot, notes: dict[str, bytes]) -> None:
    """Never raises: an exception would end this thread alone, and the others' parts would be sealed as a whole checkpoint."""
    remedy = "mend that and run again, to go on from the checkpoint before it"
    where = f"{saving.folder}: rank {rank()} of {num_ranks()} cannot write it"
    try:
        _write_part(saving, tensors, notes)
    except SeqmillError as error:
        saving.error = error
    except OSError as error:
        saving.error = StoreError(f"{where} ({error.strerror or error}); {remedy}")
    except Exception as error:  # such as memory that is used up
        log.warning("%s", where, exc_info=True)
        saving.error = WorkerError(f"{where} ({type(error).__name__}: {error}); {remedy}")


def _write_part(saving: Saving, tensors: Snapshot, notes: dict[str, bytes]) -> None:
    if lost := next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None):
        raise WorkerError(
            f"{saving.folder}: not kept: {lost} holds numbers that are not finite; lower learning_rate or raise warmup_steps, "
            "the checkpoint before it is kept"
        )
    saving.folder.mkdir(parents=True, exist_ok=True)
    name = part_name(rank())
    saving.files[name] = write_snapshot(saving.folder / name, tensors)
    for note, data in notes.items():
        write_atomically(saving.folder / note, data)
        saving.files[note] = {"num_bytes": len(data), "digest": digest_bytes(data)}
