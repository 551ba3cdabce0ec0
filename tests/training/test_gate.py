"""Gates, on figures written here."""

import itertools
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from tasks.errors import GateError, RecipeError
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Built, Spec, Work, stage
from tasks.training.gate import GateSpec, build_gate


class FiguresSpec(Spec):
    figures: dict[str, Any]


@stage("evaluation", revision=1)
def build_figures(work: Work, spec: FiguresSpec) -> Built:
    (work.folder / "evaluation.json").write_bytes(orjson.dumps(spec.figures))
    return Built(stats=spec.figures)


CHILD = {"validation_loss": 2.0, "held_out_accuracy": 0.8, "harness": {"ceval.acc": 0.3, "wiki.word_perplexity": 9.0}}
PARENT = {"validation_loss": 1.5, "held_out_accuracy": 0.75}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def judge(store: ArtifactStore, **fields: Any) -> Artifact:
    evaluation = build_figures(store, Machine(), FiguresSpec(figures=CHILD))
    parent = build_figures(store, Machine(), FiguresSpec(figures=PARENT))
    return build_gate(store, Machine(), GateSpec(**fields), evaluation=evaluation, parent=parent)


def test_a_model_within_its_bounds_passes_and_the_gate_tells_what_was_found(store: ArtifactStore) -> None:
    passed = judge(
        store,
        at_most={"validation_loss": 2.0},
        at_least={"held_out_accuracy": 0.8, "harness.ceval.acc": 0.25},
        worse_than_parent={"validation_loss": 0.5},
    )
    rows = orjson.loads(passed.file("gate.json").read_bytes())
    assert [(row["figure"], row["found"], row["bound"], row["parent"]) for row in rows] == [
        ("harness.ceval.acc", 0.3, 0.25, None),
        ("held_out_accuracy", 0.8, 0.8, None),
        ("validation_loss", 2.0, 2.0, None),
        ("validation_loss", 2.0, 2.0, 1.5),
    ]


def test_a_model_beyond_its_bounds_fails_with_every_figure_in_one_line_and_its_evaluation_is_kept(store: ArtifactStore) -> None:
    with pytest.raises(GateError) as raised:
        judge(
            store,
            at_most={"validation_loss": 1.9},
            at_least={"held_out_accuracy": 0.9},
            worse_than_parent={"validation_loss": 0.1},
        )
    line = str(raised.value)
    assert "held_out_accuracy is 0.8, at least 0.9 was asked; validation_loss is 2, at most 1.9 was asked; " in line
    assert "validation_loss is 2, at most 1.6 was asked (the parent has 1.5)" in line
    assert "\n" not in line
    assert raised.value.exit_code == 1
    assert [artifact.kind for artifact in store.artifacts()] == ["evaluation", "evaluation"]


def test_a_share_may_be_lower_than_the_parents_by_so_much(store: ArtifactStore) -> None:
    assert judge(store, worse_than_parent={"held_out_accuracy": 0.0}).kind == "gate"


def test_a_perplexity_of_the_harness_is_bounded_from_above(store: ArtifactStore) -> None:
    assert judge(store, at_most={"harness.wiki.word_perplexity": 9.0}).kind == "gate"
    with pytest.raises(GateError, match=r"harness\.wiki\.word_perplexity is 9, at most 8 was asked"):
        judge(store, at_most={"harness.wiki.word_perplexity": 8.0})


def test_a_bound_on_what_was_not_measured_is_said_to_be_one(store: ArtifactStore) -> None:
    with pytest.raises(RecipeError, match="label_accuracy was not measured; evaluate it, or leave it out of the gate"):
        judge(store, at_least={"label_accuracy": 0.5})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no bound given"),
        ({"at_most": {"held_out_accuracy": 0.5}}, "at_most.held_out_accuracy: higher is better of it; state at_least"),
        ({"at_least": {"validation_loss": 0.5}}, "at_least.validation_loss: lower is better of it; state at_most"),
        ({"at_least": {"harness.wiki.word_perplexity": 9.0}}, "at_least.harness.wiki.word_perplexity: lower is better of it"),
        ({"at_most": {"harness.ceval.acc": 0.5}}, "at_most.harness.ceval.acc: higher is better of it; state at_least"),
        ({"at_least": {"accuracy": 0.5}}, "accuracy: no such figure; there are validation_loss, "),
        ({"worse_than_parent": {"loss": 0.5}}, "loss: no such figure; there are validation_loss, "),
    ],
)
def test_a_bound_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GateSpec(**fields)


def test_every_field_changes_the_key() -> None:
    fields = {
        "at_most": {"validation_loss": 1.0},
        "at_least": {"held_out_accuracy": 0.5},
        "worse_than_parent": {"validation_loss": 1.0},
    }
    assert set(fields) == set(GateSpec.model_fields)
    identities = [GateSpec(**{name: value}).identity() for name, value in fields.items()]
    assert not any(one == other for one, other in itertools.combinations(identities, 2))
