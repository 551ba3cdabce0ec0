from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.errors import RecipeError, SettingsError
from tasks.schemas import IGNORED_LABEL
from tasks.training import loss as losses
from tasks.training.loss import add_head_loss, chunked, chunks, summed_loss
from tests.training.small_inputs import BLOCK_SIZE, QWEN, VOCAB_SIZE


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 5 * QWEN["vocab_size"])  # type: ignore[operator]


def model_of(loss: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**QWEN, "attention_dropout": 0.0, "initializer_range": 0.2, **fields})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    add_head_loss(model, loss, "pretrained")
    return model


def rows(num_rows: int = 3) -> dict[str, torch.Tensor]:
    ids_BT = torch.randint(0, VOCAB_SIZE, (num_rows, BLOCK_SIZE), generator=torch.Generator().manual_seed(1))
    labels_BT = ids_BT.masked_fill(ids_BT % 3 == 0, IGNORED_LABEL)
    return {"input_ids": ids_BT, "labels": labels_BT}


def loss_and_gradients(model: Any, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(**rows(), use_cache=False, **options).loss
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_loss_and_gradients_are_those_of_the_plain_way(is_tied: bool, dtype: torch.dtype, tolerance: float) -> None:
    plain, its_grads = loss_and_gradients(model_of("plain", dtype, tie_word_embeddings=is_tied))
    ours, our_grads = loss_and_gradients(model_of("chunked", dtype, tie_word_embeddings=is_tied))
    assert ours == pytest.approx(plain, rel=1e-6 if dtype == torch.float32 else 1e-3)
    for name, grad in its_grads.items():
        difference = (our_grads[name] - grad).float().norm() / grad.float().norm()
        assert difference < tolerance, name


def test_the_loss_is_over_the_tokens_that_trainer_counts() -> None:
    plain, _ = loss_and_gradients(model_of("plain"), num_items_in_batch=torch.tensor(77))
    ours, _ = loss_and_gradients(model_of("chunked"), num_items_in_batch=torch.tensor(77))
    assert ours == pytest.approx(plain, rel=1e-6)


def test_the_loss_of_bf16_is_summed_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 32, generator=generator).bfloat16() for size in (40, 64))
    labels = torch.randint(0, 64, (40,), generator=generator)
    summed = chunked(hidden, weight, labels)
    assert summed.dtype == torch.float32
    assert summed.item() == pytest.approx(cross_entropy((hidden @ weight.T).float(), labels, reduction="sum").item(), rel=1e-6)


def test_a_frozen_head_gets_no_gradient() -> None:
    model = model_of("chunked")
    model.get_output_embeddings().weight.requires_grad_(False)
    _, grads = loss_and_gradients(model)
    assert grads["model.embed_tokens.weight"] is None
    assert grads["model.norm.weight"] is not None


def test_a_batch_without_a_supervised_token_has_no_loss_and_no_gradient() -> None:
    model = model_of("chunked")
    batch = rows()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED_LABEL)
    loss = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(7)).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(not weight.grad.any() for weight in model.parameters())


@pytest.mark.parametrize("name", ["plain", "chunked"])
def test_validation_sums_the_loss_of_every_supervised_token(name: str) -> None:
    model = model_of(name).eval()
    with torch.no_grad():
        total = summed_loss(model, rows())
        expected = model_of("plain").eval()(**rows(), use_cache=False).loss.item()
    assert total[1] == (rows()["labels"][:, 1:] != IGNORED_LABEL).sum()
    assert (total[0] / total[1]).item() == pytest.approx(expected, rel=1e-6)


def test_without_labels_a_model_still_has_logits() -> None:
    ids = rows()["input_ids"]
    assert torch.equal(model_of("chunked").eval()(ids).logits, model_of("plain").eval()(ids).logits)


def test_a_model_that_caps_its_logits_is_refused() -> None:
    fields = {name: QWEN[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model("gemma2", **fields, **heads, final_logit_softcapping=30.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    add_head_loss(model, "chunked", "pretrained")
    with pytest.raises(RecipeError, match=r"changes its logits behind its head; set pretrained\.loss: plain"):
        model(**rows())


def test_a_loss_that_is_no_number_is_left_to_the_watch_over_the_loss() -> None:
    model = model_of("chunked")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    assert model(**rows()).loss.isnan()
    assert not model.head_loss.is_checked, "a model that scales its logits is still to be found"


def test_liger_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(SettingsError, match="loss: liger"):
        model_of("liger")(**rows())


def test_chunks_cover_every_token_once() -> None:
    assert chunks(12, QWEN["vocab_size"]) == [slice(0, 5), slice(5, 10), slice(10, 12)]  # type: ignore[arg-type]
    assert chunks(0, 64) == []
    assert chunks(2, 1 << 40) == [slice(0, 1), slice(1, 2)]
