"""The three training stages without a launch: what enters their keys, and what they refuse before any rank starts."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.errors import RecipeError, SettingsError, SourceError
from tasks.machine import Machine, TrainingSettings
from tasks.store import Artifact, ArtifactStore, Built, Digest, Spec, Stage, Work, stage
from tasks.training.adapter import AdapterSpec, adapted_folders, build_adapter, number_format
from tasks.training.deepspeed import preset
from tasks.training.finetuned import FinetunedSpec, build_finetuned, copy_tokenizer, generation_fields
from tasks.training.metrics import bits_per_byte
from tasks.training.model import ModelSpec
from tasks.training.pretrained import PretrainedSpec, build_pretrained, identify_source, validation_bits_per_byte
from tasks.training.run import count_rows
from tests.training.small_inputs import QWEN, InputSpec, blocks_and_tokenizer, build_examples, random_blocks, write_rows

CONTENT = Digest("c" * 64)
COMMON: dict[str, Any] = {"global_batch_size": 4, "num_steps": 10, "learning_rate": 1e-3}
# Another value for every field that decides bytes.
OTHER: dict[str, Any] = {
    "global_batch_size": 8,
    "num_steps": 11,
    "learning_rate": 2e-3,
    "schedule": "linear",
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5,
    "precision": "fp32",
    "gradient_checkpointing": True,
    "loss": "plain",
    "adamw": "looped",
    "compiled": "layers",
    "seed": 1,
}
# Another value for every field of every method.
OTHER_FIELDS: dict[str, dict[str, Any]] = {
    "lora": {
        "rank": 4, "alpha": 16.0, "dropout": 0.1, "target_modules": "all-linear", "use_rslora": True, "use_dora": True,
        "init": "olora",
    },
    "qlora": {"rank": 4, "init": "gaussian", "use_dora": True, "quantization": "fp4", "double_quantization": False},
    "bottleneck": {
        "placement": "houlsby", "size": 8, "activation": "gelu", "dropout": 0.1, "attention_modules": ("out_proj",),
        "feedforward_modules": ("fc2",),
    },
    "prefix": {"num_virtual_tokens": 8, "projection_size": 64},
    "p_tuning": {"num_virtual_tokens": 8, "encoder": "lstm", "encoder_size": 64},
    "prompt": {"num_virtual_tokens": 8, "init": "random"},
    "ia3": {"target_modules": ("q_proj", "down_proj"), "feedforward_modules": ()},
}  # fmt: skip


def pretrained_spec(**fields: Any) -> PretrainedSpec:
    return PretrainedSpec(**{**COMMON, "model": ModelSpec(config=QWEN), **fields})


def adapter_spec(**fields: Any) -> AdapterSpec:
    return AdapterSpec(**{**COMMON, **fields})


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize(
    ("build", "make"),
    [
        (build_pretrained, pretrained_spec),
        (build_finetuned, lambda **f: FinetunedSpec(**{**COMMON, **f})),
        (build_adapter, adapter_spec),
    ],
)
def test_every_field_that_decides_bytes_changes_the_key(build: Stage[Any], make: Callable[..., Spec], name: str) -> None:
    inputs = dict.fromkeys(build.input_names, CONTENT)
    assert build.identity(make(), inputs) != build.identity(make(**{name: OTHER[name]}), inputs)


@pytest.mark.parametrize(("method", "name"), [(method, name) for method in OTHER_FIELDS for name in OTHER_FIELDS[method]])
def test_every_field_of_a_method_changes_the_key(method: str, name: str) -> None:
    other = adapter_spec(method=method, **{method: {name: OTHER_FIELDS[method][name]}})
    assert other.identity() != adapter_spec(method=method).identity()


def test_the_key_of_a_lora_is_what_it_was_before_there_were_other_methods() -> None:
    lora = {"rank": 8, "alpha": 32.0, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "use_rslora": False}
    told = {name: value for name, value in adapter_spec().identity().items() if name not in OTHER}
    assert told == {"method": "lora", "lora": lora, "merge": False}
    assert adapter_spec(lora={"use_dora": False, "init": "kaiming"}).identity() == adapter_spec().identity()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "ia3", "lora": {"rank": 4}}, "lora is given, the method is ia3; leave lora out, or set method to lora"),
        ({"method": "full", "lora": {"rank": 4}}, "lora is given, the method is full"),
        ({"lora": None}, "lora is null, and is the method; leave it out for its defaults, or give its fields"),
        ({"method": "bottleneck", "merge": True}, "merge is true, the method is bottleneck; only lora and ia3 can be merged"),
        ({"method": "qlora", "merge": True}, "merge is true, the method is qlora"),
        ({"method": "prefix", "gradient_checkpointing": True}, "gradient_checkpointing is true, the method is prefix"),
        ({"lora": {"init": "pissa", "use_dora": True}}, "init is pissa with use_dora"),
        ({"lora": {"init": "orthogonal", "rank": 3}}, "init is orthogonal, whose halves take an even rank, rank is 3"),
        ({"method": "qlora", "qlora": {"init": "olora"}}, "init is olora, which needs the base's weights whole"),
        ({"method": "p_tuning", "p_tuning": {"encoder_dropout": 0.1}}, "encoder_dropout is 0.1, the encoder is an mlp"),
        ({"method": "prompt", "prompt": {"init": "text"}}, "text is absent, init is text"),
        ({"method": "prompt", "prompt": {"text": "a"}}, "text is given, init is vocabulary"),
        ({"method": "ia3", "ia3": {"target_modules": ("k_proj",)}}, "feedforward_modules has down_proj, target_modules has not"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        adapter_spec(**fields)


@pytest.mark.parametrize("method", ["prefix", "p_tuning", "prompt", "qlora"])
def test_what_zero_3_cannot_train_is_refused_before_a_launch(tmp_path: Path, method: str) -> None:
    store = ArtifactStore(tmp_path)
    base, examples = build_small_base(store, Machine(), InputSpec()), build_examples(store, Machine(), InputSpec())
    machine = Machine(training=TrainingSettings(deepspeed_config=preset("zero3")))
    with pytest.raises(SettingsError, match=f"adapter.method {method}: does not train under ZeRO-3.*give --deepspeed zero2"):
        build_adapter(store, machine, adapter_spec(method=method), base=base, examples=examples)


def test_virtual_tokens_that_leave_no_room_for_an_example_are_refused(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    base, examples = build_small_base(store, Machine(), InputSpec()), build_examples(store, Machine(), InputSpec())
    spec = adapter_spec(method="prefix", prefix={"num_virtual_tokens": 49})
    with pytest.raises(RecipeError, match="49 virtual tokens and examples of up to 16 are more than the model's 64 positions"):
        build_adapter(store, Machine(), spec, base=base, examples=examples)


@stage("adapter", revision=1)
def build_small_adapter(work: Work, spec: InputSpec, base: Artifact) -> Built:
    name = "adapter_config.json" if spec.seed == 0 else "model.safetensors"
    (work.folder / name).write_text("{}")
    return Built(stats={"base_content": base.content})


def test_an_adapter_refuses_a_base_that_it_was_not_trained_on(tmp_path: Path) -> None:
    store, blocks, tokenizer = blocks_and_tokenizer(tmp_path)
    adapter = build_small_adapter(store, Machine(), InputSpec(), base=tokenizer)
    assert adapted_folders(tokenizer, adapter) == (tokenizer.path, adapter.path)
    with pytest.raises(RecipeError, match=rf"adapter/.*: trained on a base of content {tokenizer.content[:12]}, blocks/.* has"):
        adapted_folders(blocks, adapter)


def test_where_every_weight_was_trained_the_model_is_in_the_adapters_folder(tmp_path: Path) -> None:
    store, _, tokenizer = blocks_and_tokenizer(tmp_path)
    full = build_small_adapter(store, Machine(), InputSpec(seed=1), base=tokenizer)
    assert adapted_folders(tokenizer, full) == (full.path, None)


def test_every_keyed_field_has_another_value_here() -> None:
    decided = {*OTHER} - {"adamw", "compiled"}  # which are absent in most recipes
    assert set(FinetunedSpec(**COMMON).identity()) == decided
    assert set(adapter_spec().identity()) == {*decided, "method", "lora", "merge"}
    assert set(pretrained_spec().identity()) == {*decided, "model"}


def test_where_the_base_comes_from_is_keyed_by_its_content_alone() -> None:
    assert adapter_spec(base="pretrained").identity() == adapter_spec(base="finetuned").identity()


def test_the_config_and_the_attention_enter_the_key() -> None:
    plain = pretrained_spec().identity()
    assert pretrained_spec(model=ModelSpec(config={**QWEN, "hidden_size": 64})).identity() != plain
    assert pretrained_spec(model=ModelSpec(config=QWEN, attention="eager")).identity() != plain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "neither config nor weights; give exactly one"),
        ({"config": QWEN, "weights": "x"}, "both config and weights; give exactly one"),
        ({"config": {"hidden_size": 8}}, "model_type None; name one"),
    ],
)
def test_a_model_starts_from_a_config_or_from_weights(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelSpec(**fields)


def weights_folder(folder: Path, weights: bytes = b"w") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 64, "max_position_embeddings": 64}))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_published_weights_are_keyed_by_their_bytes_and_not_by_their_place(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")

    def source(folder: Path) -> str | None:
        return identify_source(pretrained_spec(model=ModelSpec(weights=str(folder))), store, Machine())

    here, there = weights_folder(tmp_path / "here"), weights_folder(tmp_path / "there")
    (there / "README.md").write_text("not read")
    assert source(here) == source(there)
    assert source(here) != source(weights_folder(tmp_path / "other", b"v"))
    assert ModelSpec(weights=str(here)).identity() == ModelSpec(weights=str(there), weights_revision="v2").identity()
    assert identify_source(pretrained_spec(), store, Machine()) is None


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(SourceError, match=r"no \*\.safetensors or no config.json"):
        identify_source(pretrained_spec(model=ModelSpec(weights=str(tmp_path))), ArtifactStore(tmp_path / "s"), Machine())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_position_embeddings": 8}, "block_size 16 is more than the model's 8 positions; lower block_size or raise"),
        ({"vocab_size": 59}, "the tokenizer has 60 ids, the model's vocab_size is 59; raise vocab_size"),
    ],
)
def test_a_model_that_the_blocks_do_not_fit_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    store, blocks, tokenizer = blocks_and_tokenizer(tmp_path)
    spec = pretrained_spec(model=ModelSpec(config={**QWEN, **config}))
    with pytest.raises(RecipeError, match=message):
        build_pretrained(store, Machine(), spec, blocks=blocks, tokenizer=tokenizer)


def test_ranks_that_do_not_divide_the_batch_are_refused_before_a_launch(tmp_path: Path) -> None:
    store, blocks, tokenizer = blocks_and_tokenizer(tmp_path)
    machine = Machine(training=TrainingSettings(num_ranks=3))
    with pytest.raises(SettingsError, match="3 ranks do not divide the recipe's global_batch_size 4"):
        build_pretrained(store, machine, pretrained_spec(), blocks=blocks, tokenizer=tokenizer)


@stage("tokenizer", revision=1)
def build_other_tokenizer(work: Work, spec: InputSpec) -> Built:
    return Built(stats={"vocab_size": 61})


def test_the_tokenizer_must_be_that_of_the_blocks(tmp_path: Path) -> None:
    store, blocks, _ = blocks_and_tokenizer(tmp_path)
    other = build_other_tokenizer(store, Machine(), InputSpec(seed=1))
    with pytest.raises(RecipeError, match=r"was made with 60 ids, tokenizer/.* has 61; give the tokenizer of the blocks"):
        build_pretrained(store, Machine(), pretrained_spec(), blocks=blocks, tokenizer=other)


@stage("blocks", revision=2)
def build_no_blocks(work: Work, spec: InputSpec) -> Built:
    return Built(stats={"block_size": 16, "vocab_size": 60, "end_of_document_id": 0, "train": {"num_blocks": 0}})


def test_no_row_to_train_on_is_refused(tmp_path: Path) -> None:
    store, _, tokenizer = blocks_and_tokenizer(tmp_path)
    blocks = build_no_blocks(store, Machine(), InputSpec())
    with pytest.raises(RecipeError, match="pretrained: no row of 16 ids to train on; give more text or lower block_size"):
        build_pretrained(store, Machine(), pretrained_spec(), blocks=blocks, tokenizer=tokenizer)


@stage("pretrained", revision=1)
def build_small_base(work: Work, spec: InputSpec) -> Built:
    config = {"vocab_size": 40, "max_position_embeddings": 64}
    (work.folder / "config.json").write_text(json.dumps(config))
    return Built()


@pytest.mark.parametrize(("build", "spec"), [(build_finetuned, FinetunedSpec(**COMMON)), (build_adapter, adapter_spec())])
def test_a_base_with_fewer_ids_than_the_examples_is_refused(tmp_path: Path, build: Stage[Any], spec: Spec) -> None:
    store = ArtifactStore(tmp_path)
    base: Artifact = build_small_base(store, Machine(), InputSpec())
    examples = build_examples(store, Machine(), InputSpec())
    with pytest.raises(RecipeError, match="the tokenizer has 60 ids, the model's vocab_size is 40"):
        build(store, Machine(), spec, base=base, examples=examples)


def test_a_finetuned_model_stops_at_what_closes_an_answer_too(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0, "pad_token_id": 0}')
    assert generation_fields(tmp_path, [2, 0]) == {"eos_token_id": [0, 2], "pad_token_id": 0}


@stage("examples", revision=1)
def build_templated_examples(work: Work, spec: InputSpec) -> Built:
    (work.folder / "chat_template.jinja").write_text("of the examples")
    return Built()


def test_the_template_of_the_examples_goes_along_with_the_tokenizer(tmp_path: Path) -> None:
    store, _, tokenizer = blocks_and_tokenizer(tmp_path)
    copy_tokenizer(tokenizer, build_templated_examples(store, Machine(), InputSpec()), tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "of the examples"
    assert (tmp_path / "tokenizer.json").exists()


def test_a_merged_model_keeps_the_number_format_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    assert number_format(tmp_path) == "bfloat16"


def test_bits_per_byte_are_of_the_validation_split(tmp_path: Path) -> None:
    _, blocks, _ = blocks_and_tokenizer(tmp_path)
    assert validation_bits_per_byte(2.0, blocks) == bits_per_byte(2.0, 80, 200)
    assert validation_bits_per_byte(None, blocks) is None


def test_rows_are_counted_without_being_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "blocks.arrow", random_blocks(7, 0))
    assert count_rows(tmp_path / "blocks.arrow") == 7


def test_validation_without_rows_is_said_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tasks.training.run import Rows, Start, make_plan

    write_rows(tmp_path / "train.arrow", random_blocks(7, 0))
    write_rows(tmp_path / "empty.arrow", random_blocks(0, 0))
    rows = Rows([tmp_path / "train.arrow"], [tmp_path / "empty.arrow"], 16, 60, "data")
    work = Work(ArtifactStore(tmp_path / "store"), Machine(training=TrainingSettings(num_ranks=1)), tmp_path, None)
    with caplog.at_level(logging.WARNING):
        plan = make_plan(work, pretrained_spec(evaluation_steps=5), "pretrained", rows, Start(QWEN, None, "sdpa", 64))
    assert plan.validation_files == []
    assert "pretrained: no validation row, so no validation loss" in caplog.text
