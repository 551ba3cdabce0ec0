"""The merging process: a base and its adapter to one model folder; `python -m tasks.training.merge PLAN.json`.

Reads   a Hugging Face model folder, a PEFT folder
Writes  config.json, generation_config.json, model.safetensors
"""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM

from tasks.training.rank import run_rank


def merge(plan: dict[str, Any]) -> None:
    """Merge in fp32 and save in the base's number format."""
    model = AutoModelForCausalLM.from_pretrained(
        plan["base_dir"], dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    merged = merged_model(model, plan["adapter_dir"])
    merged.to(getattr(torch, plan["dtype"])).save_pretrained(plan["output_dir"])


def merged_model(model: Any, adapter_dir: str) -> Any:
    """The base with the adapter's products added to its weights."""
    adapted = PeftModel.from_pretrained(model, adapter_dir)
    untie_adapted(model)
    return adapted.merge_and_unload(safe_merge=True)


def untie_adapted(model: Any) -> None:
    """Give the output layer its own copy of a weight that it shares with the embedding, where either is adapted.

    An adapter changes what the one of them says, not the other: merged into the shared weight it would change both.
    """
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    if None in layers or not any(isinstance(layer, BaseTunerLayer) for layer in layers):
        return
    embedding, output = (layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers)
    if output.weight is embedding.weight:
        output.weight = nn.Parameter(embedding.weight.detach().clone())
        model.config.tie_word_embeddings = False


if __name__ == "__main__":
    run_rank(merge)
