"""Overrides as the UI's form and command lines give them."""

from typing import Any

import pytest

from flows.overrides import dotted, overrides_schema, replacing
from flows.recipe import load_recipe


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        (None, {}),
        ({"blocks": {"block_size": 64}}, {"blocks.block_size": 64}),
        ({"blocks.block_size": 64}, {"blocks.block_size": 64}),
        ({"pretrained": {"model": {"config": {"hidden_size": 8}}}}, {"pretrained.model.config.hidden_size": 8}),
        ({"documents.filter": None, "evaluation": {"prompts": ["a"]}}, {"documents.filter": None, "evaluation.prompts": ["a"]}),
    ],
)
def test_a_nested_override_names_the_same_field_as_a_dotted_one(given: Any, fields: dict[str, Any]) -> None:
    assert dotted(given) == fields


def test_fields_that_are_not_named_stay_as_the_recipe_has_them() -> None:
    recipe = load_recipe("demo", dotted({"documents": {"min_characters": 5}}))
    assert (recipe.documents.min_characters, recipe.documents.deduplicate) == (5, True)


def test_on_the_command_line_a_mapping_takes_the_place_of_what_is_there() -> None:
    changes = dotted(replacing({"documents": {"min_characters": 5}, "blocks.block_size": 64}))
    recipe = load_recipe("demo", changes)
    assert (recipe.documents.min_characters, recipe.documents.deduplicate) == (5, False)
    assert recipe.blocks.block_size == 64


def test_the_form_shows_every_field_with_its_type_and_description_and_asks_for_none() -> None:
    schema = overrides_schema()
    assert schema["properties"]["blocks"]["properties"]["block_size"]["type"] == "integer"
    assert schema["properties"]["pretrained"]["properties"]["precision"]["enum"] == ["bf16", "fp32"]
    bare = [where for where, field in fields_of(schema, "") if "description" not in field]
    assert bare == []
    text = str(schema)
    assert not any(word in text for word in ("$ref", "'required'", "'default'", "'null'"))


def fields_of(schema: dict[str, Any], where: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for name, field in schema.get("properties", {}).items():
        found += [(f"{where}{name}", field), *fields_of(field, f"{where}{name}.")]
    return found
