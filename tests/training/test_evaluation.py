"""Scoring, on literals."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tasks.schemas import HELD_OUT, blocks_schema
from tasks.training.evaluation import (
    EvaluationSpec,
    bits_per_byte,
    count_rows,
    evaluation_of,
    label_accuracy,
    labels_of,
    mean_loss,
    read_blocks,
    read_held_out,
    score,
    stats_of,
    wilson,
)
from tasks.training.harness import HarnessSpec


def row(response: str, answer: str | None) -> dict[str, Any]:
    return {"prompt": "?", "response": response, "answer": answer, "likely": None, "loss": 0.5, "num_tokens": 2}


def write_stream(path: Path, schema: pa.Schema, batches: list[list[dict[str, Any]]]) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for rows in batches:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    return path


ROWS = [row("good", "good"), row("bad", "good"), row("bad ", "bad"), row("bad", "well"), row("good", None)]


def test_accuracy_counts_exact_matches_beside_the_commonest_response() -> None:
    held_out = score(ROWS)
    assert (held_out["num_rows"], held_out["num_right"], held_out["accuracy"]) == (5, 2, 0.4)
    assert (held_out["majority_response"], held_out["majority_share"]) == ("bad", 0.6)
    assert held_out["num_without_room"] == 1


def test_of_equally_common_responses_the_first_in_the_alphabet_is_the_baseline() -> None:
    assert score([row("b", "a"), row("a", "a")])["majority_response"] == "a"


def test_confusion_counts_every_answer_to_every_response() -> None:
    assert score(ROWS)["confusion"] == {
        "bad": {"bad": 1, "good": 1, "(other)": 1},
        "good": {"bad": 0, "good": 1, "(other)": 1},
    }


def test_open_questions_have_no_confusion_table() -> None:
    assert score([row(str(number), "?") for number in range(21)])["confusion"] is None


def test_answers_list_the_first_wrong_and_right_ones_in_the_files_order() -> None:
    rows = [row("a", "a" if number % 2 else "b") for number in range(200)]
    listed = score(rows)["answers"]
    assert [answer["is_right"] for answer in listed[:4]] == [False, True, False, True]
    assert sum(answer["is_right"] for answer in listed) == 20
    assert len(listed) == 50


# By the formula as Wilson's paper and statsmodels' proportion_confint(method="wilson") give it.
@pytest.mark.parametrize(
    ("num_right", "num_rows", "interval"),
    [(50, 100, (0.403832, 0.596168)), (0, 10, (0.0, 0.277533)), (10, 10, (0.722467, 1.0)), (1, 1, (0.206549, 1.0))],
)
def test_the_interval_is_wilsons(num_right: int, num_rows: int, interval: tuple[float, float]) -> None:
    assert wilson(num_right, num_rows) == pytest.approx(interval, abs=1e-6)


def test_bits_per_byte_is_the_loss_over_the_texts_bytes() -> None:
    # ln 2 nats a token is 1 bit a token; 300 tokens for 600 bytes.
    assert bits_per_byte(0.6931471805599453, 300, 600) == pytest.approx(0.5)


def test_evaluation_holds_none_for_what_was_not_measured() -> None:
    nothing = {"validation": None, "examples": None, "held_out": None, "harness": None, "samples": []}
    evaluation = evaluation_of(nothing, {})
    assert evaluation == nothing
    assert stats_of(evaluation) == {"num_samples": 0}


def test_stats_tell_the_figures() -> None:
    validation = {"loss": 0.69314718, "num_blocks": 1, "num_tokens": 7}
    examples = {"loss": 1.5000004, "num_rows": 1, "num_tokens": 3}
    harness = {"figures": {"ceval.acc": 0.25}, "version": "0"}
    result = {"validation": validation, "examples": examples, "held_out": ROWS, "harness": harness, "samples": []}
    stats = stats_of(evaluation_of(result, {"num_tokens": 300, "num_bytes": 600}))
    assert stats == {
        "num_samples": 0,
        "validation_loss": 0.693147,
        "validation_bits_per_byte": 0.5,
        "held_out_accuracy": 0.4,
        "num_held_out": 5,
        "majority_share": 0.6,
        "held_out_loss": 0.25,
        "examples_loss": 1.5,
        "harness": {"ceval.acc": 0.25},
    }


def test_accuracy_by_labels_counts_the_likeliest_and_is_absent_for_open_questions() -> None:
    labelled = [{**row("good", "?"), "likely": "good"}, {**row("bad", "?"), "likely": "good"}, row("bad", "?")]
    assert label_accuracy(labelled) == pytest.approx(1 / 3, abs=1e-6)
    assert label_accuracy(ROWS) is None


def test_the_loss_of_responses_is_a_mean_over_their_tokens() -> None:
    rows = [{**row("a", "a"), "loss": 6.0, "num_tokens": 3}, {**row("b", "b"), "loss": 0.0, "num_tokens": 1}]
    assert mean_loss(rows) == 1.5
    assert mean_loss([{**row("a", None), "num_tokens": 0}]) is None


def test_few_distinct_responses_are_labels_and_many_are_not() -> None:
    assert labels_of(["good", "bad ", "good"]) == ["bad", "good"]
    assert labels_of(["good", "good"]) == []
    assert labels_of(str(number) for number in range(21)) == []


def test_blocks_are_read_across_files_and_batches_up_to_a_number(tmp_path: Path) -> None:
    schema = blocks_schema(2)
    first = write_stream(tmp_path / "a.arrow", schema, [[{"input_ids": [1, 2]}], [{"input_ids": [3, 4]}, {"input_ids": [5, 6]}]])
    second = write_stream(tmp_path / "b.arrow", schema, [[{"input_ids": [7, 8]}, {"input_ids": [9, 9]}]])
    assert [list(block) for block in read_blocks([str(first), str(second)], 4)] == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert len(list(read_blocks([str(first), str(second)], 9))) == 5


def test_a_split_shorter_than_one_block_has_none(tmp_path: Path) -> None:
    empty = write_stream(tmp_path / "a.arrow", blocks_schema(2), [[]])
    assert list(read_blocks([str(empty)], 0)) == []


def test_held_out_rows_are_the_first_ones(tmp_path: Path) -> None:
    rows = [{"prompt_ids": [number], "response": str(number)} for number in range(5)]
    path = write_stream(tmp_path / "held-out.arrow", HELD_OUT, [rows[:2], rows[2:]])
    assert count_rows(path) == 5
    assert read_held_out(path, 3) == rows[:3]


def test_every_field_changes_the_key() -> None:
    changed = {
        "prompts": ("a",),
        "chat_prompts": ("a",),
        "max_sample_tokens": 1,
        "temperature": 0.1,
        "top_p": 0.1,
        "seed": 1,
        "max_validation_blocks": 1,
        "max_held_out": 1,
        "max_new_tokens": 1,
        "dtype": "bfloat16",
        "document_attention": "within",
        "harness": HarnessSpec(folder="x", tasks=("a",)),
    }
    assert set(changed) == set(EvaluationSpec.model_fields)
    plain = EvaluationSpec().identity()
    assert all(EvaluationSpec(**{name: value}).identity() != plain for name, value in changed.items())
