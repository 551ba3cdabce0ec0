"""Overrides of a recipe as a flow takes them: what the UI's form shows, and what the form or a command line gives.

``{"blocks": {"block_size": 1024}}`` and ``{"blocks.block_size": 1024}`` are the same; fields that are not named stay as the
recipe has them.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import WithJsonSchema

from flows.recipe import Recipe


def dotted(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Every field that is named, as ``load_recipe`` takes them: dotted name to value."""
    return dict(_leaves(overrides or {}, ""))


def _leaves(overrides: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for name, value in overrides.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value


def replacing(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides under which a mapping takes the place of what the recipe has there, where ``dotted`` would add to it."""
    changes: dict[str, Any] = {}
    for name, value in overrides.items():
        if isinstance(value, Mapping) and value:
            changes[name] = None
        changes.update(_leaves({name: value}, ""))
    return changes


def overrides_schema() -> dict[str, Any]:
    """The JSON schema of overrides: a recipe of which every field may be left out."""
    schema = Recipe.model_json_schema()
    whole = _optional(schema, schema.get("$defs", {}))
    for name in ("name", "description"):  # they say what the recipe is, and change nothing
        del whole["properties"][name]
    del whole["description"]
    # A dotted name is a property that no schema lists; the recipe itself refuses what it does not know.
    return {**whole, "title": "Overrides", "additionalProperties": True}


_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "pattern")
_SHOWN = {"type", "description", "title", "enum", "const", *_BOUNDS}


def _optional(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """``schema`` without references, defaults, null and required fields: a form asks for nothing and fills in nothing."""
    if "$ref" in schema:
        definition = definitions[schema["$ref"].rpartition("/")[2]]
        return _optional({**definition, **{name: value for name, value in schema.items() if name != "$ref"}}, definitions)
    options = [option for option in schema.get("anyOf", []) if option.get("type") != "null"]
    if len(options) == 1:
        return _optional({**options[0], **{name: value for name, value in schema.items() if name != "anyOf"}}, definitions)
    kept = {name: value for name, value in schema.items() if name in _SHOWN}
    if options:
        kept["anyOf"] = [_optional(option, definitions) for option in options]
    if "properties" in schema:
        fields = {name: _optional(field, definitions) for name, field in schema["properties"].items()}
        kept["properties"] = {name: {**field, "title": name} for name, field in fields.items()}  # as the recipe spells it
        kept["additionalProperties"] = False
    if "items" in schema:
        kept["items"] = _optional(schema["items"], definitions)
    return kept


# What Prefect shows of a parameter is its type and, from the flow's docstring, its description.
Overrides = Annotated[dict[str, Any] | None, WithJsonSchema(overrides_schema())]
