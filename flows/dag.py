"""The DAG: which stages a recipe has, in data order, and what each takes from which. The table of contents."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flows.recipe import Recipe
from tasks.corpus.archive import build_archive
from tasks.corpus.blocks import build_blocks
from tasks.corpus.documents import build_documents
from tasks.corpus.examples import build_examples
from tasks.corpus.tokenizer import build_tokenizer
from tasks.corpus.tokens import build_tokens
from tasks.errors import RecipeError
from tasks.report.report import build_report
from tasks.store import Spec, Stage
from tasks.training.adapter import build_adapter
from tasks.training.evaluation import build_evaluation
from tasks.training.finetuned import build_finetuned
from tasks.training.pretrained import build_pretrained


@dataclass(frozen=True)
class Node:
    """One stage of one recipe: ``inputs`` maps the build's input names to other nodes' names."""

    name: str
    stage: Stage[Any]
    spec: Spec
    inputs: Mapping[str, str]

    @property
    def kind(self) -> str:
        return self.stage.kind


def nodes_of(recipe: Recipe) -> tuple[Node, ...]:
    """Every node of a recipe, each after what it takes."""
    trained_tokenizer = {"documents": "documents"} if recipe.tokenizer.train else {}
    held_out = {"held_out": "held_out"} if recipe.held_out else {}
    base = recipe.adapter.base if recipe.adapter else "pretrained"
    table: list[tuple[str, Stage[Any], Spec | None, dict[str, str]]] = [
        ("archive", build_archive, recipe.archive, {}),
        ("documents", build_documents, recipe.documents, {"archive": "archive"}),
        ("tokenizer", build_tokenizer, recipe.tokenizer, trained_tokenizer),
        ("tokens", build_tokens, recipe.tokens, {"documents": "documents", "tokenizer": "tokenizer"}),
        ("blocks", build_blocks, recipe.blocks, {"tokens": "tokens"}),
        ("pretrained", build_pretrained, recipe.pretrained, {"blocks": "blocks", "tokenizer": "tokenizer"}),
        ("conversations", build_archive, recipe.conversations, {}),
        ("held_out", build_archive, recipe.held_out, {}),
        ("examples", build_examples, recipe.examples, {"conversations": "conversations", "tokenizer": "tokenizer", **held_out}),
        ("finetuned", build_finetuned, recipe.finetuned, {"base": "pretrained", "examples": "examples"}),
        ("adapter", build_adapter, recipe.adapter, {"base": base, "examples": "examples"}),
    ]
    nodes = [Node(name, stage, spec, inputs) for name, stage, spec, inputs in table if spec is not None]
    nodes += _evaluations(recipe, {node.name for node in nodes})
    nodes.append(Node("report", build_report, recipe.report, {node.name: node.name for node in nodes}))
    return tuple(nodes)


def _evaluations(recipe: Recipe, present: set[str]) -> list[Node]:
    if recipe.evaluation is None:
        return []
    measured = {"blocks": "blocks", **({"examples": "examples"} if "examples" in present else {})}
    models = {
        "pretrained": {"model": "pretrained"},
        "finetuned": {"model": "finetuned"},
        "adapter": {"model": recipe.adapter.base if recipe.adapter else "", "adapter": "adapter"},
    }
    return [
        Node(f"evaluation_{name}", build_evaluation, recipe.evaluation, {**models[name], **measured})
        for name in models
        if name in present
    ]


def ending_with(nodes: tuple[Node, ...], ends: Iterable[str]) -> tuple[Node, ...]:
    """The nodes of the named kinds (or names) and all that they stand on, in order. Raises RecipeError for a stranger."""
    by_name = {node.name: node for node in nodes}
    wanted: set[str] = set()
    for end in ends:
        named = [node.name for node in nodes if end in (node.name, node.kind)]
        if not named:
            raise RecipeError(f"{end}: the recipe has no such stage; it has {', '.join(by_name)}")
        wanted.update(named)
    for node in reversed(nodes):
        if node.name in wanted:
            wanted.update(node.inputs.values())
    return tuple(node for node in nodes if node.name in wanted)
