from dataclasses import replace
from typing import Any

import pytest

from tasks.errors import SettingsError
from tasks.machine import TrainingSettings
from tasks.training import choice as choices
from tasks.training.adapter import AdapterSpec
from tasks.training.choice import CHEAPEST_FIRST, MOST_CPU_BYTES, cheapest_preset, choose, fits, most_rows
from tasks.training.deepspeed import load_deepspeed_config, preset
from tasks.training.memory import Load, Shape, estimate
from tasks.training.optimization import OptimizationSpec
from tasks.training.room import Room

QWEN_1_5B: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
SHAPE = Shape.of(QWEN_1_5B)
assert SHAPE
LOAD = Load(block_size=2048, num_rows=1, num_ranks=2, is_on_gpu=True)
GB = 10**9


def of(name: str, load: Load = LOAD) -> Any:
    assert SHAPE
    return estimate(SHAPE, load, load_deepspeed_config(preset(name)))


def test_the_parameters_of_qwen_are_counted() -> None:
    assert SHAPE
    assert SHAPE.num_parameters / 1e6 == pytest.approx(1543.7, rel=1e-3)  # as its model card says, with biases


def test_other_spellings_are_read() -> None:
    shape = Shape.of({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257})
    assert shape
    assert shape.num_parameters / 1e6 == pytest.approx(124, rel=0.01)


@pytest.mark.parametrize(
    "config", [{}, {"hidden_size": 8}, {**QWEN_1_5B, "num_experts": 8}, {**QWEN_1_5B, "hidden_size": "wide"}]
)
def test_a_config_that_is_not_understood_has_no_shape(config: dict[str, Any]) -> None:
    assert Shape.of(config) is None


def test_each_preset_takes_less_of_a_gpu_than_the_one_before() -> None:
    taken = [of(name).on_device for name in ("zero1", "zero2", "zero2_offload")]
    assert taken == sorted(taken, reverse=True)
    assert of("zero3").on_device < of("zero2").on_device
    assert of("zero3_offload").on_device < of("zero3").on_device


def test_more_ranks_leave_each_with_less() -> None:
    for name in CHEAPEST_FIRST:
        assert of(name, replace(LOAD, num_ranks=8)).total < of(name).total


def test_what_is_offloaded_is_beside_the_gpu() -> None:
    offloaded = of("zero2_offload")
    assert offloaded.optimizer == 0
    assert offloaded.offloaded >= of("zero2").optimizer + of("zero2").gradients
    assert offloaded.on_host == offloaded.offloaded + offloaded.checkpoint


def test_the_chunked_loss_takes_a_part_of_the_plain_ones_memory() -> None:
    assert of("zero2").logits < 0.6 * of("zero2", replace(LOAD, loss="plain")).logits
    many = replace(LOAD, num_rows=16)
    assert of("zero2", many).logits < 0.1 * of("zero2", replace(many, loss="plain")).logits


def test_recomputed_activations_take_a_part() -> None:
    assert of("zero2", replace(LOAD, gradient_checkpointing=True)).activations < 0.2 * of("zero2").activations


def test_an_adapter_has_hardly_an_optimizer() -> None:
    assert of("zero2", replace(LOAD, trained_share=0.01)).optimizer < 0.02 * of("zero2").optimizer


def test_the_cheapest_preset_that_fits_is_picked() -> None:
    assert SHAPE
    load = replace(LOAD, num_ranks=8, gradient_checkpointing=True)
    for name in CHEAPEST_FIRST:
        exactly = Room(host_bytes=1 << 50, device_bytes=of(name, load).on_device)
        assert fits(of(name, load), exactly)
        assert CHEAPEST_FIRST.index(cheapest_preset(SHAPE, load, exactly, "pretrained")) <= CHEAPEST_FIRST.index(name)
    assert cheapest_preset(SHAPE, load, Room(1 << 50, 80 * GB), "pretrained") == CHEAPEST_FIRST[0]


@pytest.mark.parametrize("method", ["prefix", "p_tuning", "prompt", "qlora"])
def test_what_does_not_train_under_zero_3_is_given_another_preset(method: str) -> None:
    assert SHAPE
    spec = AdapterSpec(global_batch_size=8, num_steps=1, learning_rate=1e-3, method=method)  # type: ignore[arg-type]
    load = replace(Load.of(spec, 2048, "sdpa"), num_ranks=8, is_on_gpu=True)
    tight = Room(1 << 50, of("zero3", load).on_device)
    assert cheapest_preset(SHAPE, replace(load, most_zero_stage=3), tight, "adapter") == "zero3"
    with pytest.raises(SettingsError, match=r"^adapter: one row under zero2_offload takes"):
        cheapest_preset(SHAPE, load, tight, "adapter")


