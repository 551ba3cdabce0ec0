"""Everything the report says, gathered from the artifacts: what both its page and its short version are rendered from.

Reads   every artifact's manifest
        evaluation.json
        config.json of pretrained or published
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from tasks.report import tables
from tasks.report.comparison import compared, comparison_table, shown_name
from tasks.report.corpus import conversations_table, corpus_facts, corpus_plots, corpus_tables
from tasks.report.curves import Training, bits_per_loss, training_of
from tasks.report.numbers import count, percent, whole
from tasks.report.plots import Plot, accuracy_plot
from tasks.report.tables import Artifacts, Table

MODELS = ("published", "pretrained", "finetuned", "adapter")
LISTED_WRONG = 6
PROMPT_CHARACTERS = 240
USER_TURN = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)
MARKER = re.compile(r"<\|[^|<>]*\|>")


@dataclass(frozen=True)
class Figure:
    """One of the headline's figures; ``before`` is what it was when training began."""

    label: str
    value: str
    note: str = ""
    before: str = ""


@dataclass(frozen=True)
class Sample:
    """What every model says behind one prompt."""

    prompt: str
    is_chat: bool
    texts: tuple[tuple[str, str], ...]  # model, text


@dataclass(frozen=True)
class Page:
    """A section whose input is missing is empty, and is left out."""

    title: str
    summary: str
    figures: tuple[Figure, ...]
    stages: Table
    corpus_facts: tuple[tuple[str, str], ...]
    corpus: dict[str, Table]
    corpus_plots: tuple[Plot, ...]
    trainings: tuple[Training, ...]
    comparison: Table | None
    compared_trainings: tuple[Training, ...]
    conversations: Table | None
    accuracy: Table | None
    likelihood: Table | None
    accuracy_plot: Plot | None
    confusions: dict[str, Table]
    samples: tuple[Sample, ...]
    wrong: dict[str, Table]
    packages: Table
    hosts: str

    def plots(self) -> Iterator[Plot]:
        """Every plot, in the page's order."""
        yield from self.corpus_plots
        for training in self.trainings:
            yield from training.plots
        for training in self.compared_trainings:
            yield from training.plots
        if self.accuracy_plot:
            yield self.accuracy_plot


def page_of(artifacts: Artifacts, title: str | None) -> Page:
    """Gather the page. artifacts: by node name, in data order."""
    evaluations = read_evaluations(artifacts)
    blocks = artifacts.get("blocks")
    bits = bits_per_loss(blocks)
    # The loss of finetuning is measured on conversations, whose bytes nobody counted.
    trainings = tuple(
        training_of(name, artifacts[name], bits if name == "pretrained" else None) for name in MODELS[1:] if name in artifacts
    )
    held_out = {name: told["held_out"] for name, told in evaluations.items() if told["held_out"]}
    hosts = sorted({artifact.manifest.produced_by.get("host", "") for artifact in artifacts.values()} - {""})
    return Page(
        title=title or "Training report",
        summary=summary(artifacts),
        figures=tuple(figures(artifacts, trainings, evaluations, bits)),
        stages=tables.stages_table(artifacts),
        corpus_facts=tuple(corpus_facts(artifacts)),
        corpus=dict(corpus_tables(artifacts)),
        corpus_plots=tuple(corpus_plots(artifacts)),
        trainings=trainings,
        comparison=comparison_table(artifacts),
        compared_trainings=tuple(training_of(name, artifacts[name], None) for name in compared(artifacts)),
        conversations=conversations_table(artifacts["examples"]) if "examples" in artifacts else None,
        accuracy=tables.accuracy_table(evaluations) if evaluations else None,
        likelihood=tables.likelihood_table(evaluations),
        accuracy_plot=plot_of_accuracy(held_out),
        confusions={name: table for name, told in held_out.items() if (table := tables.confusion_table(told))},
        samples=tuple(samples(evaluations)),
        wrong=dict(wrong_answers(held_out)),
        packages=tables.packages_table(artifacts.values()),
        hosts=", ".join(hosts),
    )


def read_evaluations(artifacts: Artifacts) -> dict[str, dict[str, Any]]:
    """evaluation.json of every model that was evaluated, by the model's name."""
    named = {name: artifacts.get(f"evaluation_{name}") for name in (*MODELS, *compared(artifacts))}
    return {shown_name(name): orjson.loads(found.file("evaluation.json").read_bytes()) for name, found in named.items() if found}


