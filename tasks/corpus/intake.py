"""An archive to its conversations, and to the quarantine what holds none.

Reads   an archive in any form that tasks.corpus.reader knows
Writes  quarantine.parquet   QUARANTINE
"""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from tasks.corpus.conversations import Format, parse_conversation
from tasks.corpus.quarantine import Refusals, write_rows
from tasks.corpus.reader import EXCERPT_BYTES, BadLine, read_records
from tasks.corpus.turns import Conversation
from tasks.errors import CorpusError
from tasks.machine import Advance

# When none of so many holds a conversation, the rest will not either.
FIRST_LOOK = 1_000


class Intake:
    """Reads one archive; knows how many conversations it has read, and which lines were refused and why."""

    def __init__(self, path: Path, form: Format, special: re.Pattern[str], name: str, scratch: Path) -> None:
        self.path, self.form, self.special, self.name = path, form, special, name
        self.num_read = 0
        self.refused = Refusals(scratch / f"{name}-refused.jsonl")

    def read(self, advance: Advance, most: int | None = None) -> Iterator[tuple[int, Conversation]]:
        """The conversations with their line numbers; stops when ``most`` lines are read. Blank lines do not count."""
        for line, record in read_records(self.path, advance):
            if most is not None and self.num_read == most:
                return
            self.num_read += 1
            try:
                yield line, self._parse(record)
            except ValueError as error:
                self.refuse(line, str(error), record)
            if self.num_read == len(self.refused) == FIRST_LOOK:
                self.check(0)

    def _parse(self, record: object) -> Conversation:
        if isinstance(record, BadLine):
            raise ValueError(record.reason)
        conversation = parse_conversation(record, self.form)
        has_tools = conversation[0].role == "tools"
        for number, turn in enumerate(conversation, 1 - has_tools):
            # A text that writes a special token could end its own turn, or speak for the other side.
            if match := self.special.search(turn.content) or self.special.search(turn.extra):
                where = f"turn {number}: its text" if number else "'tools'"
                raise ValueError(f"{where} holds the special token {match[0]}")
        return conversation

    def refuse(self, line: int, reason: str, record: object) -> None:
        """Put a line into quarantine."""
        excerpt = record.excerpt if isinstance(record, BadLine) else orjson.dumps(record, default=str)[:EXCERPT_BYTES]
        self.refused.add(line, BadLine(reason, excerpt))

    def check(self, most_fraction: float) -> None:
        """Raises CorpusError where more than this fraction of what was read is in quarantine."""
        if len(self.refused) > most_fraction * self.num_read:
            line, reason = self.refused.first()
            raise CorpusError(
                f"{self.name}: {len(self.refused)} of {self.num_read} lines hold no conversation, more than the fraction "
                f"{most_fraction:g} that may; the first is line {line}: {reason}; mend the archive, or raise "
                "examples.max_quarantined_fraction"
            )


def write_quarantine(path: Path, *intakes: Intake) -> None:
    """Write what all of them refused, each in the order of its lines; a reason says of which archive, after the first."""
    write_rows(chain.from_iterable(_told(intake, is_named=number > 0) for number, intake in enumerate(intakes)), path)


def _told(intake: Intake, is_named: bool) -> Iterator[dict[str, Any]]:
    for row in intake.refused.rows():
        yield {**row, "reason": f"{intake.name}: {row['reason']}"} if is_named else row
