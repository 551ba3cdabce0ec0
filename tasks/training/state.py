"""The training state by weight: AdamW's fp32 weights and moments, wherever a ZeRO stage keeps them.

A file names every number by weight and place, never by rank or ZeRO stage: any number of ranks under any stage reads what
any other wrote.

Reads   checkpoint-<step>/rank-<rank>.safetensors   "<part>:<start>:<weight>": part is weight, exp_avg or exp_avg_sq
Writes  the same
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tasks.errors import StoreError, WorkerError
from tasks.store.digest import write_all
from tasks.training.checkpoints import PARTS as FILES
from tasks.training.checkpoints import WEIGHT, listed_files

MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = (WEIGHT, *MOMENTS)
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # safetensors' names

Snapshot = dict[str, Tensor]


@dataclass(frozen=True)
class Piece:
    """The numbers [start, start + count) of one flattened weight, as this rank holds them for its optimizer."""

    name: str
    start: int
    count: int
    held: Tensor  # the optimizer's own tensor, which they are a part of; its moments have the same shape
    offset: int  # where they begin in ``held``, flattened

    def of(self, tensor: Tensor) -> Tensor:
        """These numbers in ``held`` or in a moment of it: a view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def pieces(engine: Any) -> Iterator[Piece]:
    """What this rank holds of the trained weights; all ranks together hold each number at least once."""
    optimizer, names = engine.optimizer, engine.param_names
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield from _of_stage_3(optimizer, names)
    elif hasattr(optimizer, "bit16_groups"):
        yield from _of_stages_1_and_2(optimizer, optimizer.bit16_groups, optimizer.bit16_groups_flat, names)
    elif hasattr(optimizer, "bf16_groups"):  # stage 1 that sums gradients in fp32
        yield from _of_stages_1_and_2(optimizer, optimizer.bf16_groups, optimizer.bf16_groups_flat, names)
    else:
        yield from _of_stage_0(optimizer, names)


def _of_stage_0(optimizer: Any, names: dict[Any, str]) -> Iterator[Piece]:
    """Every rank holds all: in bf16 an fp32 copy, in fp32 the weight itself."""
    held = base_optimizer(optimizer).param_groups
    weights = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in held]
    for own, group in zip(weights, held, strict=True):
        for weight, copy in zip(own, group["params"], strict=True):
            yield Piece(names[weight], 0, weight.numel(), copy, 0)


def _of_stages_1_and_2(optimizer: Any, groups: Any, flats: Any, names: dict[Any, str]) -> Iterator[Piece]:
    """A group's weights lie in one tensor, in DeepSpeed's order, cut into as many equal parts as there are ranks."""
    held = base_optimizer(optimizer).param_groups
    for weights, flat, ranks, group in zip(groups, flats, optimizer.real_dp_process_group, held, strict=True):
        (part,) = group["params"]
        first = torch.distributed.get_rank(group=ranks) * part.numel()
        for weight in weights:
            # By address: DeepSpeed's own _hp_mapping tells another place under round_robin_gradients.
            place = (weight.data_ptr() - flat.data_ptr()) // weight.element_size()
            start, end = max(first - place, 0), min(first + part.numel() - place, weight.numel())
            if start < end:
                yield Piece(names[weight], start, end - start, part, place + start - first)


def _of_stage_3(optimizer: Any, names: dict[Any, str]) -> Iterator[Piece]:
    """Each weight by itself is cut into as many equal parts as there are ranks; the last is filled up."""
    rank = torch.distributed.get_rank(group=optimizer.dp_process_group)
    for weights, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for weight in weights:
            size = weight.partition_numel()
            start = rank * size
            if (count := min(size, weight.ds_numel - start)) > 0:
                yield Piece(names[weight], start, count, flat, offset)
            offset += size


def base_optimizer(optimizer: Any) -> Any:
    """AdamW itself, within what DeepSpeed wraps around it."""
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def snapshot(engine: Any, share: int, num_shares: int) -> tuple[Snapshot, float]:
    """A copy, in host memory, of what this rank writes of the training state; and how many steps AdamW has made.

    Where every rank holds all, each writes every ``num_shares``-th weight.
    """
    state = base_optimizer(engine.optimizer).state
    held = list(pieces(engine))
    num_steps = _num_steps({piece.name: float(state[piece.held].get("step", 0)) for piece in held})
    if engine.zero_optimization_stage() == 0:
        held = held[share::num_shares]
    tensors = {}
    for piece in held:
        parts = {WEIGHT: piece.held, **{name: state[piece.held][name] for name in MOMENTS}}
        for part, tensor in parts.items():
            tensors[f"{part}:{piece.start}:{piece.name}"] = piece.of(tensor).to("cpu", copy=True)
    return tensors, num_steps


def _num_steps(counts: dict[str, float]) -> float:
    """How many steps AdamW has made, which a checkpoint tells once for all weights."""
    num_steps = max(counts.values(), default=0.0)
    if idle := next((name for name, count in counts.items() if count < num_steps), None):
        raise WorkerError(
            f"checkpoint: {idle} had a gradient in {counts[idle]:g} of {num_steps:g} steps, and ZeRO-0 leaves such a weight out "
            "of a step; give --deepspeed zero1, which leaves none out"
        )
    return num_steps


