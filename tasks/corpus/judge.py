"""What becomes of each row of an archive: a document, a bad line, or one that is dropped and why."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from tasks.corpus.boundaries import Document, read_document
from tasks.corpus.quality import Filter
from tasks.corpus.reader import BLANK, EXCERPT_BYTES, BadLine, Row
from tasks.errors import CorpusError

EARLY_LINES = 1_000  # from here on too many bad lines fail the stage at once


class Dropped(NamedTuple):
    """A document that the recipe does not want. column: the ledger's; reason: which filter, where one did it."""

    column: str
    reason: str | None = None


DUPLICATE = Dropped("duplicates")
NEAR_DUPLICATE = Dropped("near_duplicates")

Outcome = Document | BadLine | Dropped


def judge(row: Row, text_field: str, filters: Sequence[Filter]) -> Outcome:
    """What becomes of one row, looked at alone."""
    value = row.value
    if isinstance(value, BadLine):
        return value
    if not isinstance(value, dict):
        return _bad(row, "not an object")
    text = value.get(text_field)
    if not isinstance(text, str):
        reason = "is not a string" if text_field in value and text is not None else "is missing"
        return _bad(row, f"the field {text_field!r} {reason}")
    try:
        document = read_document(text)
    except UnicodeEncodeError as error:
        return _bad(row, f"lone surrogate at character {error.start}")
    for unwanted in filters:
        why = unwanted(text)
        if why is not None:
            return Dropped("filtered", why)
    return document


def _bad(row: Row, reason: str) -> BadLine:
    return BadLine(reason, (row.raw or orjson.dumps(row.value, default=repr))[:EXCERPT_BYTES])


def drop(outcomes: list[Outcome], dropped: Dropped, firsts: Callable[[list[Document]], list[bool]]) -> None:
    """Put ``dropped`` in the place of each document of ``outcomes`` for which ``firsts`` says that it is not the first."""
    documents = [(place, outcome) for place, outcome in enumerate(outcomes) if isinstance(outcome, Document)]
    for (place, _), is_first in zip(documents, firsts([document for _, document in documents]), strict=True):
        if not is_first:
            outcomes[place] = dropped


@dataclass
class Ledger:
    """Where every line went."""

    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)  # of the filtered
    lengths: Counter[int] = field(default_factory=Counter)  # of the documents, by the bits of their number of characters
    first_bad: tuple[int, str, bytes] | None = None  # line, reason, excerpt

    @property
    def num_lines(self) -> int:
        return sum(self.counts.values())

    def enter(self, row: Row, outcome: Outcome) -> None:
        """Count one row."""
        if isinstance(outcome, Document):
            self.counts["documents"] += 1
            self.lengths[outcome.num_characters.bit_length()] += 1
        elif isinstance(outcome, Dropped):
            self.counts[outcome.column] += 1
            if outcome.reason:
                self.reasons[outcome.reason] += 1
        elif outcome is BLANK:
            self.counts["blank"] += 1
        else:
            self.counts["quarantined"] += 1
            self.first_bad = self.first_bad or (row.line, outcome.reason, outcome.excerpt)

    def stats(self) -> dict[str, Any]:
        names = ("documents", "quarantined", "filtered", "duplicates", "near_duplicates", "blank")
        histogram = {str(1 << digits >> 1): self.lengths[digits] for digits in sorted(self.lengths)}
        return {
            "num_lines": self.num_lines,
            **{f"num_{name}": self.counts[name] for name in names},
            "filtered_by": dict(sorted(self.reasons.items())),
            "length_histogram": histogram,
        }

    def refuse_early(self, path: Path, fraction: float, num_lines: int) -> None:
        """At a bad line, with ``num_lines`` read up to it: fail at once, not at the archive's end, from EARLY_LINES on."""
        if num_lines >= EARLY_LINES:
            self.refuse_too_many_bad(path, fraction, num_lines)

    def refuse_too_many_bad(self, path: Path, fraction: float, num_lines: int | None = None) -> None:
        num_lines = self.num_lines if num_lines is None else num_lines
        if self.first_bad is None or self.counts["quarantined"] <= fraction * num_lines:
            return
        line, reason, excerpt = self.first_bad
        raise CorpusError(
            f"{path}: {self.counts['quarantined']} of the {num_lines} lines read are bad, more than the share {fraction:g}; "
            f"the first is line {line}, {reason}: {excerpt[:60]!r}; mend the archive, name another text_field, "
            "or raise max_quarantined_fraction"
        )
