"""What training an adapter leaves: a base that has not changed, and a PEFT folder.

Writes  adapter_config.json, adapter_model.safetensors
"""

import hashlib
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import safe_open

from tasks.store import write_atomically

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"


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
    model.eval()  # virtual tokens are what their encoder says: without its dropout
    config = model.peft_config["default"]
    if initial := model.initial_products:
        weights = as_plain_lora(weights, initial)
        config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, scale_of_twice(config), True
    # The base's embedding is the base's, adapted or not.
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    path = folder / CONFIG_NAME
    fields = {**orjson.loads(path.read_bytes()), "base_model_name_or_path": base_ref}  # PEFT writes a folder of this machine
    for name in ("target_modules", "feedforward_modules"):
        if isinstance(fields.get(name), list):  # PEFT holds names in a set, whose order changes from one process to the next
            fields[name] = sorted(fields[name])
    if "prompt_tuning_init" in fields:  # what a prompt began as is no part of it; a text would need its tokenizer's folder
        fields |= {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None}
        fields |= {"tokenizer_name_or_path": None, "tokenizer_kwargs": None}
    write_atomically(path, orjson.dumps(fields, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))
    check_saved(folder / WEIGHTS_NAME)


def as_plain_lora(weights: dict[str, torch.Tensor], initial: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What training added, as products twice as wide: B A less the B A that the base's weights were robbed of at the start.

    The base's file holds its weights whole, so that only the difference belongs onto them.
    """
    plain = {}
    for name, first in initial.items():
        weight = weights[name]
        is_a = ".lora_A." in name or ".lora_embedding_A." in name
        taken = first.to(weight) if is_a else -first.to(weight)
        plain[name] = torch.cat([weight, taken], dim=0 if is_a else 1)
    return plain


def scale_of_twice(config: Any) -> float:
    """The alpha by which products of twice the rank count as those of the rank did."""
    alpha: float = config.lora_alpha * (2**0.5 if config.use_rslora else 2)
    return alpha


def check_saved(path: Path) -> None:
    """Raise AssertionError where the file lacks numbers, as one of weights that were not gathered does."""
    with safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping
    assert shapes, f"{path}: no weight was saved"
    empty = [name for name, shape in shapes.items() if 0 in shape]
    assert not empty, f"{path}: not gathered: {empty}"
