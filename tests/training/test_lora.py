"""LoRA in the worker: where it is added, what is saved, and that merging changes nothing that the model says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.errors import RecipeError
from tasks.training.lora import FrozenWeights, add_lora, save_adapter
from tasks.training.merge import merged_model
from tests.training.small_inputs import QWEN

IDS = torch.tensor([[1, 5, 9, 33, 2, 7]])


def small_model(tied: bool = True) -> Any:
    torch.manual_seed(0)
    fields = {**QWEN, "tie_word_embeddings": tied, "initializer_range": 0.2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).eval()


def adapted(model: Any, *targets: str) -> Any:
    lora = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "use_rslora": False, "target_modules": list(targets), "base_ref": "b/k"}
    model = add_lora(model, lora, "adapter").eval()
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def saved(model: Any, folder: Path) -> Path:
    folder.mkdir()
    save_adapter(model, model.state_dict(), folder, "finetuned/abc")
    return folder


def test_a_name_that_no_module_bears_is_refused_with_those_there_are() -> None:
    lora = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "use_rslora": False, "base_ref": "b/k"}
    with pytest.raises(RecipeError, match=r"is named query, norm; the base has .*embed_tokens, .*q_proj"):
        add_lora(small_model(), {**lora, "target_modules": ["q_proj", "query", "norm"]}, "adapter")


def test_only_the_low_rank_products_are_trained() -> None:
    model = adapted(small_model(), "q_proj", "embed_tokens")
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.split(".lora_")[-1].split(".")[0] for name in trained} == {"A", "B", "embedding_A", "embedding_B"}


def test_a_frozen_weight_that_changes_is_noticed() -> None:
    model = adapted(small_model(), "q_proj")
    frozen = FrozenWeights(model)
    frozen.check()
    with torch.no_grad():
        model.get_base_model().model.norm.weight[0] += 1e-3
    with pytest.raises(AssertionError, match="changed the frozen base"):
        frozen.check()


def test_the_folder_names_the_base_as_the_store_does_and_no_path(tmp_path: Path) -> None:
    folder = saved(adapted(small_model(), "v_proj", "q_proj", "embed_tokens"), tmp_path / "adapter")
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == "finetuned/abc"
    assert config["target_modules"] == ["embed_tokens", "q_proj", "v_proj"]
    assert all(".lora_" in name for name in load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "embed_tokens")])
def test_adapted_reloaded_and_merged_say_the_same(tmp_path: Path, tied: bool, targets: tuple[str, ...]) -> None:
    model = adapted(small_model(tied), *targets)
    folder = saved(model, tmp_path / "adapter")
    merged = merged_model(small_model(tied), str(folder))
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        plain = small_model(tied)(IDS, use_cache=False).logits
        assert (expected - plain).abs().max() > 0.1
        for other in (
            PeftModel.from_pretrained(small_model(tied), folder),
            merged,
            AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        ):
            torch.testing.assert_close(other.eval()(IDS, use_cache=False).logits, expected, atol=1e-5, rtol=0)
