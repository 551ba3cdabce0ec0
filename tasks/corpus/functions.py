"""Functions that an assistant may call: their list, the calls and the results, in the forms that archives write.

list      "tools": [{"type": "function", "function": {"name", ...}}, ...], or that as JSON in a text; "functions": [{"name", ...}]
call      an assistant's turn with "tool_calls": [{"function": {"name", "arguments"}}, ...] or "function_call": {...};
          in ShareGPT's form {"from": "function_call", "value": JSON of {"name", "arguments"}, or of a list of these}
result    a turn of the role "tool", "function" or "observation", with "name" and "tool_call_id" where there are any

Whatever the form, the template gets today's: tools, tool_calls with arguments as an object, and the role tool.
"""

from collections.abc import Mapping
from typing import Any

import orjson

from tasks.corpus.turns import Turn, json_type, text_of


def tools_turn(record: Mapping[str, Any]) -> Turn | None:
    """The functions that a record lists, as the turn before all others. Raises ValueError for a list that is none."""
    tools = _listed(_parsed(record.get("tools"), "tools"), "tools")
    functions = _listed(record.get("functions"), "functions")
    tools = tools or [{"type": "function", "function": function} for function in functions]
    return Turn("tools", _dumped(tools, "'tools'")) if tools else None


def _listed(value: object, name: str) -> list[dict[str, Any]]:
    if value in (None, ""):
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"{name!r} is a JSON {json_type(value)}, not a list of objects")
    return value


def is_call(turn: Mapping[str, Any]) -> bool:
    """Whether an assistant's turn calls functions."""
    return bool(turn.get("tool_calls") or turn.get("function_call"))


def call_turn(turn: Mapping[str, Any], content: str, where: str) -> Turn:
    """An assistant's turn that calls functions, with what it says besides."""
    listed = turn.get("tool_calls") or [{"function": turn["function_call"]}]
    if not isinstance(listed, list):
        raise ValueError(f"{where}'tool_calls' is a JSON {json_type(listed)}, not a list")
    words = "" if turn.get(content) is None else text_of(turn, content, where, may_be_empty=True)
    return _call(words, [_normal(call, where) for call in listed], where)


def written_call_turn(value: str, where: str) -> Turn:
    """ShareGPT's: the text of the turn is the call."""
    calls = _parsed(value, f"{where}the call")
    calls = calls if isinstance(calls, list) else [calls]
    return _call("", [_normal({"function": call}, where) for call in calls], where)


def result_turn(turn: Mapping[str, Any], content: str, where: str) -> Turn:
    """What a function answered."""
    named = {name: turn[name] for name in ("name", "tool_call_id") if isinstance(turn.get(name), str)}
    said = text_of(turn, content, where, may_be_empty=True)
    return Turn("tool", said, is_learned=False, extra=_dumped(named, where) if named else "")


def _call(words: str, calls: list[dict[str, Any]], where: str) -> Turn:
    return Turn("assistant", words, is_learned=False, extra=_dumped({"tool_calls": calls}, where))


def _normal(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where}a call names no function")
    arguments = _parsed(function.get("arguments") or {}, f"{where}arguments of {function['name']}")
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}the arguments of {function['name']} are a JSON {json_type(arguments)}, not an object")
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **named, "function": {"name": function["name"], "arguments": arguments}}


def _parsed(value: object, where: str) -> Any:
    """A value, or what it spells where it is a text."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return orjson.loads(value)
    except (orjson.JSONDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error


def _dumped(value: object, where: str) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:  # half a surrogate pair, or an integer of more than 64 bits
        raise ValueError(f"{where}: cannot be written as JSON ({error})") from error
