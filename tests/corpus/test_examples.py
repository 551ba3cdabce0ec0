"""The examples stage: what becomes of every conversation."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tasks.corpus import examples
from tasks.corpus.chat import CHATML
from tasks.corpus.examples import ExamplesSpec, build_examples
from tasks.errors import CorpusError, RecipeError
from tasks.machine import Machine
from tasks.schemas import IGNORED_LABEL, examples_schema
from tasks.store import Artifact, ArtifactStore
from tests.corpus.conversing import adds_up, belle, numbered, refused, table
from tests.corpus.templates import QWEN3, TEMPLATES

Archives = Callable[[bytes], Artifact]

# With the byte tokenizer and ChatML an example of one pair takes 21 ids beside its words' bytes.
HEADERS = 21


def test_a_conversation_is_a_row_with_its_answer_learned(make: Callable[..., Artifact]) -> None:
    artifact = make(belle("ab", "cd"), block_size=40)
    rows = table(artifact)
    assert rows.schema == examples_schema(40)
    row = {name: np.array(values[0]) for name, values in rows.to_pydict().items()}
    learned = row["labels"] != IGNORED_LABEL
    # Each byte's id is the rank of its byte-level letter: "!" is 0, so "c" is 66. <|im_end|> is 258, the padding 256.
    assert row["labels"][learned].tolist() == [66, 67, 258]
    assert np.flatnonzero(learned).tolist() == [21, 22, 23]
    assert row["input_ids"][25:].tolist() == [256] * 15
    assert row["position_ids"].tolist() == [*range(25), *range(15)]
    assert {name: artifact.stats[name] for name in ("num_examples", "num_rows", "num_tokens", "num_supervised_tokens")} == {
        "num_examples": 1, "num_rows": 1, "num_tokens": 25, "num_supervised_tokens": 3,
    }  # fmt: skip
    assert (artifact.stats["block_size"], artifact.stats["vocab_size"]) == (40, 261)


def test_every_form_of_conversation_gives_the_same_example(make: Callable[..., Artifact]) -> None:
    forms = [
        {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "您好"}]},
        {"instruction": "你好", "input": "", "output": "您好"},
        {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好"}]},
        {"input": "你好", "target": "您好", "task": "闲聊"},
    ]
    assert len({make(json.dumps(form).encode()).content for form in [*forms, json.loads(belle("你好", "您好"))]}) == 1
    assert make(json.dumps(forms[:1]).encode()).stats["num_examples"] == 1  # one JSON array


def test_examples_share_rows_and_none_is_cut(make: Callable[..., Artifact]) -> None:
    artifact = make(numbered(50), block_size=128)
    rows = table(artifact).to_pydict()
    ids, labels = np.array(rows["input_ids"]), np.array(rows["labels"])
    assert artifact.stats["num_rows"] == len(ids) < 50
    assert np.count_nonzero(ids == 257) == 100  # every turn's opening and closing marker is there
    assert np.count_nonzero(ids == 258) == 100
    assert np.count_nonzero(labels == 258) == 50
    assert np.array_equal(labels[labels != IGNORED_LABEL], ids[labels != IGNORED_LABEL])
    starts = np.count_nonzero(np.array(rows["position_ids"]) == 0)
    assert starts == 50 + sum(row[-1] == 256 for row in ids)


def test_bad_lines_go_to_quarantine_with_number_and_reason(make: Callable[..., Artifact]) -> None:
    lines = (
        belle("一", "二")
        + b"{\n\n"
        + b'{"text": "x"}\n'
        + belle("问")
        + belle("<|im_end|>", "答")
        + b"\xff\n"
        + belle("三", "四")
    )
    artifact = make(lines, max_quarantined_fraction=0.9)
    assert [line for line, _ in refused(artifact)] == [2, 4, 5, 6, 7]
    reasons = dict(refused(artifact))
    assert reasons[2].startswith("not JSON")
    assert reasons[4] == "no known form of conversation: its fields are 'text'"
    assert reasons[5] == "no assistant turn: nothing to learn"
    assert reasons[6] == "turn 1: its text holds the special token <|im_end|>"
    assert reasons[7] == "not UTF-8"
    assert artifact.stats["num_examples"] == 2
    assert adds_up(artifact.stats)


def test_too_many_bad_lines_fail_the_stage_with_the_first(make: Callable[..., Artifact]) -> None:
    with pytest.raises(CorpusError, match=r"2 of 4 lines hold no .* fraction 0\.01 .* line 2: no known form"):
        make(belle("一", "二") + b"{}\n" * 2 + belle("三", "四"))
    with pytest.raises(CorpusError, match="1000 of 1000 lines hold no conversation"):
        make(b'{"text": "x"}\n' * 1500, max_quarantined_fraction=1.0)


def test_a_conversation_that_the_template_refuses_goes_to_quarantine(make: Callable[..., Artifact]) -> None:
    template = "{% if '骂' in messages[0].content %}{{ raise_exception('rude') }}{% endif %}" + QWEN3
    artifact = make(belle("骂", "二") + belle("三", "四"), template=template, max_quarantined_fraction=0.5)
    assert refused(artifact) == [(1, "the chat template refuses it: rude")]
    assert adds_up(artifact.stats)


def test_copies_count_once_unless_they_are_wanted(make: Callable[..., Artifact]) -> None:
    lines = belle("一", "二") * 3 + belle("一", "三")
    assert {name: make(lines).stats[name] for name in ("num_examples", "num_duplicates")} == {
        "num_examples": 2,
        "num_duplicates": 2,
    }
    assert make(lines, deduplicate=False).stats["num_examples"] == 4


def test_a_conversation_as_long_as_a_row_stays_and_one_longer_is_dropped_and_counted(make: Callable[..., Artifact]) -> None:
    artifact = make(belle("a", "b" * (64 - HEADERS - 1)) + belle("a", "b" * (64 - HEADERS)), block_size=64)
    assert artifact.stats["num_too_long"] == 1
    assert artifact.stats["num_tokens"] == 64
    assert adds_up(artifact.stats)


def test_turns_are_dropped_from_the_front_where_the_spec_says_so(make: Callable[..., Artifact]) -> None:
    lines = belle("a" * 9, "b" * 9, "c" * 9, "d" * 9) + belle("e", "f" * 60)
    artifact = make(lines, block_size=64, too_long="drop_turns")
    assert {name: artifact.stats[name] for name in ("num_examples", "num_shortened", "num_too_long")} == {
        "num_examples": 1, "num_shortened": 1, "num_too_long": 1,
    }  # fmt: skip
    row = table(artifact).to_pydict()
    assert row["labels"][0].count(67) == 9  # the d's
    assert row["input_ids"][0].count(64) == 2  # of the a's only those of the header's "assistant" are left
    assert adds_up(artifact.stats)


def test_a_conversation_whose_rest_the_template_refuses_goes_to_quarantine(make: Callable[..., Artifact]) -> None:
    template = "{% if 'c' in messages[0].content %}{{ raise_exception('begins in the middle') }}{% endif %}" + QWEN3
    lines = belle("a" * 30, "b" * 30, "c" * 9, "d" * 9) + belle("e", "f")
    artifact = make(lines, template=template, too_long="drop_turns", max_quarantined_fraction=0.5)
    assert refused(artifact) == [(1, "the chat template refuses it: begins in the middle")]
    assert adds_up(artifact.stats)


def test_a_system_turn_is_put_where_there_is_none_and_stays_when_turns_are_dropped(make: Callable[..., Artifact]) -> None:
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    own = make(json.dumps({"messages": turns}).encode()).stats["num_tokens"]
    assert make(json.dumps({"messages": turns}).encode(), system="given").stats["num_tokens"] == own
    assert make(json.dumps({"messages": turns[1:]}).encode(), system="given").stats["num_tokens"] == own + len("given") - 1
    shortened = make(belle("a" * 15, "b" * 15, "c", "d"), system="given", too_long="drop_turns", block_size=64)
    assert shortened.stats["num_shortened"] == 1
    with pytest.raises(RecipeError, match=r"examples\.system: holds the special token <\|im_end\|>"):
        make(belle("q", "s"), system="<|im_end|>")


def test_what_the_template_rewrites_is_counted_and_a_row_with_nothing_to_learn_dropped(make: Callable[..., Artifact]) -> None:
    template = (
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content | replace('坏', '好') + '<|im_end|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    artifact = make(belle("问", "坏") + belle("问", "坏", "再问", "答"), template=template, block_size=256)
    assert {name: artifact.stats[name] for name in ("num_examples", "num_nothing_to_learn", "num_turns_rewritten")} == {
        "num_examples": 1, "num_nothing_to_learn": 1, "num_turns_rewritten": 2,
    }  # fmt: skip
    assert artifact.stats["num_supervised_tokens"] == len("答".encode()) + 1
    assert adds_up(artifact.stats)


def learned(artifact: Artifact) -> list[int]:
    """The labels of all rows, those that are ignored left away."""
    labels = np.array(table(artifact)["labels"].to_pylist())
    return [int(label) for label in labels[labels != IGNORED_LABEL]]


def test_all_answers_are_learned_or_the_last_alone(make: Callable[..., Artifact]) -> None:
    lines = belle("a", "b", "c", "d")
    # "b" is id 65, "d" 67, the end marker 258.
    assert learned(make(lines)) == [65, 258, 67, 258]
    last = make(lines, train_on="last")
    assert learned(last) == [67, 258]
    assert {name: last.stats[name] for name in ("num_answers_proven", "num_answers_not_learned")} == {
        "num_answers_proven": 1, "num_answers_not_learned": 1,
    }  # fmt: skip
    assert table(last)["input_ids"] == table(make(lines))["input_ids"]


def test_an_answer_marked_not_to_be_trained_is_context_alone(make: Callable[..., Artifact]) -> None:
    marks: list[dict[str, Any]] = [{"train": False}, {"weight": 0}]
    for mark in marks:
        turns = [
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **mark},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
        ]  # fmt: skip
        assert learned(make(json.dumps({"messages": turns}).encode())) == [67, 258]
    nothing = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    artifact = make(json.dumps({"messages": nothing}).encode() + b"\n" + belle("a", "b"))
    assert artifact.stats["num_nothing_to_learn"] == 1
    assert adds_up(artifact.stats)


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "x"}'}}]}
ASKS_A_TOOL = [
    {"role": "user", "content": "a"}, CALL, {"role": "tool", "content": "y"}, {"role": "assistant", "content": "d"},
]  # fmt: skip


def test_calls_and_their_results_go_to_the_template_and_are_not_learned(make: Callable[..., Artifact]) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    line = json.dumps({"messages": ASKS_A_TOOL, "tools": tools}).encode()
    template = TEMPLATES["own"][0].replace("<turn>", "<|im_start|>").replace("</turn>", "<|im_end|>")  # type: ignore[union-attr]
    artifact = make(line, template=template, block_size=320)
    assert learned(artifact) == [67, 258]
    assert artifact.stats["num_calls"] == 1
    (row,) = table(artifact)["input_ids"].to_pylist()
    assert row.count(257) == 5  # the tools, and four turns


def test_a_template_that_leaves_a_call_away_refuses_the_conversation(make: Callable[..., Artifact]) -> None:
    artifact = make(json.dumps({"messages": ASKS_A_TOOL}).encode() + b"\n" + belle("a", "b"), max_quarantined_fraction=0.5)
    assert refused(artifact) == [(1, "the chat template leaves the call away, turn 2")]
    assert adds_up(artifact.stats)


def test_the_template_that_was_used_goes_along(make: Callable[..., Artifact]) -> None:
    assert make(belle("a", "b")).file("chat_template.jinja").read_text() == CHATML
    assert make(belle("a", "b"), template=QWEN3, block_size=128).file("chat_template.jinja").read_text() == QWEN3
    assert make(belle("a", "b")).stats["end_markers"] == {"<|im_end|>": 258}


def test_only_the_first_conversations_are_read_where_a_limit_is_set(make: Callable[..., Artifact]) -> None:
    artifact = make(numbered(10) + b"not read\n", max_conversations=10)
    assert artifact.stats["num_conversations"] == artifact.stats["num_examples"] == 10
    assert make(numbered(10), max_conversations=4).stats["num_conversations"] == 4


def test_the_validation_split_takes_its_share_and_no_question_stands_on_both_sides(make: Callable[..., Artifact]) -> None:
    lines = b"".join(belle(f"问题{number // 2}", f"回答{number}") for number in range(200))
    artifact = make(lines, validation_fraction=0.25)
    train, validation = (artifact.stats[split] for split in ("train", "validation"))
    assert train["num_examples"] + validation["num_examples"] == artifact.stats["num_examples"] == 200
    assert train["num_examples"] % 2 == validation["num_examples"] % 2 == 0
    assert 20 < validation["num_examples"] < 80
    assert table(artifact, "validation.arrow").num_rows == validation["num_rows"]
    assert not make(lines).has_file("validation.arrow")


def test_conversations_that_begin_alike_stand_in_one_split(make: Callable[..., Artifact]) -> None:
    alone = [belle(f"问题{number}", "答") for number in range(40)]
    longer = [belle(f"问题{number}", "答", "再问", "再答") for number in range(40)]
    fields = {"validation_fraction": 0.5, "block_size": 128}
    one, both = (make(b"".join(lines), **fields).stats["validation"]["num_examples"] for lines in (alone, alone + longer))
    assert 0 < one < 40
    assert both == 2 * one


def test_no_example_left_is_an_error_with_the_counts(make: Callable[..., Artifact]) -> None:
    with pytest.raises(CorpusError, match=r"no example is left of 2 conversations .*'num_too_long': 2"):
        make(belle("a" * 50, "b") + belle("a" * 51, "b"), block_size=64)


def test_a_line_whose_labels_do_not_hold_is_named(make: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(chat: Any, rendered: Any) -> list[examples.Example]:
        right = real(chat, rendered)
        return [examples.Example(one.input_ids, one.input_ids) for one in right]

    real = examples.make_examples
    monkeypatch.setattr(examples, "make_examples", mistaken)
    with pytest.raises(CorpusError, match=r"conversations: line 2: labels: .*⟦.*一.*⟧.*; the chat template does not fit"):
        make(b"\n" + belle("一", "二"))


@pytest.mark.parametrize("fields", [{"block_size": 0}, {"validation_fraction": 1.0}, {"format": "xml"}, {"too_long": "cut"}])
def test_a_spec_that_cannot_be_is_refused_when_parsed(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ExamplesSpec(**{"block_size": 64, **fields})


# The contract of every stage

EVERY_FIELD = {
    "block_size": 65, "format": "belle", "system": "简短", "too_long": "drop_turns", "validation_fraction": 0.1,
    "train_on": "last", "max_conversations": 5, "max_quarantined_fraction": 0.5, "deduplicate": False,
}  # fmt: skip


def test_every_field_changes_the_key() -> None:
    assert set(EVERY_FIELD) == set(ExamplesSpec.model_fields)
    base = build_examples.identity(ExamplesSpec(block_size=64), {})
    for name, value in EVERY_FIELD.items():
        assert build_examples.identity(ExamplesSpec(**{"block_size": 64, name: value}), {}) != base, name


def test_neither_workers_nor_batches_nor_a_killed_run_change_the_content(
    store: ArtifactStore,
    tmp_path: Path,
    make: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
    tokenizer_of: Any,
    archive_of: Archives,
) -> None:
    lines, spec = numbered(40), ExamplesSpec(block_size=128, validation_fraction=0.2)
    first = make(lines, block_size=128, validation_fraction=0.2)
    for batch, num_workers in ((1, 2), (7, 3)):
        monkeypatch.setattr(examples, "BATCH_CONVERSATIONS", batch)
        other = ArtifactStore(tmp_path / f"other-{batch}")
        inputs = {"conversations": archive_of(lines), "tokenizer": tokenizer_of(None)}
        scratch = other.staging("examples", first.key) / ".scratch"
        scratch.mkdir()
        (scratch / "train.ids").write_bytes(b"left by a killed run")
        again = build_examples(other, Machine(num_workers=num_workers), spec, **inputs)
        assert (again.key, again.content, again.stats) == (first.key, first.content, first.stats)


def test_golden(make: Callable[..., Artifact]) -> None:
    lines = numbered(30) + belle("第一问", "第一答", "第二问", "第二答") + belle("长" * 100, "短")
    artifact = make(lines, held_out=belle("考题", "答案"), template=QWEN3, block_size=192, validation_fraction=0.2)
    digest = hashlib.sha256()
    for name in ("train.arrow", "validation.arrow"):
        for column in table(artifact, name).columns:
            digest.update(np.array(column.to_pylist(), "<i4").tobytes())
    digest.update(json.dumps(table(artifact, "held-out.arrow").to_pylist(), sort_keys=True).encode())
    # Changed on purpose? Then the stage's revision rises, and CHANGELOG.md says what is rebuilt.
    assert digest.hexdigest()[:16] == "64ba021e5729b7a2"
