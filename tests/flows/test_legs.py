"""Legs: which stages run on which pool, in which order, and what each is handed."""

from pathlib import Path
from typing import Any

import pytest

from flows.dag import Node, ending_with, nodes_of
from flows.legs import check_pools, chosen, legs_of, pool_of, recipe_of, spelled, taken
from flows.recipe import load_recipe, recipe_names
from tasks.errors import RecipeError, RefError, SettingsError, StoreError
from tasks.store import ArtifactStore

POOLS = {"corpus": "cpu", "training": "gpu", "report": "cpu"}


def nodes_until(recipe: str, until: str) -> tuple[Node, ...]:
    return ending_with(nodes_of(load_recipe(recipe)), [until])


def shape(recipe: str, until: str, pools: dict[str, str]) -> list[list[tuple[str, list[str], list[str]]]]:
    found = legs_of(nodes_until(recipe, until), pools)
    return [[(leg.pool, leg.names, leg.takes) for leg in legs] for legs in found]


def test_the_corpus_is_one_leg_and_what_is_trained_from_it_the_next(minimal: Path) -> None:
    assert shape(str(minimal), "report", POOLS) == [
        [("cpu", ["archive", "documents", "tokenizer", "tokens", "blocks"], [])],
        [("gpu", ["pretrained"], ["blocks", "tokenizer"])],
        [("cpu", ["report"], ["archive", "documents", "tokenizer", "tokens", "blocks", "pretrained"])],
    ]


def test_one_pool_for_all_is_one_leg(minimal: Path) -> None:
    everywhere = dict.fromkeys(POOLS, "here")
    assert [len(legs) for legs in legs_of(nodes_until(str(minimal), "report"), everywhere)] == [1]


def test_a_kind_or_a_name_may_have_a_pool_of_its_own(minimal: Path) -> None:
    legs = shape(str(minimal), "pretrained", {**POOLS, "archive": "downloads", "blocks": "large"})
    assert [(pool, names) for ((pool, names, _),) in legs] == [
        ("downloads", ["archive"]), ("cpu", ["documents", "tokenizer", "tokens"]), ("large", ["blocks"]), ("gpu", ["pretrained"]),
    ]  # fmt: skip


def test_what_waits_for_nothing_of_another_pool_runs_beside_it() -> None:
    first, *_ = shape("adapt-smollm2", "examples", POOLS)
    assert [(pool, takes) for pool, _, takes in first] == [("gpu", []), ("cpu", [])]
    assert [names for _, names, _ in first] == [["published"], ["conversations", "held_out"]]


@pytest.mark.parametrize("name", recipe_names())
def test_every_leg_is_handed_all_that_it_does_not_build(name: str) -> None:
    built: set[str] = set()
    for legs in legs_of(nodes_of(load_recipe(name)), POOLS):
        for leg in legs:
            assert set(leg.takes) <= built
            assert chosen(nodes_of(load_recipe(name)), leg.names, leg.takes) == leg.nodes
        built.update(name for leg in legs for name in leg.names)
    assert built == {node.name for node in nodes_of(load_recipe(name))}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_the_same_on_the_other_machine(name: str) -> None:
    recipe = load_recipe(name)
    there = recipe_of(spelled(recipe))
    assert there == recipe
    assert [node.spec.identity() for node in nodes_of(there)] == [node.spec.identity() for node in nodes_of(recipe)]


@pytest.mark.parametrize(
    ("value", "told"), [({"name": "a"}, "recipe: .*same release"), ({"name": "a", "novel": 1}, "novel"), ({}, "name")]
)
def test_a_recipe_of_another_release_is_refused_in_one_line(value: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told) as raised:
        recipe_of(value)
    assert "\n" not in str(raised.value)


def test_a_stage_without_a_pool_is_the_users_mistake(minimal: Path) -> None:
    (pretrained,) = [node for node in nodes_until(str(minimal), "pretrained") if node.name == "pretrained"]
    with pytest.raises(SettingsError, match="pools: no pool for the stage pretrained; name one for pretrained, pretrained or tr"):
        pool_of(pretrained, {"corpus": "cpu"})


def test_a_name_that_nothing_answers_to_is_refused_and_a_kind_that_the_recipe_has_not_is_none(minimal: Path) -> None:
    nodes = nodes_until(str(minimal), "pretrained")
    check_pools(nodes, ["evaluation"], {**POOLS, "evaluation": "cpu", "blocks": "large"})
    with pytest.raises(SettingsError, match="pools: 'trainig' is no stage; stages are archive, blocks, corpus"):
        check_pools(nodes, ["evaluation"], {"trainig": "gpu"})


def test_what_is_neither_built_nor_given_is_told(minimal: Path) -> None:
    nodes = nodes_until(str(minimal), "pretrained")
    assert [node.name for node in chosen(nodes, ["pretrained"], ["blocks", "tokenizer"])] == ["pretrained"]
    with pytest.raises(RecipeError, match="given: pretrained takes tokenizer, which is absent"):
        chosen(nodes, ["pretrained"], ["blocks"])
    with pytest.raises(RecipeError, match="stages: novel: the recipe has no such stage"):
        chosen(nodes, ["novel"], [])


@pytest.mark.parametrize("ref", ["blocks", "blocks/../../etc", f"Blocks/{'0' * 64}", f"blocks/{'0' * 63}", f"/blocks/{'0' * 64}"])
def test_what_is_no_reference_is_refused(ref: str, tmp_path: Path) -> None:
    with pytest.raises(RefError, match="is no reference"):
        taken(ArtifactStore(tmp_path), ref)


def test_an_artifact_that_this_machines_store_has_not_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"blocks/{'0' * 64} is not there whole; .* same SEQMILL_STORE"):
        taken(ArtifactStore(tmp_path), f"blocks/{'0' * 64}")