def test_an_adapter_by_method_full_trains_every_weight() -> None:
    fields: dict[str, Any] = {"global_batch_size": 8, "num_steps": 1, "learning_rate": 1e-3}
    assert Load.of(AdapterSpec(**fields, method="full"), 128, "sdpa") == Load.of(OptimizationSpec(**fields), 128, "sdpa")
    assert Load.of(AdapterSpec(**fields, method="lora"), 128, "sdpa").trained_share < 0.1


def test_what_a_file_leaves_to_transformers_is_read() -> None:
    assert SHAPE
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "offload_optimizer": None}
    buckets = {**zero, "reduce_bucket_size": SHAPE.hidden**2}
    assert estimate(SHAPE, LOAD, {"zero_optimization": zero}) == estimate(SHAPE, LOAD, {"zero_optimization": buckets})


def test_stages_side_by_side_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "room_here", lambda num_ranks: Room(240 * GB // num_ranks))
    spec = OptimizationSpec(global_batch_size=8, num_steps=1, learning_rate=1e-3)
    settings = TrainingSettings(num_ranks=2, num_slots=3)
    assert choose(QWEN_1_5B, 9, 8, Load.of(spec, 128, "sdpa"), settings, where="adapter").room.host_bytes == 40 * GB


def test_where_nothing_fits_the_numbers_are_told() -> None:
    assert SHAPE
    with pytest.raises(
        SettingsError, match=r"pretrained: one row under zero3_offload takes about \d+\.\d GB a rank, there are 1\.0 GB"
    ):
        cheapest_preset(SHAPE, LOAD, Room(1 * GB, 1 * GB), "pretrained")


def test_a_micro_batch_grows_until_the_memory_is_full() -> None:
    assert SHAPE
    config, load = load_deepspeed_config(preset("zero2")), replace(LOAD, num_rows=64)
    rows = most_rows(SHAPE, load, config, Room(1 << 50, 80 * GB))
    assert 1 < rows < 64
    assert estimate(SHAPE, replace(load, num_rows=rows), config).on_device <= 80 * GB
    assert estimate(SHAPE, replace(load, num_rows=rows + 1), config).on_device > 80 * GB
    assert most_rows(SHAPE, load, config, Room(1 << 50, 4 * GB)) == 0


def test_on_cpu_a_micro_batch_stays_near_the_caches() -> None:
    assert SHAPE
    config, load = load_deepspeed_config(preset("zero2")), replace(LOAD, num_rows=64, block_size=128, is_on_gpu=False)
    rows = most_rows(SHAPE, load, config, Room(1 << 50))
    wanted = estimate(SHAPE, replace(load, num_rows=rows + 1), config)
    assert wanted.activations + wanted.logits > MOST_CPU_BYTES


@pytest.mark.parametrize(("picks", "expected"), [(True, CHEAPEST_FIRST[0]), (False, "zero3")])
def test_a_preset_is_picked_only_where_that_is_asked(monkeypatch: pytest.MonkeyPatch, picks: bool, expected: str) -> None:
    monkeypatch.setattr(choices, "room_here", lambda num_ranks: Room(1 << 50))
    settings = TrainingSettings(num_ranks=2, deepspeed_config=preset("zero3"), picks_preset=picks)
    spec = OptimizationSpec(global_batch_size=8, num_steps=1, learning_rate=1e-3)
    chosen = choose(QWEN_1_5B, 9, 8, Load.of(spec, 128, "sdpa"), settings, where="pretrained")
    assert (chosen.preset, chosen.batch.num_ranks, chosen.is_enough) == (expected, 2, True)


def test_a_model_that_is_not_understood_is_bounded_by_its_logits() -> None:
    spec = OptimizationSpec(global_batch_size=8, num_steps=1, learning_rate=1e-3)
    load = Load.of(spec, 1 << 14, "sdpa")
    chosen = choose({}, 1 << 13, 8, load, TrainingSettings(num_ranks=2), where="pretrained")
    assert (chosen.estimate, chosen.most_rows, chosen.batch.micro_batch_size) == (None, None, 2)
