"""LoRA layers in the worker: added to a frozen base, watched, saved as a PEFT folder.

Writes  adapter_config.json, adapter_model.safetensors
"""

import hashlib
from pathlib import Path
from typing import Any

import orjson
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from tasks.errors import RecipeError
from tasks.store import write_atomically

ADAPTABLE = (nn.Linear, nn.Embedding)


def add_lora(model: Any, lora: dict[str, Any], where: str, gradient_checkpointing: bool = False) -> Any:
    """The model with LoRA layers on the named modules, all else frozen.

    Raises RecipeError for a name that no linear or embedding module bears.
    """
    targets = lora["target_modules"]
    names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, ADAPTABLE)})
    if missing := [target for target in targets if target.rpartition(".")[2] not in names]:
        raise RecipeError(
            f"{where}.lora.target_modules: no linear or embedding module is named {', '.join(missing)}; "
            f"the base has {', '.join(names)}"
        )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        use_rslora=lora["use_rslora"],
        target_modules=targets,
    )
    # autocast_adapter_dtype: DeepSpeed decides the number format of computation, and keeps its own fp32 copy.
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    if gradient_checkpointing:
        adapted.enable_input_require_grads()  # it passes nothing back through a frozen embedding otherwise
    return adapted


class FrozenWeights:
    """Watches that training leaves the frozen weights as they are, to the bit."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.before = self.digest()

    def check(self) -> None:
        """Raise AssertionError where a frozen weight has changed."""
        assert self.digest() == self.before, "training has changed the frozen base"

    def digest(self) -> str:
        """SHA-256 over every frozen weight that this rank holds; under ZeRO-3 its part of each."""
        state = hashlib.sha256()
        for name, weight in self.model.named_parameters():
            if not weight.requires_grad:
                held = getattr(weight, "ds_tensor", weight).detach().contiguous().cpu()
                state.update(name.encode())
                state.update(held.flatten().view(torch.uint8).numpy())
        return state.hexdigest()


def save_adapter(model: Any, weights: dict[str, torch.Tensor], folder: Path, base_ref: str) -> None:
    """Write the PEFT folder, byte for byte the same for the same weights, naming the base as the store does."""
    # The base's embedding is the base's, adapted or not.
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    path = folder / "adapter_config.json"
    config = orjson.loads(path.read_bytes())
    config["base_model_name_or_path"] = base_ref  # PEFT writes the base's folder on this machine
    # PEFT holds the names in a set, whose order changes from one process to the next.
    config["target_modules"] = sorted(config["target_modules"])
    write_atomically(path, orjson.dumps(config, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))
