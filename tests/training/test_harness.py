"""lm-eval on a folder of task files written here, over a tiny model."""

from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest

from tasks.errors import RecipeError, SourceError
from tasks.machine import Machine
from tasks.schemas import IGNORED_LABEL, examples_schema
from tasks.store import ArtifactStore, Built, Work, stage
from tasks.training.evaluation import EvaluationSpec, build_evaluation
from tasks.training.generate import load_language_model
from tasks.training.harness import HarnessSpec, figures_of, identify_tasks
from tasks.training.likelihood import answer_losses
from tests.training.tiny import FolderSpec, build_tiny_model

TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
QUESTIONS: list[dict[str, Any]] = [
    {"question": "法国的首都是", "choices": ["巴黎", "罗马"], "answer": 0},
    {"question": "1+1=", "choices": ["3", "2"], "answer": 1},
    {"question": "Rome is in", "choices": [" Italy", " Peru"], "answer": 0},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "capitals.yaml").write_text(TASK)
    (folder / "questions.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in QUESTIONS))
    return folder


@stage("examples", revision=1)
def build_examples(work: Work, spec: FolderSpec) -> Built:
    """One row, whose reading imports datasets before the harness does."""
    row = {"input_ids": [1, 2, 3, 4], "labels": [IGNORED_LABEL, 2, 3, 4], "position_ids": [0, 1, 2, 3]}
    with pa.OSFile(str(work.folder / "validation.arrow"), "wb") as sink, pa.ipc.new_stream(sink, examples_schema(4)) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([row], schema=examples_schema(4)))
    return Built()


def right_by_hand(model_dir: Path) -> float:
    """The share of questions whose right choice is the likeliest behind the question and a space."""
    model, num_right = load_language_model(model_dir).model, 0
    for row in QUESTIONS:
        choices = [list(f" {choice}".encode()) for choice in row["choices"]]
        losses = answer_losses(model, [list(row["question"].encode())] * len(choices), choices, batch_size=1)
        num_right += losses.index(min(losses)) == row["answer"]
    return num_right / len(QUESTIONS)


@pytest.mark.slow  # lm-eval takes seconds to import
def test_a_model_is_measured_on_the_tasks_of_a_folder_and_the_figures_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # what the evaluator reads, which is a process of its own
    store = ArtifactStore(tmp_path / "store")
    model, examples = build_tiny_model(store, Machine(), FolderSpec()), build_examples(store, Machine(), FolderSpec())
    spec = EvaluationSpec(harness=HarnessSpec(folder=str(folder), tasks=("capitals",)))
    evaluation = build_evaluation(store, Machine(), spec, model=model, examples=examples)
    assert evaluation.stats["harness"]["capitals.acc"] == pytest.approx(right_by_hand(model.path), abs=1e-6)
    assert not (tmp_path / "home" / "datasets").exists()
    assert orjson.loads(evaluation.file("evaluation.json").read_bytes())["harness"] == evaluation.stats["harness"]
    assert build_evaluation(store, Machine(), spec, model=model, examples=examples).found
    absent = HarnessSpec(folder=str(folder), tasks=("ceval",))
    with pytest.raises(RecipeError, match=r"evaluation.harness.tasks: no ceval in .*; it has capitals"):
        build_evaluation(store, Machine(), EvaluationSpec(harness=absent), model=model)


def test_a_folder_of_tasks_is_known_by_its_files_not_by_its_place(folder: Path, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    before = identify_tasks(HarnessSpec(folder=str(folder), tasks=("a",)), store)
    moved = folder.rename(tmp_path / "moved")
    (moved / "__pycache__").mkdir()
    (moved / "__pycache__" / "utils.pyc").write_bytes(b"x")
    assert identify_tasks(HarnessSpec(folder=str(moved), tasks=("a",)), store) == before
    (moved / "questions.jsonl").write_text("{}")
    assert identify_tasks(HarnessSpec(folder=str(moved), tasks=("a",)), store) != before
    assert identify_tasks(None, store) is None


def test_a_folder_without_a_task_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no task file \(\*.yaml\) in it; name a folder of lm-eval tasks"):
        identify_tasks(HarnessSpec(folder=str(tmp_path), tasks=("a",)), ArtifactStore(tmp_path))


def test_figures_are_named_by_task_metric_and_filter_without_their_errors() -> None:
    results = {"mmlu": {"alias": "mmlu", "acc,none": 0.25, "acc_stderr,none": 0.1, "exact_match,strict": 0.123456789, "n": 3}}
    assert figures_of(results) == {"mmlu.acc": 0.25, "mmlu.exact_match.strict": 0.123457}


def test_every_keyed_field_changes_the_key() -> None:
    plain = HarnessSpec(folder="x", tasks=("a",))
    assert HarnessSpec(folder="y", tasks=("a",)).identity() == plain.identity()
    changed = {"tasks": ("b",), "num_fewshot": 1, "limit": 1, "chat": True}
    assert {"folder", *changed} == set(HarnessSpec.model_fields)
    assert all(plain.model_copy(update={name: value}).identity() != plain.identity() for name, value in changed.items())
