"""One model, or one evaluation, alone, as the Prefect UI shows it. Corpus artifacts: tasks.report.corpus.

Reads   manifests of pretrained, finetuned, adapter: stats, produced_by
        evaluation.json
"""

import orjson

from tasks.report.corpus import inline_image
from tasks.report.curves import training_of
from tasks.report.tables import Table, accuracy_table, confusion_table, likelihood_table
from tasks.store import Artifact


def training_markdown(model: Artifact) -> str:
    """A training run: its facts, and its curves as pictures."""
    training = training_of(model.kind, model, None)
    facts = "\n".join(f"- **{label}**: {value}" for label, value in training.facts)
    plots = [f"## {plot.title}\n\n{inline_image(plot.title, plot.png)}" for plot in training.plots]
    return "\n\n".join([f"# {training.title}", *filter(None, [facts]), *plots])


def evaluation_tables(evaluation: Artifact) -> dict[str, list[dict[str, str]]]:
    """What the model scores, how its answers fall, and what it says, by Prefect's artifact key."""
    told, name = orjson.loads(evaluation.file("evaluation.json").read_bytes()), evaluated(evaluation)
    samples = Table(("Prompt", "Text"), tuple((sample["prompt"], sample["text"]) for sample in told["samples"]), num_text=2)
    confusion = confusion_table(told["held_out"]) if told["held_out"] else None
    tables = {
        "": accuracy_table({name: told}),
        "-likelihood": likelihood_table({name: told}),
        "-answers": confusion,
        "-samples": samples,
    }
    return {f"evaluation-{name}{what}": table.records() for what, table in tables.items() if table and table.rows}


def evaluated(evaluation: Artifact) -> str:
    """The kind of model that was evaluated; adapter for one on its base."""
    inputs = evaluation.manifest.produced_by.get("inputs", {})
    return "adapter" if "adapter" in inputs else str(inputs.get("model", "model")).partition("/")[0]
