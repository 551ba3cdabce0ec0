"""How a stage is trained on this machine: the cheapest preset that fits, and the largest micro batch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tasks.errors import SettingsError
from tasks.machine import TrainingSettings
from tasks.training.deepspeed import DEFAULT_PRESET, load_deepspeed_config, preset, zero_stage
from tasks.training.memory import Estimate, Load, Shape, estimate
from tasks.training.plan import Batch, derive_batch, derive_num_ranks
from tasks.training.room import Room, room_here

# Presets in the order in which they are tried: each takes less memory than the one before, and more time for it.
CHEAPEST_FIRST = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
# Of a micro batch whose model is not understood: 2^28 logits are 1 GB in fp32.
MOST_LOGITS = 1 << 28
# Beyond so many bytes a larger micro batch makes no CPU faster, and leaves its caches.
MOST_CPU_BYTES = 1 << 30


def fits(estimated: Estimate, room: Room) -> bool:
    """Whether a rank finds the room that it needs."""
    if room.device_bytes is None:
        return estimated.total <= room.host_bytes
    return estimated.on_device <= room.device_bytes and estimated.on_host <= room.host_bytes


def most_rows(shape: Shape, load: Load, deepspeed: dict[str, Any], room: Room) -> int:
    """The most rows of a micro batch that fit; 0 where not one does. On CPU no more than make it faster."""
    most = 0
    for rows in range(1, load.num_rows + 1):
        wanted = estimate(shape, replace(load, num_rows=rows), deepspeed)
        is_large = room.device_bytes is None and wanted.activations + wanted.logits > MOST_CPU_BYTES
        if not fits(wanted, room) or (is_large and rows > 1):
            break
        most = rows
    return most


def cheapest_preset(shape: Shape, load: Load, room: Room, where: str) -> str:
    """The first preset under which a micro batch of one row fits. Raises SettingsError where there is none."""
    configs = {name: load_deepspeed_config(preset(name)) for name in CHEAPEST_FIRST}
    for name, config in configs.items():
        if zero_stage(config) > load.most_zero_stage:
            continue
        tried, wanted = name, estimate(shape, replace(load, num_rows=1), config)
        if fits(wanted, room):
            return name
    raise SettingsError(
        f"{where}: one row under {tried} takes about {wanted.total / 1e9:.1f} GB a rank, there are {room.bytes / 1e9:.1f} GB; "
        "set gradient_checkpointing: true in the recipe, or lower block_size, or train on more ranks"
    )


@dataclass(frozen=True)
class Choice:
    """How a stage will be trained here. ``estimate`` is None, and so is ``most_rows``, where the model's shape is not known."""

    preset: str
    deepspeed: dict[str, Any]
    batch: Batch
    room: Room
    most_rows: int | None
    estimate: Estimate | None

    @property
    def is_enough(self) -> bool:
        return self.estimate is None or fits(self.estimate, self.room)


def choose(
    config: Mapping[str, Any], vocab_size: int, global_batch_size: int, load: Load, settings: TrainingSettings, *, where: str
) -> Choice:
    """The preset and the micro batch for a model's config on this machine. ``load``'s rows and ranks are filled in here.

    Raises SettingsError where ranks, rows and batch do not go together, or where a preset is to be picked and none fits.
    """
    num_ranks = derive_num_ranks(global_batch_size, settings)
    # Stages side by side, each with as many ranks, share the memory as they share the cores.
    room, shape = room_here(num_ranks * settings.num_slots), Shape.of(config, vocab_size)
    most = max(1, global_batch_size // num_ranks)
    load = replace(load, num_ranks=num_ranks, num_rows=most, is_on_gpu=room.device_bytes is not None)
    path = settings.deepspeed_config
    if settings.picks_preset:
        path = preset(cheapest_preset(shape, load, room, where) if shape else DEFAULT_PRESET)
    deepspeed = load_deepspeed_config(path)
    if shape is None:
        rows, estimated = max(1, MOST_LOGITS // (load.block_size * vocab_size)), None
        batch = derive_batch(global_batch_size, settings, rows)
    else:
        rows = most_rows(shape, load, deepspeed, room)
        batch = derive_batch(global_batch_size, settings, rows)
        estimated = estimate(shape, replace(load, num_rows=batch.micro_batch_size), deepspeed)
    name = path.stem if path else DEFAULT_PRESET
    return Choice(name, deepspeed, batch, room, rows if shape else None, estimated)
