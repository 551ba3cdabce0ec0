"""A record of an SFT archive to a conversation, whichever of the five published forms it has.

belle      {"conversations": [{"from": "human" | "assistant", "value": ...}, ...]}
sharegpt   {"conversations": [{"from": "human" | "gpt" | "system", "value": ...}, ...]}
alpaca     {"instruction", "input", "output"[, "system"][, "history": [[question, answer], ...]]}
messages   {"messages": [{"role": "user" | "assistant" | "system", "content": ...}, ...]}   as OpenAI
mobvoi     {"input", "target", "task"}

A turn of a list may carry a mark that nothing is to be learned from it: ``"train": false``, or ``"weight": 0`` as OpenAI
writes it. Functions, calls and results, in the lists of sharegpt and messages, are told in tasks.corpus.functions; they go
to the chat template, and nothing is learned from them.
"""

import unicodedata
from collections.abc import Iterable
from typing import Any, Literal

from tasks.corpus.functions import call_turn, is_call, result_turn, tools_turn, written_call_turn
from tasks.corpus.turns import Conversation, Role, Turn, json_type, text_of
from tasks.store import Digest, digest_json

Format = Literal["auto", "belle", "sharegpt", "alpaca", "messages", "mobvoi"]

TOOL_ROLES: dict[str, Role] = {"tool": "tool", "function": "tool", "observation": "tool"}
SHAREGPT_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "function_call": "assistant",
    "system": "system", **TOOL_ROLES,
}  # fmt: skip
# "auto" takes every name of a role, a format that is named only its own.
ROLES: dict[str, dict[str, Role]] = {
    "belle": {"human": "user", "assistant": "assistant", "system": "system"},
    "sharegpt": SHAREGPT_ROLES,
    "messages": {"user": "user", "assistant": "assistant", "system": "system", "developer": "system", **TOOL_ROLES},
    "auto": {**SHAREGPT_ROLES, "developer": "system"},
}
# Who may speak behind whom; a call is the assistant's, and its results come next.
FOLLOWERS = {
    "": ("user",),
    "user": ("assistant", "call"),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant", "call"),
}


def parse_conversation(record: object, form: Format = "auto") -> Conversation:
    """The conversation that a record holds; what comes behind the last answer is left away.

    Raises ValueError, whose message is the reason, for a record that holds none.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {json_type(record)}, not an object")
    tools = tools_turn(record)
    conversation = list(_turns(record, _detect(record) if form == "auto" else form, form))
    while conversation and not conversation[-1].is_answer:
        conversation.pop()
    _check_order(conversation)
    return (tools, *conversation) if tools else tuple(conversation)


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
        return [Turn("user", text_of(record, "input")), Turn("assistant", text_of(record, "target"))]
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
        yield _turn(turn, name, roles[name], content, f"turn {number}: ")


def _turn(turn: dict[str, Any], name: str, role: Role, content: str, where: str) -> Turn:
    is_learned = _is_learned(turn, role, where)
    if role == "tool":
        return result_turn(turn, content, where)
    if name == "function_call":
        return written_call_turn(text_of(turn, content, where), where)
    if role == "assistant" and is_call(turn):
        return call_turn(turn, content, where)
    return Turn(role, text_of(turn, content, where), is_learned)


def _is_learned(turn: dict[str, Any], role: Role, where: str) -> bool:
    """What a turn's marks say; without one, it is learned."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"{where}'train' is {train!r}, neither true nor false")
    if weight not in (None, 0, 1):
        raise ValueError(f"{where}'weight' is {weight!r}; only 0 and 1 are known")
    marks = {bool(mark) for mark in (train, weight) if mark is not None}
    if len(marks) > 1:
        raise ValueError(f"{where}'train' is {train}, and 'weight' is {weight}")
    if True in marks and role != "assistant":
        raise ValueError(f"{where}is marked to be learned, and is the {role}'s; only the assistant's turns are")
    return False not in marks


def _alpaca(record: dict[str, Any]) -> Iterable[Turn]:
    if _given(record, "system"):
        yield Turn("system", text_of(record, "system"))
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("'history' is not a list of pairs")
    for number, (question, answer) in enumerate(history, 1):
        yield Turn("user", text_of({"question": question}, "question", f"history {number}: "))
        yield Turn("assistant", text_of({"answer": answer}, "answer", f"history {number}: "))
    question = text_of(record, "instruction")
    yield Turn("user", f"{question}\n{text_of(record, 'input')}" if _given(record, "input") else question)
    yield Turn("assistant", text_of(record, "output"))


def _given(record: dict[str, Any], name: str) -> bool:
    value = record.get(name)
    return value is not None and (not isinstance(value, str) or bool(value.strip()))


def _check_order(conversation: list[Turn]) -> None:
    if not conversation:
        raise ValueError("no assistant turn: nothing to learn")
    first = 1 if conversation[0].role == "system" else 0
    before = ""
    for number, turn in enumerate(conversation[first:], first + 1):
        speaker = "call" if turn.is_call else turn.role
        if speaker not in FOLLOWERS[before]:
            expected = " or the ".join(name for name in FOLLOWERS[before] if name != "call")
            raise ValueError(f"turn {number} is the {turn.role}'s where the {expected} is to speak")
        before = speaker
