"""An adapter in the worker: put onto a frozen base by PEFT, as a method's fields say."""

import re
from collections.abc import Callable
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from tasks.errors import RecipeError
from tasks.training.adapters.bottleneck import BottleneckConfig
from tasks.training.adapters.quantized import keep_packing
from tasks.training.adapters.specs import ALL_LINEAR

LINEAR = (nn.Linear, Conv1D)
ADAPTABLE = {
    "lora": (*LINEAR, nn.Embedding, nn.Conv2d),
    "qlora": (*LINEAR, nn.Embedding),
    "ia3": (*LINEAR, nn.Conv2d),
    "bottleneck": LINEAR,
}
INIT_LORA_WEIGHTS = {"kaiming": True}  # PEFT's word for it; the others are called as we call them
Fields = dict[str, Any]


def add_adapter(model: Any, adapter: Fields, where: str, gradient_checkpointing: bool = False) -> Any:
    """The model with what ``adapter`` (method, fields, base_dir, base_ref) says added to it, all else frozen.

    Raises RecipeError where the base has no such modules.
    """
    method, fields = adapter["method"], adapter["fields"]
    where = f"{where}.{method}"
    for name in ("target_modules", "feedforward_modules"):
        if name in fields:
            check_targets(model, fields[name], ADAPTABLE[method], f"{where}.{name}")
    try:
        # autocast_adapter_dtype: DeepSpeed decides the number format of computation, and keeps its own fp32 copy.
        adapted = get_peft_model(model, CONFIGS[method](fields, adapter), autocast_adapter_dtype=False)
    except ValueError as error:  # such as a pattern that meets a module of another sort
        raise RecipeError(f"{where}: {' '.join(str(error).split())}; change its fields") from error
    adapted.initial_products = initial_products(adapted) if fields.get("init", "").startswith(("pissa", "olora")) else None
    if method == "qlora":
        keep_packing(adapted)
    if gradient_checkpointing:
        adapted.enable_input_require_grads()  # it passes nothing back through a frozen embedding otherwise
    return adapted


def check_targets(model: Any, targets: list[str] | str, adaptable: tuple[type[nn.Module], ...], where: str) -> None:
    """Raise RecipeError for a name that no module which can be adapted bears, or a pattern that meets none."""
    names = [name for name, module in model.named_modules() if isinstance(module, adaptable)]
    ends = sorted({name.rpartition(".")[2] for name in names})
    sort = ", ".join(kind.__name__ for kind in adaptable)
    if isinstance(targets, list):
        if missing := [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]:
            raise RecipeError(f"{where}: no {sort} module is named {', '.join(missing)}; the base has {', '.join(ends)}")
        return
    try:
        is_met = targets == ALL_LINEAR or any(re.fullmatch(targets, name) for name in names)
    except re.error as error:
        raise RecipeError(f"{where}: {targets!r} is no regular expression ({error}); mend it") from error
    if not is_met:
        raise RecipeError(f"{where}: the pattern {targets!r} meets no {sort} module; the base has {names[0]}, ..., {names[-1]}")


def initial_products(adapted: Any) -> dict[str, torch.Tensor]:
    """A copy of LoRA's products as they are before training, by PEFT's names."""
    return {name: weight.detach().cpu().clone() for name, weight in adapted.named_parameters() if weight.requires_grad}


def _lora(fields: Fields, adapter: Fields) -> PeftConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=fields["rank"],
        lora_alpha=fields["alpha"],
        lora_dropout=fields["dropout"],
        use_rslora=fields["use_rslora"],
        use_dora=fields["use_dora"],
        init_lora_weights=INIT_LORA_WEIGHTS.get(fields["init"], fields["init"]),
        target_modules=fields["target_modules"],
    )


def _bottleneck(fields: Fields, adapter: Fields) -> PeftConfig:
    taken = ("size", "activation", "dropout", "target_modules")
    return BottleneckConfig(task_type=TaskType.CAUSAL_LM, **{name: fields[name] for name in taken})


def _ia3(fields: Fields, adapter: Fields) -> PeftConfig:
    targets = {name: fields[name] for name in ("target_modules", "feedforward_modules")}
    return IA3Config(task_type=TaskType.CAUSAL_LM, **targets)


def _prefix(fields: Fields, adapter: Fields) -> PeftConfig:
    return PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=fields["num_virtual_tokens"],
        prefix_projection=fields["projection_size"] is not None,
        encoder_hidden_size=fields["projection_size"],
    )


def _p_tuning(fields: Fields, adapter: Fields) -> PeftConfig:
    return PromptEncoderConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=fields["num_virtual_tokens"],
        encoder_reparameterization_type=fields["encoder"].upper(),
        encoder_hidden_size=fields["encoder_size"],
        encoder_num_layers=fields["encoder_layers"] or 2,
        encoder_dropout=fields["encoder_dropout"] or 0.0,
    )


def _prompt(fields: Fields, adapter: Fields) -> PeftConfig:
    words = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}
    is_text = fields["init"] == "text"
    return PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=fields["num_virtual_tokens"],
        prompt_tuning_init=words[fields["init"]],
        prompt_tuning_init_text=fields["text"],
        tokenizer_name_or_path=adapter["base_dir"] if is_text else None,
        tokenizer_kwargs={"local_files_only": True} if is_text else None,
    )


CONFIGS: dict[str, Callable[[Fields, Fields], PeftConfig]] = {
    "lora": _lora,
    "qlora": _lora,
    "bottleneck": _bottleneck,
    "prefix": _prefix,
    "p_tuning": _p_tuning,
    "prompt": _prompt,
    "ia3": _ia3,
}
