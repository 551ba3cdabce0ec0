"""A conversation to ids and to what of them is learned: the assistant's words and the end marker of each, nothing else.

Nobody's word is taken for it: tasks.corpus.proof reads the answers back from the rows as they were written.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from tasks.corpus.chat import Chat, TemplateRefusalError
from tasks.corpus.turns import Conversation, Turn, shortened
from tasks.errors import CorpusError
from tasks.schemas import IGNORED_LABEL

if TYPE_CHECKING:
    from tokenizers import Encoding

Ids = npt.NDArray[np.int32]


class Answer(NamedTuple):
    """An assistant's turn in the rendered text: text[start:end] is what the model has to write when it is asked.

    That is the words, with the end marker last; and a blank before them where the template sets one that it does not ask with.
    """

    turn: int
    start: int
    end: int


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


def render(chat: Chat, conversation: Conversation) -> Rendered:
    """Render a conversation and find the answers that are to be learned.

    Raises TemplateRefusalError, and CorpusError where the template closes an answer with no special token, so that
    nothing could learn to stop.
    """
    text = chat.render(conversation)
    _check_said(text, conversation)
    starts = _starts_by_stand_ins(chat, text, conversation)
    found = [
        _find_answer(chat, text, conversation, number, starts.get(number))
        for number, turn in enumerate(conversation)
        if turn.is_answer and turn.is_learned
    ]
    answers = tuple(answer for answer in found if answer)
    return Rendered(text, answers, len(found) - len(answers))


def _check_said(text: str, conversation: Conversation) -> None:
    """Raise TemplateRefusalError where the template leaves a system turn, a call or its result silently away."""
    for number, turn in enumerate(conversation, 0 if conversation[0].role == "tools" else 1):
        if turn.role in ("system", "tool"):
            told = turn.content in text or json.dumps(turn.content, ensure_ascii=False)[1:-1] in text
        elif turn.is_call:
            told = all(call["function"]["name"] in text for call in json.loads(turn.extra)["tool_calls"])
        else:
            told = True
        if not told:
            what = "call" if turn.is_call else f"{turn.role} turn"
            raise TemplateRefusalError(f"the chat template leaves the {what} away, turn {number}")


def _starts_by_stand_ins(chat: Chat, text: str, conversation: Conversation) -> dict[int, int]:
    """Where the words of every answer start in ``text``, by turn; empty where the template does more than put them there.

    The template is given a stand-in for each answer; put back in their places, the words must give ``text`` again.
    """
    numbers = [number for number, turn in enumerate(conversation) if turn.is_answer]
    if any(_stand_in(conversation[number], number).content in text for number in numbers):
        return {}
    skeleton = chat.render(tuple(_stand_in(turn, number) for number, turn in enumerate(conversation)))
    starts: dict[int, int] = {}
    built = ""
    for number in numbers:
        before, found, skeleton = skeleton.partition(_stand_in(conversation[number], number).content)
        if not found:
            return {}
        starts[number] = len(built) + len(before)
        built += before + conversation[number].content
    return starts if built + skeleton == text else {}


def _stand_in(turn: Turn, number: int) -> Turn:
    # Of the private use area, which no text is likely to hold; of one that does nothing is told above.
    return turn._replace(content=f"\ue0b5{number}\ue0b6") if turn.is_answer else turn


def _find_answer(chat: Chat, text: str, conversation: Conversation, number: int, known: int | None) -> Answer | None:
    """The answer of turn ``number``, whose words start at ``known`` where that is; None where they do not stand there."""
    words, before = conversation[number].content, conversation[:number]
    prompt = chat.render(before, add_generation_prompt=True)
    searched = len(prompt) if text.startswith(prompt) else _agreement(text, prompt)
    marker = chat.special_pattern.search(text, searched if known is None else known + len(words))
    if marker is None:
        raise CorpusError(
            f"chat template: no special token closes the answer {shortened(words)}; "
            "the model could not learn to stop: use a template that ends every turn with one"
        )
    # What the template puts before the words (an empty <think></think>) is not the assistant's.
    start = known if known is not None else len(text[: marker.start()].rstrip()) - len(words)
    asked_without = chat.render(before)
    if text.startswith(prompt) and prompt == asked_without and (opening := text[len(prompt) : start].strip()):
        raise CorpusError(
            f"chat template: does not open an answer with {shortened(opening)} when asked to, though its texts do; "
            "use a template that knows add_generation_prompt"
        )
    if known is None and not _is_this_turn(text, start, words, prompt, asked_without):
        return None
    return Answer(number, start - _num_blanks_to_write(text, prompt, start), marker.end())


def _is_this_turn(text: str, start: int, words: str, prompt: str, before: str) -> bool:
    """Whether the words at ``start`` are those of the turn behind ``before``, and not of one that reads the same."""
    if start < 0 or not text.startswith(words, start):
        return False
    # Where the prompt opens the answer in other words than the text (a <think>), it must still be this very turn.
    return any(text.startswith(opening) and start >= len(opening) for opening in (prompt, before))


def _num_blanks_to_write(text: str, prompt: str, start: int) -> int:
    """How much white space stands before the words that the prompt does not end with: the model has to write it."""
    opening, asked = text[:start].rstrip(), prompt.rstrip()
    blanks, given = text[len(opening) : start], prompt[len(asked) :]
    is_opened_so = opening[-1:] == asked[-1:] and blanks.startswith(given)
    return len(blanks) - len(given) if is_opened_so else 0


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
    borders = [0, *(border for answer in rendered.answers for border in (answer.start, answer.end)), len(rendered.text)]
    pieces = [rendered.text[a:b] for a, b in pairwise(borders)]
    ids = [np.array(piece.ids, np.int32) for piece in chat.tokenizer.encode_batch(pieces, add_special_tokens=False)]
    labels = [piece if number % 2 else np.full_like(piece, IGNORED_LABEL) for number, piece in enumerate(ids)]
    return Example(np.concatenate(ids), np.concatenate(labels))
