import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from flows.dag import nodes_of
from flows.recipe import Recipe, load_recipe, parse_overrides, recipe_names
from tasks.errors import RecipeError
from tasks.store import Spec


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_comes_along_is_valid_and_named_as_its_file(name: str) -> None:
    assert load_recipe(name).name == name


def test_the_full_recipe_has_the_fields_numbers_with_their_defects_mended() -> None:
    recipe = load_recipe("seq-monkey-qwen2.5-1.5b")
    pretrained, adapter = recipe.pretrained, recipe.adapter
    assert pretrained
    assert adapter
    assert pretrained.model.config
    assert recipe.archive
    assert recipe.archive.md5 == "ffacae345d22ab4f1464221d8ecf92c6"
    assert pretrained.global_batch_size * recipe.blocks.block_size == 262_144
    assert (pretrained.learning_rate, pretrained.warmup_steps, pretrained.seed, pretrained.precision) == (1e-4, 200, 12, "bf16")
    assert (pretrained.checkpoint_steps, pretrained.logging_steps, pretrained.gradient_checkpointing) == (100, 5, True)
    assert (adapter.lora.rank, adapter.lora.alpha, adapter.lora.dropout) == (8, 32, 0.1)
    assert adapter.lora.target_modules == ("q_proj", "v_proj")
    assert recipe.tokens.end_of_document == "<|endoftext|>"
    assert recipe.examples
    assert recipe.examples.max_conversations is None


def test_numbers_are_read_as_people_write_them(minimal: Path) -> None:
    recipe = load_recipe(str(minimal))
    assert recipe.pretrained
    assert recipe.pretrained.learning_rate == 0.001


