"""What training takes of this machine's memory: preset, estimate and largest micro batch of each training stage of a plan."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flows.plan import Step
from tasks.errors import SeqmillError
from tasks.machine import Machine
from tasks.training.choice import Choice, choose
from tasks.training.memory import Load
from tasks.training.model import read_config
from tasks.training.optimization import OptimizationSpec
from tasks.training.pretrained import PretrainedSpec


def memory_rows(steps: Iterable[Step], machine: Machine) -> dict[str, dict[str, Any]]:
    """By stage: what ``seqmill plan --json`` tells under "memory". A stage whose model is not known yet is left out.

    Raises SettingsError where ranks and batch do not go together, or no preset fits.
    """
    by_name = {step.node.name: step for step in steps}
    rows = {}
    for name, step in by_name.items():
        config, vocab_size = _config(step, by_name), _vocab_size(by_name)
        if isinstance(step.node.spec, OptimizationSpec) and config and (vocab_size := config.get("vocab_size", vocab_size)):
            rows[name] = _row(_choice(step, by_name, config, vocab_size, machine))
    return rows


def table_row(name: str, row: Mapping[str, Any]) -> list[str]:
    """For people: stage, preset, memory a rank, the room there is, micro batch, the largest that fits."""
    told = [f"{row[field] / 1e9:.2f} GB" if row[field] else "?" for field in ("rank_bytes", "room_bytes")]
    return [name, row["preset"], str(row["num_ranks"]), *told, str(row["micro_batch_size"]), str(row["largest_micro_batch"])]


HEADER = ["stage", "preset", "ranks", "memory a rank", "of", "micro batch", "largest that fits"]


def _choice(step: Step, by_name: Mapping[str, Step], config: Mapping[str, Any], vocab_size: int, machine: Machine) -> Choice:
    spec, inputs = step.node.spec, step.node.inputs
    assert isinstance(spec, OptimizationSpec)
    rows = by_name[inputs["blocks"] if "blocks" in inputs else inputs["examples"]]
    attention = spec.model.attention if isinstance(spec, PretrainedSpec) else "sdpa"
    load = Load.of(spec, rows.node.spec.block_size, attention)  # type: ignore[attr-defined]
    return choose(config, vocab_size, spec.global_batch_size, load, machine.training, where=step.node.name)


def _row(choice: Choice) -> dict[str, Any]:
    estimated, is_on_gpu = choice.estimate, choice.room.device_bytes is not None
    return {
        "preset": choice.preset,
        "num_ranks": choice.batch.num_ranks,
        "micro_batch_size": choice.batch.micro_batch_size,
        "accumulation": choice.batch.accumulation,
        "largest_micro_batch": choice.most_rows,
        "rank_bytes": (estimated.on_device if is_on_gpu else estimated.total) if estimated else None,
        "room_bytes": choice.room.bytes,
        "estimate": estimated.row() if estimated else None,
    }


def _config(step: Step, by_name: Mapping[str, Step]) -> dict[str, Any] | None:
    """The config of the model that a stage trains: as the recipe spells it, or as its weights' folder does."""
    spec = step.node.spec
    if isinstance(spec, PretrainedSpec):
        if spec.model.config:
            return spec.model.config
        folders = [step.artifact.path] if step.artifact else [Path(spec.model.weights or "").expanduser()]
    else:
        base = by_name.get(step.node.inputs.get("base", ""))
        if base and not base.artifact:
            return _config(base, by_name)
        folders = [base.artifact.path] if base and base.artifact else []
    try:
        return next((read_config(folder) for folder in folders if (folder / "config.json").is_file()), None)
    except SeqmillError:
        return None  # the stage itself tells what is wrong with it


def _vocab_size(by_name: Mapping[str, Step]) -> int | None:
    """The tokenizer's, where it is known."""
    tokenizer = by_name.get("tokenizer")
    if tokenizer is None:
        return None
    if tokenizer.artifact:
        return int(tokenizer.artifact.stats["vocab_size"])
    training = getattr(tokenizer.node.spec, "train", None)
    return training.vocab_size if training else None
