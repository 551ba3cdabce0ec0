"""What the meter reads: the cost of a token by hand, and the time left."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tasks.training.meter import Meter, flops_per_token, measured_peak


def model(is_tied: bool) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            tie_word_embeddings=is_tied,
        )
    )  # fmt: skip


# A layer's matrices: queries and output 8 x 8, keys and values 8 x 4, three of the MLP 8 x 16.
LAYER = 2 * 64 + 2 * 32 + 3 * 128
ATTENTION = 12 * 2 * 8 * 32  # layers x width x block_size


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_token_costs_six_for_each_weight_that_is_multiplied_by_and_the_head_is_one_of_them(is_tied: bool) -> None:
    assert flops_per_token(model(is_tied), block_size=32) == 6 * (2 * LAYER + 50 * 8) + ATTENTION


def test_frozen_weights_cost_no_gradient_of_their_own() -> None:
    frozen = model(is_tied=False)
    for name, weight in frozen.named_parameters():
        weight.requires_grad = "lm_head" in name
    assert flops_per_token(frozen, block_size=32) == 4 * (2 * LAYER + 50 * 8) + 2 * 50 * 8 + ATTENTION


def test_a_model_without_heads_costs_its_weights() -> None:
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", vocab_size=50, hidden_size=8, num_hidden_layers=1))
    weights = sum(weight.numel() for weight in mamba.parameters() if weight.dim() > 1)
    assert flops_per_token(mamba, block_size=32) == 6 * (weights - (0 if mamba.config.tie_word_embeddings else 50 * 8))


def test_of_a_model_with_experts_no_share_of_the_peak_is_told() -> None:
    fields = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4}
    config = AutoConfig.for_model("qwen2_moe", vocab_size=50, num_hidden_layers=1, moe_intermediate_size=8, **fields)
    meter = Meter(tokens_per_step=100, num_ranks=1, num_steps=10)
    meter.begin(AutoModelForCausalLM.from_config(config), 32, "fp32", torch.device("cpu"))
    assert meter.peak > 0
    assert "mfu" not in meter.read(1)


def test_a_peak_is_measured_without_a_random_number() -> None:
    before = torch.get_rng_state()
    assert measured_peak(torch.device("cpu"), torch.float32) > 1e8
    assert torch.equal(torch.get_rng_state(), before)


def test_the_first_report_says_nothing_of_later_steps_once_there_are_others() -> None:
    meter = Meter(tokens_per_step=100, num_ranks=2, num_steps=10)
    meter.flops_per_token, meter.peak = 1.0, 1e12
    first = meter.read(1)
    assert first["num_steps"] == 1
    assert first["memory_bytes"] > 1 << 20
    meter._seconds_per_step = lambda steps, seconds: 2.0  # type: ignore[method-assign]
    assert meter.read(4)["seconds_left"] == 12.0
    assert meter.read(10)["seconds_left"] == 0.0


def test_the_time_left_is_reckoned_without_the_steps_in_which_all_warms_up() -> None:
    meter = Meter(tokens_per_step=1, num_ranks=1, num_steps=10)
    assert meter._seconds_per_step(2, 60.0) == 30.0
    assert meter._seconds_per_step(5, 10.0) == 2.0
    assert meter._seconds_per_step(5, 30.0) == 4.0