def summary(artifacts: Artifacts) -> str:
    """What was trained on what, in one line."""
    parts = []
    if base := artifacts.get("pretrained") or artifacts.get("published"):
        parts.append(f"{architecture(base)} with {count(base.stats['num_parameters'])} parameters")
    if documents := artifacts.get("documents"):
        parts.append(f"{whole(documents.stats['num_documents'])} documents")
    if tokens := artifacts.get("tokens"):
        parts.append(f"{count(sum(tokens.stats[split]['num_tokens'] for split in ('train', 'validation')))} tokens")
    return ", ".join(parts)


def architecture(model: Any) -> str:
    """The model's type, layers and width, from its config.json."""
    if not model.has_file("config.json"):
        return "a model"
    config = orjson.loads(model.file("config.json").read_bytes())
    layers, width = config.get("num_hidden_layers"), config.get("hidden_size")
    shape = f" of {layers} layers, width {width}," if layers and width else ""
    return f"{config.get('model_type', 'model')}{shape}"


def figures(
    artifacts: Artifacts, trainings: tuple[Training, ...], evaluations: Mapping[str, dict[str, Any]], bits: float | None
) -> Iterator[Figure]:
    """The headline: how much was trained, how the validation loss fell, what the models score."""
    if "pretrained" in artifacts:
        yield trained_figure(artifacts)
        validation = trainings[0].validation
        if len(validation) > 1:
            first, last = validation[0], validation[-1]
            note = f"step {first[0]:,} to {last[0]:,}"
            yield Figure("Validation loss", f"{last[1]:.3f}", note, f"{first[1]:.3f}")
            if bits:
                yield Figure("Bits per byte", f"{last[1] * bits:.3f}", "validation split", f"{first[1] * bits:.3f}")
    for name in ("finetuned", "adapter"):
        if held_out := evaluations.get(name, {}).get("held_out"):
            note = f"baseline {percent(held_out['majority_share'])}"
            yield Figure(f"Accuracy, {name}", percent(held_out["accuracy"]), note)
    asked = {name: told["held_out"] for name in map(shown_name, compared(artifacts)) if (told := evaluations.get(name, {}))}
    if scores := {name: held_out["accuracy"] for name, held_out in asked.items() if held_out}:
        best = max(scores, key=lambda name: scores[name])
        yield Figure("Best accuracy, compared", percent(scores[best]), f"{best}, of {len(scores)} methods")


def trained_figure(artifacts: Artifacts) -> Figure:
    """Tokens that pretraining has seen, where the manifests tell; else its steps."""
    pretrained, blocks = artifacts["pretrained"], artifacts.get("blocks")
    num_steps, rows = pretrained.stats.get("num_steps", 0), pretrained.spec.get("global_batch_size")
    steps = f"{whole(num_steps)} steps"
    if blocks and rows and num_steps:
        return Figure("Tokens of pretraining", count(num_steps * rows * blocks.stats["block_size"]), steps)
    return Figure("Pretraining", steps)


def plot_of_accuracy(held_out: Mapping[str, dict[str, Any]]) -> Plot | None:
    """None where nothing was held out."""
    if not held_out:
        return None
    majority = next(iter(held_out.values()))["majority_share"]
    return accuracy_plot({name: (told["accuracy"], tuple(told["interval"])) for name, told in held_out.items()}, majority)


def samples(evaluations: Mapping[str, dict[str, Any]]) -> Iterator[Sample]:
    """Every prompt with what each model says behind it, in the order of the first model that was asked it."""
    asked: dict[tuple[bool, str], list[tuple[str, str]]] = {}
    for name, evaluation in evaluations.items():
        for sample in evaluation["samples"]:
            asked.setdefault((sample["is_chat"], sample["prompt"]), []).append((name, sample["text"]))
    for (is_chat, prompt), texts in sorted(asked.items(), key=lambda item: item[0][0]):
        yield Sample(prompt, is_chat, tuple(texts))


def wrong_answers(held_out: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, Table]]:
    """The first wrong answers of every model that was taught to answer."""
    for name, told in held_out.items():
        is_taught = name not in ("published", "pretrained")
        listed = [answer for answer in told["answers"] if is_taught and not answer["is_right"]]
        rows = tuple((readable(answer["prompt"]), answer["response"], _given(answer["answer"])) for answer in listed)
        if rows:
            yield name, Table(("Conversation", "Expected", "Answered"), rows[:LISTED_WRONG], num_text=3)


def _given(answer: str | None) -> str:
    return "(no room)" if answer is None else answer or "(nothing)"


def readable(prompt: str) -> str:
    """The user's last words of a prompt, without the template's markers, cut to what a table holds."""
    turns = USER_TURN.findall(prompt)
    text = (turns[-1] if turns else MARKER.sub(" ", prompt)).strip()
    return text if len(text) <= PROMPT_CHARACTERS else f"{text[:PROMPT_CHARACTERS]}…"
