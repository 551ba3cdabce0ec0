"""Held-out conversations to questions for the model: everything before the last answer as ids, and that answer as text.

Reads   held_out/archive          conversations in any published form
Writes  examples/held-out.arrow   HELD_OUT, in the archive's order
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.corpus.chat import Chat, TemplateRefusalError
from tasks.corpus.conversations import question_digests
from tasks.corpus.intake import Intake
from tasks.corpus.turns import Conversation, Turn
from tasks.errors import CorpusError
from tasks.machine import Advance
from tasks.schemas import HELD_OUT, as_column

T = TypeVar("T")

BATCH_CONVERSATIONS = 1_000

# Tokens of a row that a held-out question leaves for the answer.
ANSWER_ROOM = 64


class HeldOut:
    """The questions of one archive, written as they come; ``questions`` remembers them all, the dropped too."""

    def __init__(self, chat: Chat, system: str | None, block_size: int) -> None:
        self.chat, self.system = chat, system
        self.most_tokens = max(1, block_size - ANSWER_ROOM)
        self.questions: set[bytes] = set()
        self.responses: Counter[str] = Counter()
        self.num_too_long = 0

    def write(self, path: Path, intake: Intake, advance: Advance) -> dict[str, Any]:
        """Write HELD_OUT to ``path``; returns the counts. Raises CorpusError where no question is left."""
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, HELD_OUT) as writer:
            for batch in batches(self._prompts(intake, advance), BATCH_CONVERSATIONS):
                writer.write(self._rows(batch))
        num_held_out = self.responses.total()
        counts = {"num_conversations": intake.num_read, "num_held_out": num_held_out}
        counts |= {"num_quarantined": len(intake.refused), "num_too_long": self.num_too_long}
        if not num_held_out:
            raise CorpusError(f"{intake.name}: no question is left ({counts}); see each count, or leave held_out away")
        response, num_most = min(self.responses.items(), key=lambda item: (-item[1], item[0]))
        baseline = {"majority_response": response, "majority_share": round(num_most / num_held_out, 6)}
        return {"held_out": counts, "baseline": baseline}

    def _prompts(self, intake: Intake, advance: Advance) -> Iterator[tuple[str, str]]:
        for line, conversation in intake.read(advance):
            self.questions.add(question_keys(conversation)[-1])
            *before, answer = with_system(conversation, self.system)
            try:
                yield self.chat.render(tuple(before), add_generation_prompt=True), answer.content
            except TemplateRefusalError as refusal:
                intake.refuse(line, str(refusal), [list(turn) for turn in conversation])

    def _rows(self, batch: list[tuple[str, str]]) -> pa.RecordBatch:
        encodings = self.chat.tokenizer.encode_batch_fast([prompt for prompt, _ in batch], add_special_tokens=False)
        rows = [(np.array(one.ids, np.int32), answer) for one, (_, answer) in zip(encodings, batch, strict=True)]
        kept = [(ids, answer) for ids, answer in rows if len(ids) <= self.most_tokens]
        self.num_too_long += len(rows) - len(kept)
        self.responses.update(answer for _, answer in kept)
        columns = [_list_array([ids for ids, _ in kept]), pa.array([answer for _, answer in kept], pa.string())]
        return pa.RecordBatch.from_arrays(columns, schema=HELD_OUT)


def question_keys(conversation: Conversation) -> list[bytes]:
    """16 bytes of each of ``question_digests``."""
    return [bytes.fromhex(digest[:32]) for digest in question_digests(conversation)]


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation, opened by ``system`` where it has no system turn of its own."""
    tools = [turn for turn in conversation[:1] if turn.role == "tools"]
    said = conversation[len(tools) :]
    if system is None or said[0].role == "system":
        return conversation
    return (*tools, Turn("system", system), *said)


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _list_array(rows: list[npt.NDArray[np.int32]]) -> pa.Array:
    offsets = np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int32)
    values = np.concatenate(rows) if rows else np.empty(0, np.int32)
    return pa.ListArray.from_arrays(as_column(offsets), as_column(values), type=HELD_OUT.field("prompt_ids").type)