def write_snapshot(path: Path, tensors: Snapshot) -> dict[str, Any]:
    """Write a safetensors file and put it on disk; returns its size and digest, taken on the way."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as target:
        for view in (memoryview(len(header).to_bytes(8, "little")), memoryview(header), *map(_bytes, tensors.values())):
            digest.update(view)
            num_bytes += len(view)
            write_all(target, view)
        os.fsync(target.fileno())
    return {"num_bytes": num_bytes, "digest": digest.hexdigest()}


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())


class SavedState:
    """The training state in a checkpoint's files, read by weight and place."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.has_all = folder, True
        self.places: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}  # (part, weight): start, end, slice
        # Not what else is there: a node that was lost may have written after the others went on with fewer ranks.
        for path in sorted(folder / name for name in listed_files(folder) if fnmatch(name, FILES)):
            if not path.is_file():
                self.has_all = False
                continue  # ``check`` misses its numbers
            file: Any = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118  # not a mapping: it cannot be iterated over
                part, start, name = key.split(":", 2)
                numbers = file.get_slice(key)
                end = int(start) + numbers.get_shape()[0]
                self.places.setdefault((part, name), []).append((int(start), end, numbers))

    def check(self, weights: dict[str, int]) -> None:
        """Raise StoreError unless the files hold exactly these weights (name: count of numbers), each whole."""
        held = {name for _, name in self.places}
        for name in sorted(held ^ set(weights)):
            raise StoreError(f"{self.folder}: weight {name} is {'only there' if name in held else 'missing'}; {self._remedy}")
        for part in PARTS:
            for name, count in weights.items():
                end = 0
                for start, stop, _ in sorted(self.places.get((part, name), []), key=lambda place: place[:2]):
                    end = max(end, stop) if start <= end else end
                if end != count:
                    raise StoreError(f"{self.folder}: {part} of {name} ends at {end}, not {count}; {self._remedy}")

    @property
    def _remedy(self) -> str:
        return f"delete {self.folder} to go on from the checkpoint before it"

    def read_into(self, target: Tensor, part: str, name: str, start: int = 0) -> None:
        """Fill a flat ``target`` with the numbers of a weight from ``start`` on. Raises StoreError where some are missing."""
        end, reached = start + target.numel(), start
        for first, last, numbers in sorted(self.places.get((part, name), []), key=lambda place: place[:2]):
            begin, stop = max(start, first), min(end, last)
            if begin < stop:
                target[begin - start : stop - start].copy_(numbers[begin - first : stop - first])
                reached = max(reached, stop) if begin <= reached else reached
        if reached < end:
            raise StoreError(f"{self.folder}: {part} of {name} is missing from {reached} to {end}; {self._remedy}")


def restore(engine: Any, folder: Path, num_steps: float, *, is_own: bool = False, is_partial: bool = False) -> None:
    """Give the engine the training state in a checkpoint's files, after ``num_steps`` steps of AdamW; on all ranks at once.

    is_own: each rank reads the file alone that a rank of its number wrote. is_partial: what no rank of this node reads need not
    be here.
    """
    saved, optimizer = SavedState(folder), engine.optimizer
    if saved.has_all or not is_partial:
        weights = [(name, weight) for name, weight in engine.module.named_parameters() if weight.requires_grad]
        saved.check({name: getattr(weight, "ds_numel", weight.numel()) for name, weight in weights})
    is_spread = hasattr(optimizer, "fp32_partitioned_groups_flat")
    if is_spread:
        optimizer.checkpoint_event_prologue()
    with torch.no_grad():
        _restore_optimizer(engine, saved, num_steps, is_own=is_own)
        if is_spread:
            _refresh_spread_weights(optimizer)
            optimizer.checkpoint_event_epilogue()
        elif hasattr(optimizer, "update_lp_params"):  # stages 1 and 2: as after a step, each rank's are gathered by all
            optimizer.update_lp_params()
        else:
            of_name = dict(engine.module.named_parameters())
            for piece in pieces(engine):
                weight = of_name[piece.name]
                weight.copy_(piece.of(piece.held).view_as(weight))


def _restore_optimizer(engine: Any, saved: SavedState, num_steps: float, *, is_own: bool) -> None:
    optimizer = base_optimizer(engine.optimizer)
    is_fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    is_told = is_own and engine.zero_optimization_stage() == 0 and torch.distributed.get_world_size() > 1
    for number, piece in enumerate(pieces(engine)):
        state = optimizer.state[piece.held]
        for moment in MOMENTS:
            if moment not in state:  # AdamW makes them at its first step
                state[moment] = torch.zeros_like(piece.held, memory_format=torch.preserve_format)
        state["step"] = torch.tensor(num_steps, dtype=torch.float32, device=piece.held.device if is_fused else "cpu")
        writer = number % torch.distributed.get_world_size() if is_told else None  # as in ``snapshot``
        for part, tensor in ((WEIGHT, piece.held), *((moment, state[moment]) for moment in MOMENTS)):
            numbers = piece.of(tensor)
            if writer in (None, torch.distributed.get_rank()):
                saved.read_into(numbers, part, piece.name, piece.start)
            if writer is not None:
                torch.distributed.broadcast(numbers, writer)


def _refresh_spread_weights(optimizer: Any) -> None:
    """Bring ZeRO-3's weights of computation in line with the fp32 ones."""
    for flat, master, parts in zip(
        optimizer.fp16_partitioned_groups_flat,
        optimizer.fp32_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups,
        strict=True,
    ):
        flat.copy_(master)
        for part, values in zip(parts, optimizer.unflatten(flat, parts), strict=True):
            part.data = values.data
