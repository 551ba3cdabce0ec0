"""Every method of adapting, with small fields: what the tests of adapters go through."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.training.adapter import AdapterSpec, adapter_plan
from tasks.training.adapters.layers import add_adapter
from tasks.training.adapters.saved import save_adapter
from tests.training.small_inputs import QWEN

COMMON: dict[str, Any] = {"global_batch_size": 4, "num_steps": 10, "learning_rate": 1e-2}

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 2, "target_modules": ["q_proj", "embed_tokens"]}},
    "rslora": {"lora": {"rank": 4, "use_rslora": True, "target_modules": "all-linear"}},
    "dora": {"lora": {"rank": 2, "use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}},
    "pissa": {"lora": {"rank": 4, "init": "pissa", "target_modules": ["q_proj", "down_proj", "embed_tokens"]}},
    "olora": {"lora": {"rank": 4, "init": "olora", "use_rslora": True, "target_modules": r".*\.(q|v)_proj"}},
    "qlora": {"method": "qlora", "qlora": {"rank": 2, "target_modules": ["q_proj", "embed_tokens"]}},
    "houlsby": {"method": "bottleneck", "bottleneck": {"size": 8, "placement": "houlsby", "activation": "gelu", "dropout": 0.1}},
    "pfeiffer": {"method": "bottleneck", "bottleneck": {"size": 8}},
    "prefix": {"method": "prefix", "prefix": {"num_virtual_tokens": 4}},
    "prefix-projected": {"method": "prefix", "prefix": {"num_virtual_tokens": 4, "projection_size": 16}},
    "p_tuning": {"method": "p_tuning", "p_tuning": {"num_virtual_tokens": 4, "encoder_size": 16}},
    "p_tuning-lstm": {
        "method": "p_tuning",
        "p_tuning": {"num_virtual_tokens": 4, "encoder": "lstm", "encoder_size": 16, "encoder_dropout": 0.1},
    },
    "prompt": {"method": "prompt", "prompt": {"num_virtual_tokens": 4}},
    "ia3": {"method": "ia3"},
    "full": {"method": "full"},
}
PLAIN = [name for name in METHODS if name != "qlora"]  # needs no package more
ADDED = [name for name in PLAIN if name != "full"]
VIRTUAL = [name for name in METHODS if name.startswith(("prefix", "p_tuning", "prompt"))]


class Base:
    """What of a base artifact an adapter's plan tells."""

    def __init__(self, path: Path) -> None:
        self.path, self.ref, self.content = path, "pretrained/abc", "c" * 64


def spec_of(name: str, **fields: Any) -> AdapterSpec:
    """Through JSON, as a recipe comes."""
    return AdapterSpec.model_validate_json(json.dumps({**COMMON, **METHODS[name], **fields}))


def plan_of(name: str, base: Path = Path("nowhere")) -> dict[str, Any] | None:
    return adapter_plan(spec_of(name), Base(base))  # type: ignore[arg-type]  # an artifact as far as it goes


def small_model(tied: bool = True) -> Any:
    torch.manual_seed(0)
    fields = {**QWEN, "tie_word_embeddings": tied, "initializer_range": 0.2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).eval()


def adapted(name: str, model: Any) -> Any:
    """The model with an adapter whose every weight has moved away from where it began."""
    return moved(add_adapter(model, plan_of(name) or {}, "adapter"))


def moved(model: Any) -> Any:
    """The model, every weight of whose adapter has moved, by the same at every call."""
    torch.manual_seed(1)
    model.eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.3)
    return model


def saved(model: Any, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_adapter(model, dict(model.state_dict()), folder, "pretrained/abc")
    return folder
