"""Held-out conversations: questions for the model, which no example answers."""

from collections.abc import Callable

import pytest

from tasks.errors import CorpusError
from tasks.schemas import HELD_OUT
from tasks.store import Artifact
from tests.corpus.conversing import adds_up, belle, numbered, refused, table
from tests.corpus.templates import QWEN3


def test_a_held_out_conversation_is_a_prompt_and_a_response(make: Callable[..., Artifact]) -> None:
    artifact = make(numbered(3), held_out=belle("ab", "cd", "ef", "gh"), block_size=256)
    rows = table(artifact, "held-out.arrow")
    assert rows.schema == HELD_OUT
    (row,) = rows.to_pylist()
    assert row["response"] == "gh"
    assert row["prompt_ids"][0] == 257
    assert row["prompt_ids"][-10:] == [64, 82, 82, 72, 82, 83, 64, 77, 83, row["prompt_ids"][-1]]  # "assistant", line feed
    assert 71 not in row["prompt_ids"][-10:]  # "h"
    assert artifact.stats["held_out"] == {"num_conversations": 1, "num_held_out": 1, "num_quarantined": 0, "num_too_long": 0}


def test_the_prompt_begins_as_an_example_of_the_same_conversation_does(make: Callable[..., Artifact]) -> None:
    held = make(numbered(3), held_out=belle("问", "答"), template=QWEN3, block_size=128)
    prompt = table(held, "held-out.arrow")["prompt_ids"][0].as_py()
    example = table(make(belle("问", "答"), template=QWEN3, block_size=128))["input_ids"][0].as_py()
    assert example[: len(prompt)] == prompt


def test_a_conversation_that_asks_what_is_held_out_is_dropped_and_counted(make: Callable[..., Artifact]) -> None:
    lines = belle("ＡＢ  问", "另一个答") + belle("别的", "答")
    artifact = make(lines, held_out=belle("AB 问", "答"), block_size=256)
    assert artifact.stats["num_in_held_out"] == 1
    assert artifact.stats["num_examples"] == 1
    assert adds_up(artifact.stats)


def test_a_held_out_question_answered_on_the_way_is_not_learned(make: Callable[..., Artifact]) -> None:
    held_out = belle("考题", "答案")
    longer, other = belle("考题", "答案", "再问", "再答"), belle("再问", "再答")
    assert make(longer + other, held_out=held_out, block_size=256).stats["num_in_held_out"] == 1
    shortened = make(belle("长" * 70, "答", "考题", "答案") + other, held_out=held_out, block_size=128, too_long="drop_turns")
    assert (shortened.stats["num_in_held_out"], shortened.stats["num_examples"]) == (1, 1)
    assert adds_up(shortened.stats)


def test_a_held_out_prompt_that_leaves_no_room_for_the_answer_is_dropped_and_counted(make: Callable[..., Artifact]) -> None:
    artifact = make(numbered(3), held_out=belle("a" * 200, "b") + belle("a", "b"), block_size=128)
    assert artifact.stats["held_out"]["num_too_long"] == 1
    assert table(artifact, "held-out.arrow").num_rows == 1
    with pytest.raises(CorpusError, match="held_out: no question is left"):
        make(numbered(3), held_out=belle("a" * 200, "b"), block_size=128)


def test_the_baseline_answers_always_the_same(make: Callable[..., Artifact]) -> None:
    held_out = b"".join(belle(f"评论{number}", "正面" if number % 3 else "负面") for number in range(9))
    artifact = make(numbered(3), held_out=held_out, block_size=256)
    assert artifact.stats["baseline"] == {"majority_response": "正面", "majority_share": 0.666667}


def test_bad_held_out_lines_are_told_apart_in_the_quarantine(make: Callable[..., Artifact]) -> None:
    artifact = make(
        numbered(3) + b"{}\n",
        held_out=b"[]\n".replace(b"[]", b"3") + belle("问", "答"),
        block_size=256,
        max_quarantined_fraction=0.5,
    )
    assert refused(artifact) == [
        (4, "no known form of conversation: its fields are none"),
        (1, "held_out: a JSON number, not an object"),
    ]
