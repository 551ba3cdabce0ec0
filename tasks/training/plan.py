"""The plan: all that launcher and worker share, and how a step's rows are shared out over this machine's ranks."""

import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from tasks.errors import SettingsError
from tasks.machine import TrainingSettings
from tasks.training.nodes.nodes import share_out
from tasks.training.room import gpu_bytes

HOST_SLOTS = re.compile(r"^\s*[^#\s]\S*\s+slots\s*=\s*(\d+)")


@dataclass(frozen=True)
class Batch:
    """How the rows of a step are shared out: ranks x accumulation x micro batch size = global batch size."""

    num_ranks: int
    accumulation: int
    micro_batch_size: int


@dataclass(frozen=True)
class TrainingPlan:
    """What the worker is told; written as JSON, every path a plain string."""

    label: str
    model: dict[str, Any]  # "config" (of a new model) or "folder" (of weights); "attention"
    train_files: list[str]
    validation_files: list[str]
    block_size: int
    vocab_size: int  # of the tokenizer
    num_steps: int
    batch: dict[str, int]
    optimization: dict[str, Any]
    deepspeed: dict[str, Any]
    output_dir: str
    checkpoint_dir: str
    resume_from: str | None
    is_validation_due: bool  # before the first step
    facts: dict[str, Any]  # what a checkpoint belongs to
    result_path: str
    stop_path: str  # exists once the run is to save a checkpoint and end
    halt_path: str  # where the worker writes at which rows it ended, and why
    boundary_id: int | None = None  # closes the documents that are not to see each other
    adapter: dict[str, Any] | None = None  # what is added to a frozen base: "method", "fields", ...
    generation: dict[str, Any] = field(default_factory=dict)  # fields of generation_config.json
    train_counts: list[int] = field(default_factory=list)  # the rows of each of train_files
    is_arriving: bool = False  # train_files come here while the ranks train: see tasks.training.arrivals
    is_spread: bool = False  # checkpoint_dir is each node's own, with the files of its ranks: see tasks.training.remote

    def write(self, path: Path) -> None:
        path.write_bytes(orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2))


def derive_batch(global_batch_size: int, settings: TrainingSettings, most_rows: int | None = None) -> Batch:
    """Share a step out over this machine. ``most_rows``: those that fit in a micro batch; None: any number.

    Raises SettingsError where the numbers do not divide.
    """
    num_ranks = derive_num_ranks(global_batch_size, settings)
    rows = global_batch_size // num_ranks
    if num_ranks * rows != global_batch_size:
        raise SettingsError(
            f"training.num_ranks: {num_ranks} ranks do not divide the recipe's global_batch_size {global_batch_size}; "
            f"set training.num_ranks to one of {_divisors(global_batch_size, num_ranks)}"
        )
    most = max(1, rows if most_rows is None else min(rows, most_rows))
    micro = settings.micro_batch_size or max(size for size in range(1, most + 1) if rows % size == 0)
    if micro < 1 or rows % micro:
        raise SettingsError(
            f"training.micro_batch_size: {micro} x {num_ranks} ranks does not divide the recipe's global_batch_size "
            f"{global_batch_size}; set training.micro_batch_size to one of {_divisors(rows, rows)}"
        )
    return Batch(num_ranks, rows // micro, micro)


def derive_num_ranks(global_batch_size: int, settings: TrainingSettings) -> int:
    """The ranks asked for, else those of the hostfile, else one a GPU, else the most cores that divide the batch.

    Of several nodes: those of as many nodes like this one as are at least to be there.
    """
    if settings.nodes:
        return sum(share_out([most_ranks(settings)] * settings.nodes.least, global_batch_size))
    if settings.num_ranks is not None:
        if settings.num_ranks < 1:
            raise SettingsError(f"training.num_ranks: {settings.num_ranks}; give 1 or more")
        return settings.num_ranks
    if settings.hostfile:
        return count_slots(settings.hostfile)
    if num_gpus := len(gpu_bytes()):
        if settings.num_slots > 1:
            raise SettingsError(
                f"training_slots: {settings.num_slots}, and {num_gpus} GPUs, which are not shared out among stages; set it to 1"
            )
        return num_gpus
    cores = max(1, num_cores() // settings.num_slots)
    return max(size for size in range(1, cores + 1) if global_batch_size % size == 0)


def most_ranks(settings: TrainingSettings) -> int:
    """The most ranks of this machine in a training on several, whose batch may not divide by all of them."""
    return settings.num_ranks or len(gpu_bytes()) or max(1, num_cores() // settings.num_slots)


def count_slots(hostfile: Path) -> int:
    """The sum of the slots in a DeepSpeed hostfile, whose lines read ``host slots=8``."""
    try:
        lines = hostfile.read_text().splitlines()
    except OSError as error:
        raise SettingsError(f"{hostfile}: cannot be read ({error.strerror}); give a hostfile") from error
    slots = sum(int(found[1]) for line in lines if (found := HOST_SLOTS.match(line)))
    if not slots:
        raise SettingsError(f"{hostfile}: no line reads `host slots=8`; write one for every host")
    return slots


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _divisors(number: int, most: int) -> str:
    return ", ".join(str(size) for size in range(1, most + 1) if number % size == 0)
