"""A conversation to ids and to what of them is learned: the assistant's words and the end marker of each, nothing else.

Nobody's word is taken for it: ``prove`` reads the answers back from the labels of every example.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from tasks.corpus.chat import Chat
from tasks.corpus.conversations import Conversation
from tasks.errors import CorpusError
from tasks.schemas import IGNORED_LABEL

if TYPE_CHECKING:
    from tokenizers import Encoding

Ids = npt.NDArray[np.int32]


class Answer(NamedTuple):
    """An assistant's turn in the rendered text: text[start:end] is its words, and its end marker last."""

    start: int
    end: int
    words: str
    end_marker: str


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, with the answers to learn.

    num_rewritten: the assistant's turns whose words the template does not give as they stand (such as an earlier turn's
    thoughts, which Qwen3's leaves away). They stay in the text, and nothing is learned from them.
    """

    text: str
    answers: tuple[Answer, ...]
    num_rewritten: int


@dataclass(frozen=True)
class Example:
    """input_ids, labels: int32 (num_tokens,), labels IGNORED_LABEL where nothing is learned."""

    input_ids: Ids
    labels: Ids

    @property
    def num_supervised(self) -> int:
        return int(np.count_nonzero(self.labels != IGNORED_LABEL))


def render(chat: Chat, conversation: Conversation) -> Rendered:
    """Render a conversation and find its answers.

    Raises TemplateRefusalError, and CorpusError where the template closes an answer with no special token, so that
    nothing could learn to stop.
    """
    text = chat.render(conversation)
    places = [number for number, turn in enumerate(conversation) if turn.role == "assistant"]
    found = [_find_answer(chat, text, conversation[:number], conversation[number].content) for number in places]
    answers = tuple(answer for answer in found if answer)
    return Rendered(text, answers, len(found) - len(answers))


def _find_answer(chat: Chat, text: str, before: Conversation, words: str) -> Answer | None:
    """The answer behind the turns ``before``; None where its words do not stand there as they are."""
    prompt = chat.render(before, add_generation_prompt=True)
    is_asked_so = text.startswith(prompt)
    marker = chat.special_pattern.search(text, len(prompt) if is_asked_so else _agreement(text, prompt))
    if marker is None:
        raise CorpusError(
            f"chat template: no special token closes the answer {_short(words)}; "
            "the model could not learn to stop: use a template that ends every turn with one"
        )
    if is_asked_so and marker.start() == len(prompt) and prompt == chat.render(before):
        raise CorpusError(
            f"chat template: does not open an answer with {marker[0]} when asked to, though its texts do; "
            "use a template that knows add_generation_prompt"
        )
    # What the template puts before the words (an empty <think></think>) is not the assistant's.
    start = len(text[: marker.start()].rstrip()) - len(words)
    if start < 0 or not text.startswith(words, start):
        return None
    if not is_asked_so or start < len(prompt):
        # The prompt opens the answer in other words than the text (a <think>): it must still be this very turn.
        opened = chat.render(before)
        if not text.startswith(opened) or start < len(opened):
            return None
    return Answer(start, marker.end(), words, marker[0])


def _agreement(text: str, prompt: str) -> int:
    """How many characters two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), min(len(text), len(prompt)))


def make_examples(chat: Chat, rendered: Sequence[Rendered]) -> list[Example]:
    """Tokenize rendered conversations, all in one call, and label them."""
    encodings = chat.tokenizer.encode_batch([one.text for one in rendered], add_special_tokens=False)
    return [_example(chat, one, encoding) for one, encoding in zip(rendered, encodings, strict=True)]


def _example(chat: Chat, rendered: Rendered, encoding: "Encoding") -> Example:
    ids = np.array(encoding.ids, np.int32)
    # In characters of the text, for each id: where it starts and where it ends.
    starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    if any(np.any((starts < answer.start) & (ends > answer.start)) for answer in rendered.answers):
        return _example_in_pieces(chat, rendered)
    is_learned = np.zeros(len(ids), bool)
    for answer in rendered.answers:
        # By their starts: an end marker may take the line feed behind it along.
        is_learned |= (starts >= answer.start) & (starts < answer.end)
    return Example(ids, np.where(is_learned, ids, np.int32(IGNORED_LABEL)))


def _example_in_pieces(chat: Chat, rendered: Rendered) -> Example:
    """As ``_example`` where an id would reach from the prompt into the words: the text is cut there, as when it is asked."""
    borders = [0, *(border for answer in rendered.answers for border in answer[:2]), len(rendered.text)]
    pieces = [rendered.text[a:b] for a, b in pairwise(borders)]
    ids = [np.array(piece.ids, np.int32) for piece in chat.tokenizer.encode_batch(pieces, add_special_tokens=False)]
    labels = [piece if number % 2 else np.full_like(piece, IGNORED_LABEL) for number, piece in enumerate(ids)]
    return Example(np.concatenate(ids), np.concatenate(labels))


def prove(chat: Chat, example: Example, answers: Iterable[Answer]) -> None:
    """Read the answers back from the labels: each one's words and end marker, whole, once, in order, and nothing else.

    Raises CorpusError, saying what does not hold.
    """
    ids, labels = example.input_ids, example.labels
    is_learned = labels != IGNORED_LABEL
    if len(ids) != len(labels) or not np.array_equal(labels[is_learned], ids[is_learned]):
        raise CorpusError("labels: a label is not the id at its own place")
    borders = np.flatnonzero(np.diff(is_learned, prepend=False, append=False))
    found = [ids[a:b] for a, b in zip(borders[::2], borders[1::2], strict=True)]
    expected = list(answers)
    if len(found) != len(expected):
        raise CorpusError(f"labels: {len(found)} runs of ids are learned, the conversation has {len(expected)} answers")
    for run, answer in zip(found, expected, strict=True):
        _prove_answer(chat, run, answer)


def _prove_answer(chat: Chat, run: Ids, answer: Answer) -> None:
    end_id = chat.special[answer.end_marker]
    if run[-1] != end_id or np.count_nonzero(run == end_id) != 1:
        raise CorpusError(f"labels: the end marker {answer.end_marker} does not close the answer {_short(answer.words)} once")
    # Decoded with its marker: some decoders drop white space at an end.
    learned = chat.tokenizer.decode(run.tolist(), skip_special_tokens=False)
    if _words(learned, answer) != answer.words and _words(learned, answer) != _words(_round_trip(chat, answer), answer):
        raise CorpusError(f"labels: {_short(learned)} is learned where the answer is {_short(answer.words)}")


def _words(decoded: str, answer: Answer) -> str:
    # Only behind the words: a template may set a blank before its end marker, and the model has to write that too.
    return decoded.removesuffix(answer.end_marker).rstrip()


def _round_trip(chat: Chat, answer: Answer) -> str:
    """What a tokenizer that keeps not every character makes of the answer alone."""
    ids = chat.tokenizer.encode(answer.words + answer.end_marker, add_special_tokens=False).ids
    return str(chat.tokenizer.decode(ids, skip_special_tokens=False))


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:20]}...{text[-20:]}")
