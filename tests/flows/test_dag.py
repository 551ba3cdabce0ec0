from pathlib import Path

import pytest

from flows.dag import ending_with, nodes_of
from flows.recipe import load_recipe
from tasks.errors import RecipeError


def test_the_demo_goes_from_archive_to_report_in_data_order() -> None:
    assert [node.name for node in nodes_of(load_recipe("demo"))] == [
        "archive", "documents", "tokenizer", "tokens", "blocks", "pretrained", "conversations", "held_out", "examples",
        "finetuned", "adapter", "evaluation_pretrained", "evaluation_finetuned", "evaluation_adapter", "report",
    ]  # fmt: skip


def test_every_input_is_an_input_of_the_build_and_comes_before_it() -> None:
    seen: set[str] = set()
    for node in nodes_of(load_recipe("demo")):
        assert set(node.inputs) <= set(node.stage.input_names), node.name
        assert set(node.inputs.values()) <= seen, node.name
        seen.add(node.name)


def test_a_published_tokenizer_does_not_wait_for_the_documents(minimal: Path) -> None:
    published = load_recipe(str(minimal), {"tokenizer": {"source": "somewhere"}})
    assert [dict(node.inputs) for node in nodes_of(published) if node.name == "tokenizer"] == [{}]


def test_an_adapter_takes_the_base_that_the_recipe_names() -> None:
    for base in ("pretrained", "finetuned"):
        nodes = {node.name: node for node in nodes_of(load_recipe("demo", {"adapter.base": base}))}
        assert nodes["adapter"].inputs["base"] == base
        assert nodes["evaluation_adapter"].inputs["model"] == base


def test_a_run_that_ends_early_takes_only_what_its_end_stands_on() -> None:
    nodes = nodes_of(load_recipe("demo"))
    assert [node.name for node in ending_with(nodes, ["blocks"])] == ["archive", "documents", "tokenizer", "tokens", "blocks"]
    assert [node.name for node in ending_with(nodes, ["examples"])] == [
        "archive", "documents", "tokenizer", "conversations", "held_out", "examples",
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="dumps: the recipe has no such stage; it has archive, documents"):
        ending_with(nodes, ["dumps"])
