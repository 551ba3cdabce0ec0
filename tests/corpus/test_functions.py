"""Functions, calls and results, in every form that archives write, to what a template reads."""

import json
from typing import Any

import pytest

from tasks.corpus.conversations import parse_conversation
from tasks.corpus.turns import Conversation, Turn

CALLED = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
WANTED = (
    Turn("user", "天气"),
    Turn(
        "assistant", "", is_learned=False, extra=json.dumps({"tool_calls": [CALLED]}, ensure_ascii=False, separators=(",", ":"))
    ),
    Turn("tool", "晴", is_learned=False),
    Turn("assistant", "今天晴。"),
)
ASKED, ANSWERED = {"role": "user", "content": "天气"}, {"role": "assistant", "content": "今天晴。"}
LISTED = {"type": "function", "function": {"name": "weather"}}


def openai(call: dict[str, Any], role: str = "tool") -> dict[str, Any]:
    return {"messages": [ASKED, {"role": "assistant", **call}, {"role": role, "content": "晴"}, ANSWERED]}


@pytest.mark.parametrize(
    "record",
    [
        openai({"content": None, "tool_calls": [CALLED]}),
        openai({"tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "北京"}'}}]}),
        openai({"content": "", "function_call": {"name": "weather", "arguments": '{"city": "北京"}'}}, "function"),
        {
            "conversations": [
                {"from": "human", "value": "天气"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "北京"}}'},
                {"from": "observation", "value": "晴"},
                {"from": "gpt", "value": "今天晴。"},
            ]
        },
    ],
)
def test_every_form_of_a_call_gives_the_same_turns(record: dict[str, Any]) -> None:
    assert parse_conversation(record) == WANTED


@pytest.mark.parametrize("fields", [{"tools": [LISTED]}, {"tools": json.dumps([LISTED])}, {"functions": [{"name": "weather"}]}])
def test_the_list_of_functions_stands_before_all_turns(fields: dict[str, Any]) -> None:
    tools, *turns = parse_conversation({"messages": [ASKED, ANSWERED], **fields})
    assert (tools.role, json.loads(tools.content)) == ("tools", [LISTED])
    assert [turn.role for turn in turns] == ["user", "assistant"]
    assert parse_conversation({"messages": [ASKED, ANSWERED], "tools": "[]"})[0].role == "user"


def test_names_of_a_result_are_kept_and_it_may_be_empty() -> None:
    record = openai({"tool_calls": [{**CALLED, "id": "c1"}]})
    record["messages"][2] |= {"name": "weather", "tool_call_id": "c1", "content": ""}
    _, call, result, _ = parse_conversation(record)
    assert json.loads(call.extra)["tool_calls"][0]["id"] == "c1"
    assert (result.content, json.loads(result.extra)) == ("", {"name": "weather", "tool_call_id": "c1"})


def test_what_comes_behind_the_last_answer_is_left_away() -> None:
    record = openai({"tool_calls": [CALLED]})
    answered = parse_conversation({"messages": [ASKED, ANSWERED, *record["messages"][:3]]})
    assert [turn.role for turn in answered] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (openai({"tool_calls": [{"function": {}}]}), "turn 2: a call names no function"),
        (openai({"tool_calls": {"function": {}}}), "turn 2: 'tool_calls' is a JSON object, not a list"),
        (
            openai({"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}),
            "turn 2: the arguments of f are a JSON array",
        ),
        (openai({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}), "turn 2: arguments of f: not JSON"),
        ({"messages": [ASKED, ANSWERED], "tools": [1]}, "'tools' is a JSON array, not a list of objects"),
        ({"messages": [ASKED, ANSWERED], "tools": "weather"}, "tools: not JSON"),
        ({"messages": [ASKED, ANSWERED], "functions": 5}, "'functions' is a JSON number, not a list of objects"),
        ({"messages": [ASKED, ANSWERED], "functions": {"name": "f"}}, "'functions' is a JSON object, not a list of objects"),
        (
            {"messages": [ASKED, {"role": "tool", "content": "晴"}, ANSWERED]},
            "turn 2 is the tool's where the assistant is to speak",
        ),
        (
            {"messages": [ASKED, {"role": "assistant", "tool_calls": [CALLED]}, ANSWERED]},
            "turn 3 is the assistant's where the tool is to speak",
        ),
    ],
)
def test_a_call_that_is_none_says_why(record: object, reason: str) -> None:
    with pytest.raises(ValueError, match="^" + reason):
        parse_conversation(record)


def marked(**mark: Any) -> Conversation:
    return parse_conversation({"messages": [ASKED, {**ANSWERED, **mark}]})


def test_a_mark_says_whether_an_answer_is_learned() -> None:
    for mark in ({"train": False}, {"weight": 0}, {"weight": 0.0}, {"train": False, "weight": 0}):
        assert not marked(**mark)[1].is_learned
    for mark in ({}, {"train": True}, {"weight": 1.0}, {"train": None, "weight": None}):
        assert marked(**mark)[1].is_learned
    assert parse_conversation({"messages": [{**ASKED, "weight": 0.0}, ANSWERED]})[1].is_learned


@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        ({"train": "no"}, "turn 2: 'train' is 'no', neither true nor false"),
        ({"weight": 0.5}, "turn 2: 'weight' is 0.5; only 0 and 1 are known"),
        ({"train": True, "weight": 0}, "turn 2: 'train' is True, and 'weight' is 0"),
    ],
)
def test_a_mark_that_cannot_be_followed_is_not_passed_over(mark: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match="^" + reason):
        marked(**mark)
    with pytest.raises(ValueError, match="turn 1: is marked to be learned, and is the user's"):
        parse_conversation({"messages": [{**ASKED, "train": True}, ANSWERED]})
