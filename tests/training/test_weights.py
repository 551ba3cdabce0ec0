from typing import Any

import pytest
import torch

from tasks.errors import RecipeError
from tasks.training.model import completed_config, vocab_size_of
from tasks.training.weights import checked_config, compile_layers, new_model
from tests.training.small_inputs import QWEN


def refused(fields: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        new_model({"config": fields, "attention": "sdpa"})
    return str(caught.value)


def test_a_misspelled_field_is_refused_with_those_there_are() -> None:
    message = refused({**QWEN, "hiden_size": 32})
    assert message.startswith("pretrained.model.config: qwen2 has no field hiden_size; it has ")
    assert "hidden_size" in message


def test_a_field_of_the_wrong_type_is_refused() -> None:
    assert "'hidden_size' expected int, got str" in refused({**QWEN, "hidden_size": "wide"})


def test_an_unknown_model_type_is_refused() -> None:
    assert refused({**QWEN, "model_type": "qwen99"}).startswith("pretrained.model.config: 'qwen99'; change the config")


def test_heads_that_do_not_share_the_width_are_refused() -> None:
    assert refused({**QWEN, "model_type": "gpt_neox", "num_key_value_heads": 2})


def test_published_spellings_are_understood() -> None:
    config = checked_config({**QWEN, "rope_theta": 1e6, "torch_dtype": "bfloat16", "architectures": ["Qwen2ForCausalLM"]})
    assert config.rope_parameters["rope_theta"] == 1e6


def test_a_new_model_is_the_same_for_the_same_seed() -> None:
    def first_weight(seed: int) -> Any:
        torch.manual_seed(seed)
        return next(new_model({"config": QWEN, "attention": "sdpa"}).parameters())

    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))


def test_a_new_model_for_bf16_has_weights_that_bf16_has() -> None:
    for weight in new_model({"config": QWEN, "attention": "sdpa"}, "bf16").parameters():
        assert weight.dtype is torch.float32
        assert torch.equal(weight, weight.bfloat16().float())


def test_the_end_of_document_id_is_trained_as_every_other() -> None:
    config = completed_config({**QWEN, "tie_word_embeddings": False}, QWEN["vocab_size"], 5)
    model = new_model({"config": config, "attention": "sdpa"})
    ids = torch.tensor([[5, 6, 7, 5, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    table = model.get_input_embeddings().weight
    assert table[5].abs().min() > 0
    assert table.grad[5].abs().max() > 0


@pytest.mark.slow  # a C++ compiler is at work
def test_compiled_layers_give_the_same_loss_and_gradients() -> None:
    def trained(is_compiled: bool) -> tuple[Any, Any]:
        torch.manual_seed(1)
        model = new_model({"config": {**QWEN, "attention_dropout": 0.0}, "attention": "sdpa"}).train()
        if is_compiled:
            compile_layers(model)
        ids = torch.arange(2 * 16).view(2, 16) % 60
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), model.get_input_embeddings().weight.grad

    for plain, compiled in zip(trained(is_compiled=False), trained(is_compiled=True), strict=True):
        torch.testing.assert_close(plain, compiled, atol=1e-5, rtol=1e-5)


def test_a_model_of_more_than_text_is_refused_with_where_its_vocabulary_is() -> None:
    assert vocab_size_of({"vocab_size": 300}, "finetuned") == 300
    config = {"model_type": "qwen2_5_vl", "text_config": {"vocab_size": 300}, "vision_config": {"hidden_size": 8}}
    told = r"finetuned: the config of its base \(qwen2_5_vl\) has no vocab_size but in text_config; only models of text alone"
    with pytest.raises(RecipeError, match=told):
        vocab_size_of(config, "finetuned")
