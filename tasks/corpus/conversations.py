"""A record of an SFT archive to a conversation, whichever of the five published forms it has.

belle      {"conversations": [{"from": "human" | "assistant", "value": ...}, ...]}
sharegpt   {"conversations": [{"from": "human" | "gpt" | "system", "value": ...}, ...]}
alpaca     {"instruction", "input", "output"[, "system"][, "history": [[question, answer], ...]]}
messages   {"messages": [{"role": "user" | "assistant" | "system", "content": ...}, ...]}   as OpenAI
mobvoi     {"input", "target", "task"}
"""

import unicodedata
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from tasks.store import Digest, digest_json

Role = Literal["system", "user", "assistant"]
Format = Literal["auto", "belle", "sharegpt", "alpaca", "messages", "mobvoi"]


class Turn(NamedTuple):
    """What one side says, without white space around it."""

    role: Role
    content: str


# At most one system turn, first; then user and assistant by turns; the last is the assistant's.
Conversation = tuple[Turn, ...]

# "auto" takes every name of a role, a format that is named only its own.
ROLES: dict[str, dict[str, Role]] = {
    "belle": {"human": "user", "assistant": "assistant", "system": "system"},
    "sharegpt": {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    "messages": {"user": "user", "assistant": "assistant", "system": "system"},
    "auto": {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
}


def parse_conversation(record: object, form: Format = "auto") -> Conversation:
    """The conversation that a record holds; a question behind the last answer is left away.

    Raises ValueError, whose message is the reason, for a record that holds none.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {_json_type(record)}, not an object")
    conversation = list(_turns(record, _detect(record) if form == "auto" else form, form))
    while conversation and conversation[-1].role == "user":
        conversation.pop()
    _check_order(conversation)
    return tuple(conversation)


def conversation_digest(conversation: Conversation) -> Digest:
    """SHA-256 of the turns: what makes two conversations the same."""
    return digest_json([list(turn) for turn in conversation])


def question_digests(conversation: Conversation) -> list[Digest]:
    """SHA-256 of what the user has said by each of its turns, whatever its spelling of white space and width.

    The last one is of the whole question, which makes two conversations ask the same; the others are of the questions that
    the conversation answers on its way there.
    """
    said = [_folded(turn.content) for turn in conversation if turn.role == "user"]
    return [digest_json(said[:number]) for number in range(1, len(said) + 1)]


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _detect(record: dict[str, Any]) -> str:
    if "conversations" in record:
        return "belle"
    if "messages" in record:
        return "messages"
    if "instruction" in record and "output" in record:
        return "alpaca"
    if "input" in record and "target" in record:
        return "mobvoi"
    raise ValueError(f"no known form of conversation: its fields are {', '.join(map(repr, record)) or 'none'}")


def _turns(record: dict[str, Any], form: str, roles: str) -> Iterable[Turn]:
    if form == "alpaca":
        return _alpaca(record)
    if form == "mobvoi":
        return [Turn("user", _text(record, "input")), Turn("assistant", _text(record, "target"))]
    names = ("messages", "role", "content") if form == "messages" else ("conversations", "from", "value")
    return _listed(record, *names, ROLES[roles])


def _listed(record: dict[str, Any], turns: str, role: str, content: str, roles: dict[str, Role]) -> Iterable[Turn]:
    listed = record.get(turns)
    if not isinstance(listed, list) or not all(isinstance(turn, dict) for turn in listed):
        raise ValueError(f"{turns!r} is not a list of objects")
    for number, turn in enumerate(listed, 1):
        name = turn.get(role)
        if not isinstance(name, str) or name not in roles:
            raise ValueError(f"turn {number}: unknown role {name!r}; known are {', '.join(roles)}")
        yield Turn(roles[name], _text(turn, content, f"turn {number}: "))


def _alpaca(record: dict[str, Any]) -> Iterable[Turn]:
    if _given(record, "system"):
        yield Turn("system", _text(record, "system"))
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("'history' is not a list of pairs")
    for number, (question, answer) in enumerate(history, 1):
        yield Turn("user", _text({"question": question}, "question", f"history {number}: "))
        yield Turn("assistant", _text({"answer": answer}, "answer", f"history {number}: "))
    question = _text(record, "instruction")
    yield Turn("user", f"{question}\n{_text(record, 'input')}" if _given(record, "input") else question)
    yield Turn("assistant", _text(record, "output"))


def _given(record: dict[str, Any], name: str) -> bool:
    value = record.get(name)
    return value is not None and (not isinstance(value, str) or bool(value.strip()))


def _text(record: dict[str, Any], name: str, where: str = "") -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{where}{name!r} is {'missing' if name not in record else f'a JSON {_json_type(value)}'}, not a text")
    if not (value := value.strip()):
        raise ValueError(f"{where}{name!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}{name!r} holds half a surrogate pair at character {error.start}") from error
    return value


def _check_order(conversation: list[Turn]) -> None:
    if all(turn.role != "assistant" for turn in conversation):
        raise ValueError("no assistant turn: nothing to learn")
    first = 1 if conversation[0].role == "system" else 0
    for number, turn in enumerate(conversation[first:], first):
        expected = "assistant" if (number - first) % 2 else "user"
        if turn.role != expected:
            raise ValueError(f"turn {number + 1} is the {turn.role}'s where the {expected} is to speak")


def _json_type(value: object) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", type(None): "null", dict: "object"}
    return names.get(type(value), type(value).__name__)
