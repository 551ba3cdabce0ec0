"""Training metrics to curves and plots.

Reads   manifests of pretrained, finetuned, adapter: stats, produced_by.metrics
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log as ln
from typing import Any

from tasks.report.numbers import count, duration, percent, size, whole
from tasks.report.plots import Plot, Point, curve_plot, loss_plot
from tasks.store import Artifact

TITLES = {"pretrained": "Pretraining", "finetuned": "Finetuning", "adapter": "Adapter"}

# The metric, its plot's name and title, the axis, and whether the axis begins at 0.
CURVES = (
    ("learning_rate", "learning-rate", "Learning rate", "learning rate", True),
    ("grad_norm", "gradient-norm", "Gradient norm", "gradient norm", True),
    ("tokens_per_second", "throughput", "Throughput", "tokens per second", True),
    ("mfu", "mfu", "MFU", "share of peak", True),
)


@dataclass(frozen=True)
class Training:
    """One training run as the report tells it."""

    name: str
    title: str
    facts: tuple[tuple[str, str], ...]
    validation: tuple[Point, ...]
    plots: tuple[Plot, ...]


def training_of(name: str, artifact: Artifact, bits: float | None) -> Training:
    """The run that made ``artifact``. bits: what turns its validation loss into bits per byte; None where it is another text."""
    metrics = artifact.manifest.produced_by.get("metrics", [])
    train, validation = points(metrics, "loss"), points(metrics, "validation_loss")
    plots = [loss_plot(f"{name}-loss", "Loss", train, validation, bits)] if train or validation else []
    for metric, file, title, label, from_zero in CURVES if name == "pretrained" else ():
        if curve := points(metrics, metric):
            plots.append(curve_plot(file, title, label, curve, from_zero=from_zero))
    return Training(name, TITLES.get(name, name.removeprefix("adapter_")), tuple(facts(artifact)), validation, tuple(plots))


def points(metrics: list[dict[str, Any]], name: str) -> tuple[Point, ...]:
    """(step, value) of every report that has the metric."""
    return tuple((row["step"], row[name]) for row in metrics if row.get(name) is not None)


def facts(artifact: Artifact) -> list[tuple[str, str]]:
    """What is worth a line: size, length, machine, of what the manifest tells."""
    stats, produced_by = artifact.stats, artifact.manifest.produced_by
    told: list[tuple[str, str]] = []
    if "num_trainable_parameters" in stats:
        told.append(("Trainable parameters", count(stats["num_trainable_parameters"])))
    if "num_parameters" in stats:
        told.append(("Parameters", count(stats["num_parameters"])))
    if "num_steps" in stats:
        told.append(("Steps", whole(stats["num_steps"])))
    if rows := artifact.spec.get("global_batch_size"):
        told.append(("Rows a step", f"{whole(rows)}{_shared_out(produced_by)}"))
    if rate := produced_by.get("tokens_per_second"):
        told.append(("Tokens per second", count(rate)))
    if share := produced_by.get("mfu"):
        told.append(("MFU", percent(share)))
    if memory := produced_by.get("peak_memory_bytes"):
        told.append(("Peak memory of rank 0", size(memory)))
    for name, label in (("num_ranks", "Ranks"), ("zero_stage", "ZeRO stage"), ("resumed_from", "Resumed from step")):
        if produced_by.get(name) is not None:
            told.append((label, str(produced_by[name])))
    if "seconds" in produced_by:
        told.append(("Built in", duration(produced_by["seconds"])))
    return told


def _shared_out(produced_by: Mapping[str, Any]) -> str:
    parts = [produced_by.get(name) for name in ("num_ranks", "accumulation", "micro_batch_size")]
    return f" = {' × '.join(map(str, parts))}" if all(parts) else ""


def bits_per_loss(blocks: Artifact | None) -> float | None:
    """Bits per byte for a validation loss of 1 nat a token: ln 2 and the split's tokens per byte."""
    split: Mapping[str, int] = blocks.stats["validation"] if blocks else {}
    return split["num_tokens"] / split["num_bytes"] / ln(2) if split.get("num_bytes") else None
