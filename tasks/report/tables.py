"""Artifacts to the report's tables on the whole run: stages, accuracy, packages. Those on the corpus: tasks.report.corpus.

Reads   manifests: identity, stats, produced_by
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.report.numbers import duration, percent, size, whole
from tasks.store import Artifact

Artifacts = Mapping[str, Artifact]

KEY_CHARACTERS = 12  # of a digest: what `seqmill ls` shows, and takes


@dataclass(frozen=True)
class Table:
    """Cells of text; the columns after the first ``num_text`` hold numbers and stand right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text: int = 1
    note: str = ""

    def records(self) -> list[dict[str, str]]:
        """One mapping a row, as Prefect takes a table."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def stages_table(artifacts: Artifacts) -> Table:
    """Every artifact with what it was made from, in data order."""
    rows = tuple(
        (
            name,
            ", ".join(_node(artifacts, *given) for given in artifact.manifest.identity["inputs"].items()),
            artifact.key[:KEY_CHARACTERS],
            artifact.content[:KEY_CHARACTERS],
            size(artifact.num_bytes),
            duration(artifact.manifest.produced_by.get("seconds", 0)),
        )
        for name, artifact in artifacts.items()
    )
    return Table(("Stage", "Made from", "Key", "Content", "Size", "Built in"), rows, num_text=4)


def _node(artifacts: Artifacts, given: str, content: str) -> str:
    """The node that an input of this content is: the one called as the input is, else the first; else the input's name."""
    names = [name for name, artifact in artifacts.items() if artifact.content == content]
    return given if given in names or not names else names[0]


def accuracy_table(evaluations: Mapping[str, dict[str, Any]]) -> Table:
    """What every model scores, beside the majority baseline. evaluations: model name to evaluation.json."""
    rows = []
    majority = None
    for name, evaluation in evaluations.items():
        validation, held_out = evaluation["validation"], evaluation["held_out"]
        cells = [name, f"{validation['loss']:.3f}", f"{validation['bits_per_byte']:.3f}"] if validation else [name, "–", "–"]
        if held_out:
            majority = held_out
            low, high = held_out["interval"]
            gain = 100 * (held_out["accuracy"] - held_out["majority_share"])
            cells += [percent(held_out["accuracy"]), f"{percent(low)} – {percent(high)}", f"{gain:+.1f} points".replace("-", "−")]
        else:
            cells += ["–", "–", "–"]
        rows.append(tuple(cells))
    note = ""
    if majority:
        rows.append(("majority baseline", "–", "–", percent(majority["majority_share"]), "–", "–"))
        note = f"{majority['num_rows']:,} held-out conversations; the baseline always answers “{majority['majority_response']}”. "
    columns = ("Model", "Validation loss", "Bits per byte", "Accuracy", "95% interval", "Over the baseline")
    if any(evaluation["validation"] for evaluation in evaluations.values()):
        note += "Loss and bits per byte: of the corpus' validation text, which a model foretells worse once it learned to answer."
    return Table(columns, tuple(rows), note=note.strip())


def likelihood_table(evaluations: Mapping[str, dict[str, Any]]) -> Table | None:
    """How likely every model finds the right answers, and what tasks of the harness count; None where none of it was measured."""
    columns = {name: dict(_likelihoods(evaluation)) for name, evaluation in evaluations.items()}
    figures = list(dict.fromkeys(figure for column in columns.values() for figure in column))
    if not figures:
        return None
    rows = tuple((figure, *(column.get(figure, "–") for column in columns.values())) for figure in figures)
    note = "Losses in nats a token of the answers. The likeliest label is the right one of all that are answers to some question."
    return Table(("Figure", *columns), rows, note=note)


def _likelihoods(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    held_out = evaluation["held_out"] or {}
    if examples := evaluation.get("examples"):
        yield "loss, validation examples", f"{examples['loss']:.3f}"
    if held_out.get("loss") is not None:
        yield "loss, held-out answers", f"{held_out['loss']:.3f}"
    if held_out.get("label_accuracy") is not None:
        yield "likeliest label right", percent(held_out["label_accuracy"])
    for figure, value in (evaluation.get("harness") or {}).items():
        yield figure, f"{value:.4f}"


def confusion_table(held_out: Mapping[str, Any]) -> Table | None:
    """Answers by expected response; None for open questions."""
    confusion = held_out["confusion"]
    if not confusion:
        return None
    answers = list(next(iter(confusion.values())))
    rows = tuple((response, *(whole(confusion[response][answer]) for answer in answers)) for response in confusion)
    return Table(("Expected", *(f"answered {answer}" for answer in answers)), rows)


def packages_table(artifacts: Iterable[Artifact]) -> Table:
    """The versions of Python and of the packages that built the artifacts; several where they differ."""
    versions: dict[str, dict[str, None]] = {}
    for artifact in artifacts:
        produced_by = artifact.manifest.produced_by
        for package, found in {"python": produced_by.get("python", ""), **produced_by.get("packages", {})}.items():
            versions.setdefault(package, {})[found] = None
    rows = tuple((package, ", ".join(filter(None, found))) for package, found in versions.items())
    return Table(("Package", "Version"), rows, num_text=2)
