"""Turns: what a conversation is made of, and how a text is taken out of a record."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

# "tools" is no speaker: the JSON list of the functions that the assistant may call, as the template takes it.
Role = Literal["tools", "system", "user", "assistant", "tool"]


class Turn(NamedTuple):
    """What one side says, without white space around it.

    is_learned: an assistant's words are, unless the archive or the spec says otherwise.
    extra: JSON object of the other fields that the template reads: tool_calls, name, tool_call_id; empty where there is none.
    """

    role: Role
    content: str
    is_learned: bool = True
    extra: str = ""

    @property
    def is_call(self) -> bool:
        """Whether the assistant calls functions here; nothing is learned from that."""
        return self.role == "assistant" and bool(self.extra)

    @property
    def is_answer(self) -> bool:
        """Whether these are words of the assistant, learned or not."""
        return self.role == "assistant" and not self.extra


# The tools and a system turn first, where there are any; then user and assistant by turns, calls and their results between
# them; the last is an answer.
Conversation = tuple[Turn, ...]


def text_of(record: Mapping[str, Any], name: str, where: str = "", may_be_empty: bool = False) -> str:
    """The text of a field, without white space around it. Raises ValueError, whose message is the reason, for anything else."""
    value = record.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{where}{name!r} is {'missing' if name not in record else f'a JSON {json_type(value)}'}, not a text")
    if not (value := value.strip()) and not may_be_empty:
        raise ValueError(f"{where}{name!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}{name!r} holds half a surrogate pair at character {error.start}") from error
    return value


def json_type(value: object) -> str:
    """JSON's name of a value's type."""
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", type(None): "null", dict: "object"}
    return names.get(type(value), type(value).__name__)


def shortened(text: str) -> str:
    """A text in quotes, its middle left away where it is long."""
    return repr(text if len(text) <= 40 else f"{text[:20]}...{text[-20:]}")
