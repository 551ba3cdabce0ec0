"""The proof of the mask: rows of examples, read back as they were written, against the conversations that they came from.

Of every example, what is learned decodes to the assistant's words and the end marker, each answer once, in order, in its
place, and nothing else is learned; all ids together decode to what the template makes of the conversation. It shares no
code with what makes the labels (tasks.corpus.labels): it knows the archive's turns, the template and the decoder.

Reads   examples/train.arrow, validation.arrow   EXAMPLES
"""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from tasks.corpus.chat import Chat, TemplateRefusalError
from tasks.corpus.turns import Conversation, Turn, shortened
from tasks.errors import CorpusError
from tasks.machine import Advance
from tasks.schemas import IGNORED_LABEL, as_ids

Ids = npt.NDArray[np.int32]

# Two answers, to see how the template closes one that is the last and one that is not.
PROBE = (Turn("user", "question-1"), Turn("assistant", "answer-1"), Turn("user", "question-2"), Turn("assistant", "answer-2"))
TOLD_CHARACTERS = 400  # of a row that fails, on each side of where it is cut for the message


class Claim(NamedTuple):
    """What an example must hold: the conversation of this line, learned at these turns."""

    line: int
    conversation: Conversation
    learned: tuple[int, ...]


class Claims:
    """The claims of one split by the number of the example, waiting in a file: each costs 8 bytes of memory."""

    def __init__(self, scratch: Path, split: str) -> None:
        self._path = scratch / f"{split}.claims"
        self._file = self._path.open("wb")
        self._starts = array("q", [0])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def add(self, claim: Claim) -> None:
        self._starts.append(
            self._starts[-1]
            + self._file.write(orjson.dumps([claim.line, [list(turn) for turn in claim.conversation], claim.learned]))
        )

    @cached_property
    def _bytes(self) -> "np.memmap[Any, np.dtype[np.uint8]]":
        self._file.close()
        return np.memmap(self._path, np.uint8, "r")

    def __getitem__(self, example: int) -> Claim:
        line, turns, learned = orjson.loads(self._bytes[self._starts[example] : self._starts[example + 1]].tobytes())
        return Claim(line, tuple(Turn(*turn) for turn in turns), tuple(learned))


class Shape(NamedTuple):
    """What stands around the words of an answer: white space before them, and the end marker, or white space and it."""

    before: str
    behind: str
    end_marker: str


