"""How a chat template sets an answer, seen on a conversation that it knows nothing of.

Reads   a loaded tokenizer, and its chat template or another one
"""

from typing import Any, NamedTuple

from jinja2 import TemplateError

QUESTION, ANSWER = {"role": "user", "content": "question-1"}, {"role": "assistant", "content": "answer-1"}


class Frame(NamedTuple):
    """What stands around an answer's words.

    opening: what it is asked with, from the last special token on. before: white space that it is not asked with. behind: the
    end marker, or white space and it.
    """

    opening: str
    before: str
    behind: str
    end_id: int | None


def frame_of(tokenizer: Any, template: str | None = None) -> Frame | None:
    """How ``template`` sets an answer; None where it closes none with a special token, or there is none.

    tokenizer: one of Transformers. template: absent, the tokenizer's own.
    """
    try:
        asked, text = (
            tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=asks, tokenize=False)
            for turns, asks in (([QUESTION], True), ([QUESTION, ANSWER], False))
        )
    except (TemplateError, TypeError, ValueError):  # it refuses a plain conversation, or there is none
        return None
    special = special_tokens(tokenizer)
    start = text.find(ANSWER["content"])
    end = start + len(ANSWER["content"])
    ends = [(place, -len(token)) for token in special if (place := text.find(token, end)) >= 0]
    if start < 0 or not ends or text[end : min(ends)[0]].strip():
        return None
    place, length = min(ends)  # of several that begin there the longest
    marker = text[place : place - length]
    gap = text[len(asked) : start] if text.startswith(asked) else ""
    opening = asked[max(0, *(asked.rfind(token) for token in special)) :]
    return Frame(opening, gap if gap.isspace() else "", text[end:place] + marker, special[marker])


def answer_ids(tokenizer: Any, words: str, frame: Frame) -> list[int]:
    """The ids that were learned of an answer with these words, its end marker included.

    Behind what opens it, since some tokenizers begin a text otherwise than they go on with one.
    """
    text = f"{frame.before}{words}{frame.behind}"
    opening, whole, alone = (
        list(tokenizer.encode(one, add_special_tokens=False)) for one in (frame.opening, frame.opening + text, text)
    )
    # An id that would reach from the opening into the words is cut there in examples, too.
    return whole[len(opening) :] if whole[: len(opening)] == opening else alone


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The special tokens of a tokenizer, each with its id."""
    added = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)), **added}
