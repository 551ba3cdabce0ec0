"""Adapters beside each other, and beside their base: what each one costs, and what it gives.

Reads   manifests of adapters, of their bases and of both's evaluations: stats, produced_by
        config.json of the base
"""

from collections.abc import Iterator
from statistics import median
from typing import Any

import orjson

from tasks.report.numbers import count, duration, percent, share, size, whole
from tasks.report.tables import Artifacts, Table
from tasks.store import Artifact

COLUMNS = (
    "Method", "Trained", "Share", "File", "Memory", "A step", "Loss", "Accuracy", "Tokens/s", "Speed", "Context",
)  # fmt: skip
NOTE = (
    "Trained: parameters. Memory: the most that a rank had. A step: the median. Loss: of answers to held-out conversations, in "
    "nats a token. Tokens/s: one text at a time; speed: against the base. Context: the positions left for text. What is measured "
    "in seconds and bytes depends on the machine and its other work."
)
NO_VALUE = "–"


def compared(artifacts: Artifacts) -> list[str]:
    """The names of the adapters' nodes that a recipe compares."""
    return [name for name, artifact in artifacts.items() if artifact.kind == "adapter" and name != "adapter"]


def shown_name(name: str) -> str:
    """How a table calls a model: an adapter that is compared by its own name."""
    return name.removeprefix("adapter_")


def comparison_table(artifacts: Artifacts) -> Table | None:
    """One row a base and one an adapter; None where no adapters are compared."""
    names = compared(artifacts)
    if not names:
        return None
    rows = [row for base in bases(artifacts, names) for row in _group(artifacts, base, names)]
    return Table(COLUMNS, tuple(rows), note=NOTE)


def bases(artifacts: Artifacts, names: list[str]) -> list[str]:
    """The nodes that the named adapters stand on, in data order."""
    contents = {artifacts[name].manifest.identity["inputs"]["base"] for name in names}
    return [name for name, artifact in artifacts.items() if artifact.content in contents and artifact.kind != "adapter"]


def _group(artifacts: Artifacts, base: str, names: list[str]) -> Iterator[tuple[str, ...]]:
    """A base and what stands on it."""
    model, evaluation = artifacts[base], artifacts.get(f"evaluation_{base}")
    positions, speed = num_positions(model), decoding_rate(evaluation)
    context = NO_VALUE if positions is None else whole(positions)
    yield (f"{base}, as it is", *[NO_VALUE] * 2, weights_size(model), *[NO_VALUE] * 2, *_scores(evaluation, None), context)
    for name in names:
        adapter = artifacts[name]
        if adapter.manifest.identity["inputs"]["base"] == model.content:
            left = None if positions is None else positions - adapter.stats.get("num_virtual_tokens", 0)
            scores = _scores(artifacts.get(f"evaluation_{name}"), speed)
            yield (*_costs(name, adapter, artifacts), *scores, NO_VALUE if left is None else whole(left))


def _costs(name: str, adapter: Artifact, artifacts: Artifacts) -> tuple[str, ...]:
    stats, produced_by = adapter.stats, adapter.manifest.produced_by
    trained, memory = stats.get("num_trainable_parameters", 0), produced_by.get("peak_memory_bytes")
    seconds = step_seconds(adapter, artifacts)
    return (
        shown_name(name),
        count(trained),
        share(trained, stats.get("num_parameters", 0)),
        weights_size(adapter),
        size(memory) if memory else NO_VALUE,
        duration(seconds) if seconds else NO_VALUE,
    )


def _scores(evaluation: Artifact | None, base_rate: float | None) -> tuple[str, ...]:
    """Loss, accuracy, tokens a second, and those against the base's."""
    stats, rate = evaluation.stats if evaluation else {}, decoding_rate(evaluation)
    loss = stats.get("held_out_loss", stats.get("examples_loss"))
    accuracy = stats.get("held_out_accuracy")
    return (
        f"{loss:.3f}" if loss is not None else NO_VALUE,
        percent(accuracy) if accuracy is not None else NO_VALUE,
        f"{rate:,.0f}" if rate else NO_VALUE,
        percent(rate / base_rate) if rate and base_rate else NO_VALUE,
    )


def step_seconds(adapter: Artifact, artifacts: Artifacts) -> float | None:
    """The median of what a step took, by the reports; the first, in which all warms up, left out where there are more."""
    examples, rows = artifacts.get("examples"), adapter.manifest.produced_by.get("metrics", [])
    rates = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
    if not examples or not rates:
        return None
    tokens = adapter.spec["global_batch_size"] * examples.stats["block_size"]
    return float(median(tokens / rate for rate in rates[1:] or rates))


def weights_size(artifact: Artifact) -> str:
    """The size of the file that holds a model's or an adapter's weights; of all of them where there are several."""
    sizes = [
        entry.num_bytes for entry in artifact.manifest.files if entry.name.endswith(".safetensors") and "/" not in entry.name
    ]
    return size(sum(sizes)) if sizes else NO_VALUE


def decoding_rate(evaluation: Artifact | None) -> float | None:
    """Tokens a second that the evaluated model spoke."""
    produced_by: dict[str, Any] = evaluation.manifest.produced_by if evaluation else {}
    rate: float | None = produced_by.get("decoding", {}).get("tokens_per_second")
    return rate


def num_positions(model: Artifact) -> int | None:
    """The positions that a model's config gives it."""
    if not model.has_file("config.json"):
        return None
    positions: int | None = orjson.loads(model.file("config.json").read_bytes()).get("max_position_embeddings")
    return positions
