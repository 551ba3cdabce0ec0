"""The DAG: which stages a recipe has, in data order, and what each takes from which. The table of contents."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flows.recipe import Recipe
from tasks.corpus.archive import build_archive
from tasks.corpus.blocks import build_blocks
from tasks.corpus.documents import build_documents
from tasks.corpus.examples import build_examples
from tasks.corpus.tokenizer import TokenizerSpec, build_tokenizer
from tasks.corpus.tokens import build_tokens
from tasks.errors import RecipeError
from tasks.report.report import build_report
from tasks.store import Spec, Stage
from tasks.training.adapter import build_adapter
from tasks.training.evaluation import EvaluationSpec, build_evaluation
from tasks.training.finetuned import build_finetuned
from tasks.training.gate import build_gate
from tasks.training.pretrained import build_pretrained
from tasks.training.published import build_published

# Name, stage, spec (None: the recipe has no such stage), inputs.
Row = tuple[str, Stage[Any], Spec | None, dict[str, str]]


@dataclass(frozen=True)
class Node:
    """One stage of one recipe: ``inputs`` maps the build's input names to other nodes' names.

    after: nodes that must have passed before, and give it nothing: the gates of what it stands on.
    """

    name: str
    stage: Stage[Any]
    spec: Spec
    inputs: Mapping[str, str]
    after: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.stage.kind


def nodes_of(recipe: Recipe) -> tuple[Node, ...]:
    """Every node of a recipe, each after what it takes."""
    base, has_corpus = recipe.base, recipe.archive is not None
    tokenizer = recipe.tokenizer or TokenizerSpec(of_published=True)
    origins = {"documents": tokenizer.train, "published": tokenizer.of_published}
    taken = {name: name for name, is_taken in origins.items() if is_taken}
    held_out = {"held_out": "held_out"} if recipe.held_out else {}
    table: list[Row] = [
        ("archive", build_archive, recipe.archive, {}),
        ("documents", build_documents, recipe.documents if has_corpus else None, {"archive": "archive"}),
        ("published", build_published, recipe.published, {}),
        ("tokenizer", build_tokenizer, tokenizer if has_corpus or recipe.examples else None, taken),
        ("tokens", build_tokens, recipe.tokens if has_corpus else None, {"documents": "documents", "tokenizer": "tokenizer"}),
        ("blocks", build_blocks, recipe.blocks if has_corpus else None, {"tokens": "tokens"}),
        ("pretrained", build_pretrained, recipe.pretrained, {"blocks": "blocks", "tokenizer": "tokenizer"}),
        ("conversations", build_archive, recipe.conversations, {}),
        ("held_out", build_archive, recipe.held_out, {}),
        ("examples", build_examples, recipe.examples, {"conversations": "conversations", "tokenizer": "tokenizer", **held_out}),
    ]
    nodes = [Node(name, stage, spec, inputs) for name, stage, spec, inputs in table if spec is not None]
    if any(node.name == base for node in nodes):
        nodes += _judged(recipe, base, {"model": base}, parent=None)
    if recipe.finetuned:
        nodes.append(_trained(recipe, "finetuned", build_finetuned, recipe.finetuned, base))
        nodes += _judged(recipe, "finetuned", {"model": "finetuned"}, parent=base)
    for name, spec in recipe.every_adapter.items():
        nodes.append(_trained(recipe, name, build_adapter, spec, spec.base))
        nodes += _judged(recipe, name, {"model": spec.base, "adapter": name}, parent=spec.base)
    told = {node.name: node.name for node in nodes if node.kind != "gate"}
    nodes.append(Node("report", build_report, recipe.report, told, after=tuple(f"gate_{name}" for name in recipe.gates)))
    return tuple(nodes)


def _trained(recipe: Recipe, name: str, stage: Stage[Any], spec: Spec, base: str) -> Node:
    """A model that is trained on examples, once its base has passed its gate."""
    after = (f"gate_{base}",) if base in recipe.gates else ()
    return Node(name, stage, spec, {"base": base, "examples": "examples"}, after)


def _judged(recipe: Recipe, name: str, model: dict[str, str], parent: str | None) -> Iterator[Node]:
    """The evaluation of a model, and its gate."""
    if recipe.evaluation is None:
        return
    measured = {section: section for section in ("blocks", "examples") if _has(recipe, section)}
    yield Node(f"evaluation_{name}", build_evaluation, _evaluation_spec(recipe), {**model, **measured})
    if gate := recipe.gates.get(name):
        compared = {"parent": f"evaluation_{parent}"} if gate.worse_than_parent else {}
        yield Node(f"gate_{name}", build_gate, gate, {"evaluation": f"evaluation_{name}", **compared})


def _has(recipe: Recipe, section: str) -> bool:
    return (recipe.archive if section == "blocks" else recipe.examples) is not None


def _evaluation_spec(recipe: Recipe) -> EvaluationSpec:
    """The recipe's, which reads blocks as the base was taught to, unless it says otherwise."""
    assert recipe.evaluation
    if recipe.evaluation.document_attention or not recipe.pretrained:
        return recipe.evaluation
    return recipe.evaluation.model_copy(update={"document_attention": recipe.pretrained.document_attention})


def ending_with(nodes: tuple[Node, ...], ends: Iterable[str]) -> tuple[Node, ...]:
    """The nodes of the given names and all that they stand on, in order. Raises RecipeError for a stranger.

    "adapter" and "evaluation" name every one of their kind; "archive" is the corpus alone, not the conversations' archive.
    """
    by_name = {node.name: node for node in nodes}
    wanted: set[str] = set()
    for end in ends:
        of_kind = [node.name for node in nodes if node.kind == end]
        named = [name for name in of_kind if name.startswith(f"{end}_")] + [end] * (end in by_name) or of_kind
        if not named:
            raise RecipeError(f"{end}: the recipe has no such stage; it has {', '.join(by_name)}")
        wanted.update(named)
    # A model that has a gate is not finished before it has passed.
    wanted |= {node.name for node in nodes if node.kind == "gate" and node.name.removeprefix("gate_") in wanted}
    for node in reversed(nodes):
        if node.name in wanted:
            wanted.update(node.inputs.values(), node.after)
    return tuple(node for node in nodes if node.name in wanted)