TRAINED = {"global_batch_size": 2, "num_steps": 2, "learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"blocks.block_sise": 8}, r"blocks.block_sise: unknown field; did you mean block_size\?"),
        ({"block": {}}, r"block: unknown field; did you mean blocks\?"),
        ({"pretrained.zzz": 8}, r"pretrained.zzz: unknown field; fields are global_batch_size, .*"),
        ({"blocks.block_size": "many"}, r"blocks.block_size: found 'many'; input should be a valid integer"),
        ({"blocks.block_size": "8"}, r"blocks.block_size: found '8'; input should be a valid integer"),
        ({"blocks.block_size": True}, r"blocks.block_size: found True; input should be a valid integer"),
        ({"blocks.block_size": 128}, r"blocks.block_size: 128 is over the model's 64 positions .*; lower the one or raise"),
        ({"tokenizer.train.vocab_size": 400}, r"tokenizer.train.vocab_size: 400 ids do not fit the model's 300 .*; lower"),
        ({"archive": None}, r"archive: absent, and so is published; a recipe begins with a corpus, or with a published model"),
        ({"published": {"weights": "x/y"}}, r"published: the recipe has pretrained too; .*, leave one out"),
        (
            {"pretrained": None, "published": {"weights": "x/y"}, "finetuned": None},
            r"tokenizer.train: a published model has ids of its own tokenizer; leave the section tokenizer out",
        ),
        ({"tokenizer": None}, r"tokenizer: absent; it must be given where no published model brings one"),
        ({"gates.adapter.at_most.validation_loss": 1}, r"gates.adapter: the recipe has no such model; it has pretrained"),
        ({"gates.pretrained.at_most.validation_loss": 1}, r"gates.pretrained: needs the section evaluation, .*"),
        (
            {"evaluation": {}, "gates.pretrained.at_most.los": 1},
            r"gates.pretrained: los: no such figure; there are validation_.*",
        ),
        (
            {"evaluation": {}, "gates.pretrained.at_least.held_out_accuracy": 1},
            r".*held_out_accuracy is measured with held_out, .*",
        ),
        (
            {"evaluation": {}, "gates.pretrained.worse_than_parent.validation_loss": 1},
            r".*pretrained is made from no other model.*",
        ),
        ({"pretrained.num_epochs": 1}, r"pretrained: num_steps is 2, num_epochs is 1.0; give exactly one of them"),
        ({"name": "a b"}, r"name: found 'a b'; string should match pattern"),
        ({"held_out": {"url": "x"}}, r"held_out: needs the section examples, which is absent; add it or leave held_out out"),
        ({"archive.url": "ftp://x/y"}, r"archive.url: .*ftp"),
        ({"adapters.Lora": {}}, r"adapters.Lora.\[key\]: found 'Lora'.*string should match pattern"),
        ({"adapters.lora": {**TRAINED, "lora": {"rnk": 2}}}, r"adapters.lora.lora.rnk: unknown field.*; did you mean rank\?"),
        ({"adapters.lora": {**TRAINED, "base": "pretrained"}}, r"adapters.lora: needs the section examples, which is absent"),
    ],
)
def test_a_mistake_is_one_line_that_says_where_what_and_what_to_do(
    minimal: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        load_recipe(str(minimal), overrides)
    assert str(raised.value).startswith(str(minimal))
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 2


def test_a_recipe_that_is_not_there_or_not_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such recipe or .yaml file; recipes are .*demo, "):
        load_recipe("nothing")
    (tmp_path / "bad.yaml").write_text("name: [")
    with pytest.raises(RecipeError, match=r"bad.yaml: not valid YAML: .* in line 1, column 8; mend the line"):
        load_recipe(str(tmp_path / "bad.yaml"))
    (tmp_path / "twice.yaml").write_text("blocks:\n  block_size: 1\n  block_size: 2\n")
    with pytest.raises(RecipeError, match=r"not valid YAML: block_size is given twice in .*line 3"):
        load_recipe(str(tmp_path / "twice.yaml"))
    (tmp_path / "list.yaml").write_text("- name")
    with pytest.raises(RecipeError, match="a recipe is a mapping of sections"):
        load_recipe(str(tmp_path / "list.yaml"))


def test_overrides_are_fields_and_yaml_values() -> None:
    assert parse_overrides(["a.b=1e-4", "c=[x, y]", "d=null", "e=x=y"]) == {
        "a.b": 0.0001,
        "c": ["x", "y"],
        "d": None,
        "e": "x=y",
    }
    with pytest.raises(RecipeError, match=r"no field=value found"):
        parse_overrides(["a.b"])


SHARED = """
x-training: &training {global_batch_size: 2, num_steps: 2, learning_rate: 1e-3, base: pretrained}
conversations: {url: conversations.jsonl}
examples: {block_size: 16}
adapters:
  lora: *training
  ia3: {<<: *training, method: ia3, learning_rate: 1e-2}
"""


def test_what_sections_share_is_written_once_and_overridden_at_once(minimal: Path) -> None:
    minimal.write_text(minimal.read_text() + SHARED)
    adapters = load_recipe(str(minimal), {"adapters.*.num_steps": 7, "adapters.ia3.seed": 3}).adapters
    assert {name: (spec.method, spec.num_steps, spec.learning_rate, spec.seed) for name, spec in adapters.items()} == {
        "lora": ("lora", 7, 1e-3, 0),
        "ia3": ("ia3", 7, 1e-2, 3),
    }


def test_an_override_of_all_that_a_section_has_wants_the_section(minimal: Path) -> None:
    with pytest.raises(RecipeError, match="the recipe has no adapters"):
        load_recipe(str(minimal), {"adapters.*.num_steps": 7})


def test_an_override_makes_the_section_that_it_names(minimal: Path) -> None:
    assert load_recipe(str(minimal), {"documents.max_documents": 5}).documents.max_documents == 5
    with pytest.raises(RecipeError, match="name is 'minimal', which has no fields"):
        load_recipe(str(minimal), {"name.x": 5})


def _specs(model: type[BaseModel]) -> set[type[BaseModel]]:
    found = {model}
    for info in model.model_fields.values():
        for option in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(option, type) and issubclass(option, BaseModel):
                found |= _specs(option)
    return found


@pytest.mark.parametrize("model", sorted(_specs(Recipe), key=lambda model: model.__name__))
def test_every_field_of_every_spec_has_a_description(model: type[BaseModel]) -> None:
    assert [name for name, info in model.model_fields.items() if not info.description] == []


def test_nothing_but_unkeyed_fields_is_missing_from_an_identity() -> None:
    for node in nodes_of(load_recipe("demo")):
        given = {name for name, value in node.spec.model_dump(mode="json").items() if value is not None}
        missing = given - set(node.spec.identity())
        unkeyed = {
            name
            for name, info in type(node.spec).model_fields.items()
            if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("unkeyed")
        }
        assert missing <= unkeyed, node.name
        assert not {"store", "num_workers", "num_ranks", "deepspeed"} & set(json.loads(node.spec.model_dump_json()))


def test_every_spec_of_the_recipe_is_a_spec() -> None:
    assert all(isinstance(node.spec, Spec) for node in nodes_of(load_recipe("demo")))
