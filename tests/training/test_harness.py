"""lm-eval on a folder of task files written here, over a tiny model."""

from pathlib import Path

import orjson
import pytest

from tasks.errors import RecipeError, SourceError
from tasks.machine import Machine
from tasks.store import ArtifactStore
from tasks.training.evaluation import EvaluationSpec, build_evaluation
from tasks.training.harness import HarnessSpec, figures_of, identify_tasks
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
QUESTIONS = [
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


@pytest.mark.slow  # lm-eval takes seconds to import
def test_a_model_is_measured_on_the_tasks_of_a_folder_and_the_figures_are_kept(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    store = ArtifactStore(tmp_path / "store")
    model = build_tiny_model(store, Machine(), FolderSpec())
    spec = EvaluationSpec(harness=HarnessSpec(folder=str(folder), tasks=("capitals",)))
    evaluation = build_evaluation(store, Machine(), spec, model=model)
    accuracy = evaluation.stats["harness"]["capitals.acc"]
    assert round(accuracy * len(QUESTIONS)) == pytest.approx(accuracy * len(QUESTIONS), abs=1e-4)
    assert orjson.loads(evaluation.file("evaluation.json").read_bytes())["harness"] == evaluation.stats["harness"]
    assert build_evaluation(store, Machine(), spec, model=model).found
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