class Proof:
    """Proves examples and rows of one archive; ``name`` is what the archive is called in messages."""

    def __init__(self, chat: Chat, name: str) -> None:
        self.chat, self.name = chat, name
        self.shapes = answer_shapes(chat)
        self.end_ids = {chat.special[shape.end_marker] for shape in self.shapes}
        # Decoded in front of every piece, since some decoders drop a blank at the start.
        self._front = chat.special[self.shapes[0].end_marker], self.shapes[0].end_marker

    def read(self, path: Path, rows: Sequence[Sequence[int]], claims: Claims, advance: Advance) -> Counter[str]:
        """Prove every row of a file, which holds the examples that ``rows`` tells; counts what was proven.

        Raises CorpusError with line and text of the first example that does not hold.
        """
        if sorted(example for row in rows for example in row) != list(range(len(claims))):
            raise CorpusError(f"{self.name}: {path.name} does not hold each of {len(claims)} examples once")
        counts: Counter[str] = Counter()
        left = iter(rows)
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                for columns in _columns_by_row(batch):
                    row = [claims[example] for example in next(left)]
                    counts += self.prove_row(*columns, row)
                    advance(len(row))
        assert next(left, None) is None, f"{path}: rows are missing"
        return counts

    def prove_row(self, input_ids: Ids, labels: Ids, position_ids: Ids, claims: Sequence[Claim]) -> Counter[str]:
        """Prove one row: int32 (block_size,) each, holding the claimed examples end to end, and padding behind them."""
        borders = [*np.flatnonzero(position_ids == 0).tolist(), len(position_ids)]
        spans = [slice(a, b) for a, b in pairwise(borders)]
        padding = spans[len(claims) :]
        counted = all(np.array_equal(position_ids[span], np.arange(span.stop - span.start)) for span in spans)
        if not counted or borders[0] != 0 or len(spans) < len(claims) or len(padding) > 1:
            raise self._failure(
                claims[0], f"positions: {len(spans)} of them restart, the row has {len(claims)} examples", input_ids
            )
        for span in padding:
            if np.any(labels[span] != IGNORED_LABEL) or np.any(input_ids[span] != self.chat.padding_id):
                raise self._failure(claims[-1], "labels: padding is learned, or more than padding is behind the last", input_ids)
        counts: Counter[str] = Counter()
        for span, claim in zip(spans, claims, strict=False):
            counts += self.prove_example(input_ids[span], labels[span], claim)
        return counts

    def prove_example(self, input_ids: Ids, labels: Ids, claim: Claim) -> Counter[str]:
        """Prove one example; counts its answers and supervised tokens. Raises CorpusError with its line and text."""
        is_learned = labels != IGNORED_LABEL
        borders = np.flatnonzero(np.diff(is_learned, prepend=False, append=False)).tolist()
        # By turns what is not learned and what is, beginning and ending with what is not.
        pieces = [input_ids[a:b] for a, b in pairwise([0, *borders, len(input_ids)])]
        texts = self._decoded(pieces)
        problem = None
        if not np.array_equal(labels[is_learned], input_ids[is_learned]):
            problem = "labels: a label is not the id at its own place"
        problem = problem or self._problem(pieces[1::2], texts, claim)
        if problem:
            raise self._failure(claim, problem, input_ids, texts)
        return Counter(
            num_examples_proven=1, num_answers_proven=len(pieces) // 2, num_supervised_tokens=int(np.count_nonzero(is_learned))
        )

    def _problem(self, runs: list[Ids], texts: list[str], claim: Claim) -> str | None:
        """What does not hold of an example, or None."""
        words = [claim.conversation[number].content for number in claim.learned]
        if len(runs) != len(words):
            return f"labels: {len(runs)} runs of ids are learned, the conversation has {len(words)} answers"
        for run, text, answer in zip(runs, texts[1::2], words, strict=True):
            if int(run[-1]) not in self.end_ids or np.count_nonzero(np.isin(run, list(self.end_ids))) != 1:
                return f"labels: no end marker closes the answer {shortened(answer)} once"
            if not self._is_answer(text, answer):
                return f"labels: {shortened(text)} is learned where the answer is {shortened(answer)}"
        rendered = self.chat.render(claim.conversation)
        if not self._is_same("".join(texts), rendered):
            return f"ids: they read {shortened(''.join(texts))} where the template gives {shortened(rendered)}"
        return self._misplaced(texts, claim)

    def _is_answer(self, text: str, words: str) -> bool:
        """Whether a learned text is an answer's words with what the template sets around them."""
        for before, behind, _ in self.shapes:
            if text == before + words + behind:
                return True
        # A tokenizer may write the words in another Unicode form, or not keep every character.
        known = self._as_tokenized(words).strip()
        for before, behind, _ in self.shapes:
            alone = self._as_tokenized(words + behind)
            if text == before + known + behind or (text == alone != words + behind):
                return True
        return False

    def _is_same(self, text: str, rendered: str) -> bool:
        """Whether the ids of an example read as the template's text, but for what the tokenizer does not keep."""
        if text == rendered:
            return True
        kept = self._as_tokenized(rendered)
        # Where the tokenizer sets blanks of its own, an example tokenized in pieces has more of them.
        return text == kept or (kept != rendered and "".join(text.split()) == "".join(kept.split()))

    def _misplaced(self, texts: list[str], claim: Claim) -> str | None:
        """What the user said must stand before the answer to it, in what is not learned: else another turn is learned."""
        start = 0
        for piece, end in zip(texts[::2], (*claim.learned, len(claim.conversation)), strict=True):
            place = 0
            for turn in claim.conversation[start:end]:
                said = turn.content if turn.content in "".join(texts) else self._as_tokenized(turn.content).strip()
                if turn.role != "user" or said not in "".join(texts):  # the template may write it otherwise
                    continue
                if (place := piece.find(said, place)) < 0:
                    return f"labels: what the user says, {shortened(said)}, does not stand before the answer to it"
                place += len(said)
            start = end
        return None

    def _as_tokenized(self, text: str) -> str:
        """What the tokenizer makes of a text by itself."""
        return self._decoded([np.array(self.chat.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)])[0]

    def _decoded(self, pieces: Sequence[Ids]) -> list[str]:
        front_id, front = self._front
        listed = [[front_id, *piece.tolist()] for piece in pieces]
        return [text.removeprefix(front) for text in self.chat.tokenizer.decode_batch(listed, skip_special_tokens=False)]

    def _failure(self, claim: Claim, problem: str, input_ids: Ids, texts: Sequence[str] | None = None) -> CorpusError:
        texts = self._decoded([input_ids]) if texts is None else texts
        marked = "".join(f"⟦{text}⟧" if number % 2 else text for number, text in enumerate(texts))
        if len(marked) > 2 * TOLD_CHARACTERS:
            marked = f"{marked[:TOLD_CHARACTERS]}...{marked[-TOLD_CHARACTERS:]}"
        return CorpusError(
            f"{self.name}: line {claim.line}: {problem}; learned is what stands in ⟦⟧: {marked!r}; "
            "the chat template does not fit the tokenizer"
        )


def answer_shapes(chat: Chat) -> tuple[Shape, ...]:
    """How the template sets an answer, seen on a conversation that it knows nothing of.

    Raises CorpusError where it refuses a plain one, or closes an answer with no special token: nothing could learn to stop.
    """
    try:
        text = chat.render(PROBE)
        prompts = [chat.render(PROBE[:number], add_generation_prompt=True) for number in (1, 3)]
    except TemplateRefusalError as refusal:
        raise CorpusError(
            f"chat template: a question and an answer are no conversation to it: {refusal}; use another"
        ) from refusal
    return tuple(
        dict.fromkeys(_shape(chat, text, turn.content, prompt) for turn, prompt in zip(PROBE[1::2], prompts, strict=True))
    )


def _shape(chat: Chat, text: str, words: str, prompt: str) -> Shape:
    start = text.find(words)
    marker = chat.special_pattern.search(text, start + len(words))
    if start < 0 or not marker or (behind := text[start + len(words) : marker.start()]).strip():
        raise CorpusError(
            f"chat template: no special token closes the answer {words!r}; the model could not learn to stop: "
            "use a template that ends every turn with one"
        )
    gap = text[len(prompt) : start] if text.startswith(prompt) else ""
    return Shape(gap if gap.isspace() else "", behind + marker[0], marker[0])


def _columns_by_row(batch: pa.RecordBatch) -> Iterator[tuple[Ids, Ids, Ids]]:
    columns = [batch.column(name) for name in ("input_ids", "labels", "position_ids")]
    tables = [as_ids(column.flatten()).reshape(batch.num_rows, -1) for column in columns]
    return zip(*tables, strict=True)
