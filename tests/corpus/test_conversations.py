"""Records of every published form to conversations."""

from typing import Any

import pytest

from tasks.corpus.conversations import Format, conversation_digest, parse_conversation, question_digests
from tasks.corpus.turns import Turn

ASKED = (Turn("user", "你好"), Turn("assistant", "你好！"))


@pytest.mark.parametrize(
    ("form", "record"),
    [
        ("belle", {"id": "1", "conversations": [{"from": "human", "value": "你好"}, {"from": "assistant", "value": "你好！\n"}]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": " 你好"}, {"from": "gpt", "value": "你好！"}]}),
        ("alpaca", {"instruction": "你好", "input": "", "output": "你好！"}),
        ("messages", {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]}),
        ("mobvoi", {"input": "你好", "target": "你好！", "task": "闲聊"}),
    ],
)
def test_every_form_gives_the_same_conversation_named_or_told_by_its_fields(form: Format, record: dict[str, Any]) -> None:
    assert parse_conversation(record, form) == ASKED
    assert parse_conversation(record) == ASKED


def test_a_system_turn_comes_first() -> None:
    turns = [{"from": "system", "value": "简短"}, {"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"}]
    assert parse_conversation({"conversations": turns}) == (Turn("system", "简短"), *ASKED)
    alpaca = {"instruction": "你好", "output": "你好！", "system": "简短"}
    assert parse_conversation(alpaca) == (Turn("system", "简短"), *ASKED)


def test_alpacas_input_follows_the_instruction_and_its_history_comes_before() -> None:
    record = {"instruction": "翻译", "input": "早", "output": "morning", "history": [["你好", "你好！"]]}
    assert parse_conversation(record) == (*ASKED, Turn("user", "翻译\n早"), Turn("assistant", "morning"))


def test_a_question_without_an_answer_is_left_away() -> None:
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}, {"role": "user", "content": "嗯"}]
    assert parse_conversation({"messages": turns}) == ASKED


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "a JSON array, not an object"),
        ("文", "a JSON string, not an object"),
        (None, "a JSON null, not an object"),
        ({}, "no known form of conversation: its fields are none"),
        ({"text": "文"}, "no known form of conversation: its fields are 'text'"),
        ({"conversations": "文"}, "'conversations' is not a list of objects"),
        ({"conversations": ["文"]}, "'conversations' is not a list of objects"),
        ({"conversations": []}, "no assistant turn"),
        ({"conversations": [{"from": "human", "value": "你好"}]}, "no assistant turn"),
        ({"conversations": [{"from": "robot", "value": "你好"}]}, "turn 1: unknown role 'robot'"),
        ({"conversations": [{"value": "你好"}]}, "turn 1: unknown role None"),
        ({"conversations": [{"from": ["human"], "value": "你好"}]}, "turn 1: unknown role"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 1: 'value' is a JSON number, not a text"),
        ({"conversations": [{"from": "human"}]}, "turn 1: 'value' is missing, not a text"),
        ({"conversations": [{"from": "human", "value": "你"}, {"from": "gpt", "value": " \n"}]}, "turn 2: 'value' is empty"),
        ({"conversations": [{"from": "gpt", "value": "你好"}]}, "turn 1 is the assistant's where the user is to speak"),
        (
            {"messages": [{"role": role, "content": "文"} for role in ("user", "user", "assistant")]},
            "turn 2 is the user's where the assistant is to speak",
        ),
        (
            {"messages": [{"role": role, "content": "文"} for role in ("user", "assistant", "system", "assistant")]},
            "turn 3 is the system's where the user is to speak",
        ),
        ({"messages": [{"role": "tool", "content": "文"}]}, "no assistant turn"),
        ({"instruction": "文", "output": None}, "'output' is a JSON null, not a text"),
        ({"instruction": "文", "input": 3, "output": "文"}, "'input' is a JSON number, not a text"),
        ({"instruction": "文", "output": "文", "history": [["一"]]}, "'history' is not a list of pairs"),
        ({"instruction": "文", "output": "文", "history": [["一", ""]]}, "history 1: 'answer' is empty"),
        ({"input": "文", "target": ""}, "'target' is empty"),
        ({"input": "\ud800", "target": "文"}, "'input' holds half a surrogate pair at character 0"),
    ],
)
def test_a_record_that_holds_no_conversation_says_why(record: object, reason: str) -> None:
    with pytest.raises(ValueError, match="^" + reason.replace("(", r"\(")):
        parse_conversation(record)


@pytest.mark.parametrize("form", ["belle", "sharegpt", "alpaca", "messages", "mobvoi"])
def test_a_named_form_takes_no_other(form: Format) -> None:
    others = {
        "belle": {"messages": []},
        "sharegpt": {"input": "一", "target": "二"},
        "alpaca": {"input": "一", "target": "二"},
        "messages": {"conversations": []},
        "mobvoi": {"instruction": "一", "output": "二"},
    }
    with pytest.raises(ValueError, match=r"missing|not a list"):
        parse_conversation(others[form], form)


def test_belles_roles_are_its_own() -> None:
    with pytest.raises(ValueError, match="unknown role 'gpt'; known are human, assistant, system"):
        parse_conversation({"conversations": [{"from": "gpt", "value": "文"}]}, "belle")


def test_a_question_is_the_same_in_another_width_and_spacing() -> None:
    one = (Turn("user", "ＡＢ  好\n吗"), Turn("assistant", "好"))
    other = (Turn("system", "简短"), Turn("user", "AB 好 吗"), Turn("assistant", "不好"))
    assert question_digests(one) == question_digests(other)
    assert conversation_digest(one) != conversation_digest(other)


def test_a_conversation_answers_the_question_of_every_beginning() -> None:
    one = (Turn("user", "谁"), Turn("assistant", "我"))
    longer = (*one, Turn("user", "为什么"), Turn("assistant", "好"))
    assert question_digests(longer)[:1] == question_digests(one)
    assert len(set(question_digests(longer))) == 2
