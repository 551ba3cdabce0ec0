"""Rows of another tokenizer than the model's: refused wherever both are given, before anything is loaded."""

from pathlib import Path

import pytest

from tasks.errors import RecipeError
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Built, Work, stage
from tasks.training.adapter import AdapterSpec, build_adapter
from tasks.training.evaluation import EvaluationSpec, build_evaluation
from tasks.training.finetuned import FinetunedSpec, build_finetuned, check_tokenizer
from tests.training.small_inputs import InputSpec

TRAINED = {"global_batch_size": 4, "num_steps": 10, "learning_rate": 1e-3}


class TextSpec(InputSpec):
    text: str


@stage("tokenizer", revision=1)
def build_named_tokenizer(work: Work, spec: TextSpec) -> Built:
    (work.folder / "tokenizer.json").write_text(spec.text)
    return Built()


@stage("published", revision=1)
def build_tokenized_base(work: Work, spec: TextSpec) -> Built:
    (work.folder / "tokenizer.json").write_text(spec.text)
    return Built()


@stage("tokens", revision=1)
def build_tokens(work: Work, spec: InputSpec, tokenizer: Artifact) -> Built:
    return Built()


@stage("blocks", revision=1)
def build_tokenized_blocks(work: Work, spec: InputSpec, tokens: Artifact) -> Built:
    return Built()


@stage("examples", revision=1)
def build_tokenized_examples(work: Work, spec: InputSpec, tokenizer: Artifact) -> Built:
    return Built()


def rows_of(store: ArtifactStore, text: str) -> tuple[Artifact, Artifact]:
    """Examples and blocks made with a tokenizer."""
    tokenizer = build_named_tokenizer(store, Machine(), TextSpec(text=text))
    tokens = build_tokens(store, Machine(), InputSpec(), tokenizer=tokenizer)
    examples = build_tokenized_examples(store, Machine(), InputSpec(), tokenizer=tokenizer)
    return examples, build_tokenized_blocks(store, Machine(), InputSpec(), tokens=tokens)


def test_a_model_refuses_rows_of_another_tokenizer_though_it_has_as_many_ids(tmp_path: Path) -> None:
    store, machine = ArtifactStore(tmp_path), Machine()
    base = build_tokenized_base(store, machine, TextSpec(text="its own"))
    examples, blocks = rows_of(store, "another")
    refused = (
        r": .* was made with tokenizer/.*, which is not the tokenizer of published/.*; leave the recipe's section tokenizer out"
    )
    with pytest.raises(RecipeError, match=f"finetuned{refused}"):
        build_finetuned(store, machine, FinetunedSpec(**TRAINED), base=base, examples=examples)
    with pytest.raises(RecipeError, match=f"adapter{refused}"):
        build_adapter(store, machine, AdapterSpec(**TRAINED), base=base, examples=examples)
    with pytest.raises(RecipeError, match=f"evaluation{refused}"):
        build_evaluation(store, machine, EvaluationSpec(), model=base, blocks=blocks)
    with pytest.raises(RecipeError, match=f"evaluation{refused}"):
        build_evaluation(store, machine, EvaluationSpec(), model=base, examples=examples)


def test_rows_of_the_models_own_tokenizer_pass(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    base = build_tokenized_base(store, Machine(), TextSpec(text="its own"))
    for rows in rows_of(store, "its own"):
        check_tokenizer(store, base, rows, "adapter")
