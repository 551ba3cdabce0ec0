"""Adapters in the worker: what is added and trained, what is saved, and that loaded and merged they say the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tasks.errors import RecipeError
from tasks.training.adapters.layers import add_adapter
from tasks.training.adapters.saved import FrozenWeights, check_saved
from tasks.training.adapters.virtual import as_called, one_example_a_row
from tasks.training.generate import Decoding
from tasks.training.merge import merged_model
from tests.training.adapting import ADDED, VIRTUAL, adapted, moved, plan_of, saved, small_model

IDS = torch.tensor([[1, 5, 9, 33, 2, 7]])
LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "use_rslora": False, "use_dora": False, "init": "kaiming"}


def lora(targets: Any) -> dict[str, Any]:
    return {"method": "lora", "fields": {**LORA, "target_modules": targets}}


@pytest.mark.parametrize("name", ADDED)
def test_loaded_by_peft_alone_an_adapter_says_what_it_said_in_training(name: str, tmp_path: Path) -> None:
    base = small_model()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = adapted(name, base)
    frozen = FrozenWeights(model)
    folder = saved(model, tmp_path)
    frozen.check()
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits[:, -IDS.shape[1] :]
        loaded = PeftModel.from_pretrained(small_model(), folder).eval()
        said = loaded(IDS, use_cache=False).logits[:, -IDS.shape[1] :]
        plain = small_model()(IDS, use_cache=False).logits
        assert (expected - plain).abs().max() > 0.05
        torch.testing.assert_close(said, expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(as_called(loaded)(IDS, use_cache=False).logits, expected, atol=2e-5, rtol=0)
        with loaded.disable_adapter():
            torch.testing.assert_close(loaded(IDS, use_cache=False).logits, plain, atol=0, rtol=0)
    if name not in {"pissa", "olora"}:  # they take a part of the weights in memory for their own; that of the file stays
        kept = model.get_base_model().state_dict()
        assert all(torch.equal(kept[key], value) for key, value in before.items() if key in kept)


@pytest.mark.parametrize("name", ADDED)
def test_a_folder_holds_the_trained_weights_alone_and_no_path(name: str, tmp_path: Path) -> None:
    model = adapted(name, small_model())
    folder = saved(model, tmp_path)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == "pretrained/abc"
    assert not [value for value in config.values() if isinstance(value, str) and "/" in value.replace("pretrained/abc", "")]
    weights = load_file(folder / "adapter_model.safetensors")
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    held = sum(weight.numel() for weight in weights.values())
    if name in {"pissa", "olora"}:
        assert held == 2 * trained
    elif name in {"prefix-projected", "p_tuning", "p_tuning-lstm"}:
        assert held < trained  # what the tokens were trained through is not needed any more
    else:
        assert held == trained
    assert all(".base_layer." not in key for key in weights)


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    model = adapted("ia3", small_model())
    one, other = saved(model, tmp_path / "one"), saved(model, tmp_path / "other")
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()
    assert json.loads((one / "adapter_config.json").read_bytes())["feedforward_modules"] == ["down_proj"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "pissa", "olora", "ia3"])
def test_merged_says_the_same_within_5e_5(name: str, tied: bool, tmp_path: Path) -> None:
    model = adapted(name, small_model(tied))
    merged = merged_model(small_model(tied), str(saved(model, tmp_path / "adapter")))
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        for other in (merged, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")):
            torch.testing.assert_close(other.eval()(IDS, use_cache=False).logits, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "embed_tokens"]])
def test_an_output_layer_that_shares_its_weight_is_merged_apart_from_the_embedding(targets: list[str], tmp_path: Path) -> None:
    model = moved(add_adapter(small_model(tied=True), lora(targets), "adapter"))
    merged = merged_model(small_model(tied=True), str(saved(model, tmp_path / "adapter")))
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        for other in (merged, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")):
            torch.testing.assert_close(other.eval()(IDS, use_cache=False).logits, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["lora", "houlsby", *VIRTUAL])
def test_decoding_with_a_cache_and_padding_says_what_one_forward_says(name: str, tmp_path: Path) -> None:
    model = as_called(PeftModel.from_pretrained(small_model(), saved(adapted(name, small_model()), tmp_path)).eval())
    prompts = [[1, 5, 9, 33], [4, 8]]
    decoding = Decoding(model, prompts)
    with torch.inference_mode():
        for _ in range(4):
            logits = decoding.logits()
            for row, prompt in enumerate(prompts):
                alone = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
                torch.testing.assert_close(logits[row], alone, atol=2e-5, rtol=0)
            chosen = logits.argmax(-1)
            prompts = [[*prompt, int(token)] for prompt, token in zip(prompts, chosen, strict=True)]
            decoding.append(chosen)


def test_a_convolution_is_adapted_too(tmp_path: Path) -> None:
    def model() -> Any:
        built = small_model()
        built.patches = nn.Conv2d(3, 8, 2, bias=False)
        nn.init.ones_(built.patches.weight)
        return built

    adapted_model = add_adapter(model(), lora(["q_proj", "patches"]), "adapter").eval()
    with torch.no_grad():
        for weight in adapted_model.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    image = torch.ones(1, 3, 4, 4)
    expected = adapted_model.get_base_model().patches(image)
    folder = saved(adapted_model, tmp_path)
    assert any("patches" in key for key in load_file(folder / "adapter_model.safetensors"))
    torch.testing.assert_close(PeftModel.from_pretrained(model(), folder).get_base_model().patches(image), expected)
    torch.testing.assert_close(merged_model(model(), str(folder)).patches(image), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "query", "norm"], r"no .*Embedding.* module is named query, norm; the base has .*embed_tokens, .*q_proj"),
        (r".*\.query", r"the pattern '.*query' meets no .* module; the base has "),
        ("(", r"'\(' is no regular expression"),
        (r".*(q_proj|norm)", r"adapter.lora: Target module .* not supported"),
    ],
)
def test_targets_that_the_base_has_not_are_refused(targets: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        add_adapter(small_model(), lora(targets), "adapter")
    assert "\n" not in str(raised.value)


def test_a_bottleneck_begins_as_nothing_added() -> None:
    model = add_adapter(small_model(), plan_of("houlsby") or {}, "adapter").eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, small_model()(IDS).logits)


def test_a_frozen_weight_that_changes_is_noticed() -> None:
    model = adapted("lora", small_model())
    frozen = FrozenWeights(model)
    with torch.no_grad():
        model.get_base_model().model.norm.weight[0] += 1e-3
    with pytest.raises(AssertionError, match="changed the frozen base"):
        frozen.check()


def test_a_file_without_numbers_is_noticed(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2), "b": torch.ones(0, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(AssertionError, match=r"not gathered: \['b'\]"):
        check_saved(tmp_path / "a.safetensors")


def packed() -> dict[str, torch.Tensor]:
    """Two rows: examples of 3 and 4 tokens and padding; one of 5 and padding of 3."""
    return {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0], [11, 12, 13, 14, 15, 0, 0, 0]]),
        "labels": torch.tensor([[-100, -100, 3, 4, -100, 6, 7, -100], [-100, 12, -100, -100, 15, -100, -100, -100]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 1, 2]]),
    }


def test_examples_of_a_row_are_taken_apart_and_padding_is_dropped() -> None:
    rows = one_example_a_row(packed())
    assert rows["input_ids"].tolist() == [[1, 2, 3, 0, 0], [4, 5, 6, 7, 0], [11, 12, 13, 14, 15]]
    assert rows["labels"].tolist() == [[-100, -100, 3, -100, -100], [-100, -100, 6, 7, -100], [-100, 12, -100, -100, 15]]
    assert set(rows) == {"input_ids", "labels"}


def test_a_batch_without_a_supervised_token_keeps_one_row() -> None:
    batch = packed()
    batch["labels"][:] = -100
    assert one_example_a_row(batch)["input_ids"].shape == (1, 3)


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_an_example_learns_the_same_alone_and_beside_others(name: str) -> None:
    """What stands right of an example, or in another row, changes nothing that the model says of it."""
    model = adapted(name, small_model())
    rows = one_example_a_row(packed())
    with torch.no_grad():
        together = model(**rows).logits
        alone = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    virtual = alone.shape[1] - 3
    torch.testing.assert_close(together[0, virtual : virtual + 3], alone[0, virtual:], atol=1e-5, rtol=0)
