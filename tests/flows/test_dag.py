from pathlib import Path

import pytest

from flows.dag import ending_with, nodes_of
from flows.recipe import load_recipe
from tasks.errors import RecipeError


def test_the_demo_goes_from_archive_to_report_in_data_order() -> None:
    assert [node.name for node in nodes_of(load_recipe("demo"))] == [
        "archive", "documents", "tokenizer", "tokens", "blocks", "pretrained", "conversations", "held_out", "examples",
        "evaluation_pretrained", "finetuned", "evaluation_finetuned", "adapter", "evaluation_adapter", "report",
    ]  # fmt: skip


def test_every_input_is_an_input_of_the_build_and_comes_before_it() -> None:
    seen: set[str] = set()
    for node in nodes_of(load_recipe("demo")):
        assert node.stage.takes_any or set(node.inputs) <= set(node.stage.input_names), node.name
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


GATES = {"gates.pretrained.at_most.validation_loss": 5.0, "gates.adapter.worse_than_parent.held_out_accuracy": 0.1}


def test_what_stands_on_a_model_waits_for_its_gate_and_takes_nothing_from_it() -> None:
    nodes = {node.name: node for node in nodes_of(load_recipe("demo", GATES))}
    assert nodes["finetuned"].after == ("gate_pretrained",)
    assert dict(nodes["finetuned"].inputs) == {"base": "pretrained", "examples": "examples"}
    assert nodes["adapter"].after == ()  # finetuned, its base, has no gate; and stands behind that of pretrained
    assert dict(nodes["gate_pretrained"].inputs) == {"evaluation": "evaluation_pretrained"}
    assert dict(nodes["gate_adapter"].inputs) == {"evaluation": "evaluation_adapter", "parent": "evaluation_finetuned"}
    assert nodes["report"].after == ("gate_pretrained", "gate_adapter")
    assert "gate_adapter" not in nodes["report"].inputs


def test_a_run_that_ends_at_a_model_ends_with_its_gate() -> None:
    nodes = nodes_of(load_recipe("demo", GATES))
    assert [node.name for node in ending_with(nodes, ["adapter"])] == [
        "archive", "documents", "tokenizer", "tokens", "blocks", "pretrained", "conversations", "held_out", "examples",
        "evaluation_pretrained", "gate_pretrained", "finetuned", "evaluation_finetuned", "adapter", "evaluation_adapter",
        "gate_adapter",
    ]  # fmt: skip


PUBLISHED = """
name: published
published: {weights: somewhere}
conversations: {url: conversations.jsonl}
examples: {block_size: 64}
adapter: {base: published, global_batch_size: 2, num_steps: 2, learning_rate: 1e-3}
evaluation: {}
"""


def test_a_recipe_may_begin_with_a_published_model_and_have_no_corpus(tmp_path: Path) -> None:
    path = tmp_path / "published.yaml"
    path.write_text(PUBLISHED)
    nodes = {node.name: node for node in nodes_of(load_recipe(str(path)))}
    assert list(nodes) == [
        "published", "tokenizer", "conversations", "examples", "evaluation_published", "adapter", "evaluation_adapter", "report",
    ]  # fmt: skip
    assert dict(nodes["tokenizer"].inputs) == {"published": "published"}
    assert dict(nodes["adapter"].inputs) == {"base": "published", "examples": "examples"}
    assert dict(nodes["evaluation_adapter"].inputs) == {"model": "published", "adapter": "adapter", "examples": "examples"}


def test_blocks_are_measured_as_the_base_was_taught_to_read_them() -> None:
    within = nodes_of(load_recipe("demo", {"pretrained.document_attention": "within"}))
    assert [node.spec.document_attention for node in within if node.kind == "evaluation"] == ["within"] * 3  # type: ignore[attr-defined]
    said = nodes_of(load_recipe("demo", {"pretrained.document_attention": "within", "evaluation.document_attention": "across"}))
    assert [node.spec.document_attention for node in said if node.kind == "evaluation"] == ["across"] * 3  # type: ignore[attr-defined]


def test_a_run_that_ends_early_takes_only_what_its_end_stands_on() -> None:
    nodes = nodes_of(load_recipe("demo"))
    assert [node.name for node in ending_with(nodes, ["blocks"])] == ["archive", "documents", "tokenizer", "tokens", "blocks"]
    assert [node.name for node in ending_with(nodes, ["examples"])] == [
        "archive", "documents", "tokenizer", "conversations", "held_out", "examples",
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="dumps: the recipe has no such stage; it has archive, documents"):
        ending_with(nodes, ["dumps"])


def test_an_end_is_a_stage_or_the_branches_of_one_kind() -> None:
    nodes = nodes_of(load_recipe("demo", compared()))
    assert [node.name for node in ending_with(nodes, ["archive"])] == ["archive"]
    of_adapters = {node.name for node in ending_with(nodes, ["adapter"]) if node.kind == "adapter"}
    assert of_adapters == {"adapter", "adapter_lora", "adapter_tokens"}
    assert [node.name for node in ending_with(nodes, ["evaluation_adapter"])][-2:] == ["adapter", "evaluation_adapter"]
    assert {"evaluation_pretrained", "evaluation_adapter_lora"} < {node.name for node in ending_with(nodes, ["evaluation"])}


ADAPTERS = {"adapters": {"lora": {"lora": {"rank": 2}}, "tokens": {"method": "prompt", "base": "pretrained"}}}


def compared(**fields: object) -> dict[str, object]:
    common = {"global_batch_size": 8, "num_steps": 2, "learning_rate": 1e-3}
    return {f"adapters.{name}": {**common, **given, **fields} for name, given in ADAPTERS["adapters"].items()}


def test_adapters_to_be_compared_are_branches_on_the_same_base() -> None:
    nodes = {node.name: node for node in nodes_of(load_recipe("demo", compared()))}
    assert list(nodes)[-7:] == [
        "adapter", "evaluation_adapter", "adapter_lora", "evaluation_adapter_lora", "adapter_tokens", "evaluation_adapter_tokens",
        "report",
    ]  # fmt: skip
    assert dict(nodes["adapter_lora"].inputs) == {"base": "finetuned", "examples": "examples"}
    assert nodes["adapter_tokens"].inputs["base"] == "pretrained"
    assert nodes["evaluation_adapter_lora"].inputs["adapter"] == "adapter_lora"
    assert nodes["report"].inputs["evaluation_adapter_tokens"] == "evaluation_adapter_tokens"
    assert nodes["adapter"].kind == nodes["adapter_lora"].kind == "adapter"
    only = ending_with(tuple(nodes.values()), ["adapter_tokens"])
    assert "finetuned" not in {node.name for node in only}
    assert only[-1].name == "adapter_tokens"
