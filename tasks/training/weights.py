"""The model in the worker: made from a config, or loaded from a folder, with an adapter where the plan says so.

Reads   config.json, *.safetensors
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tasks.errors import RecipeError
from tasks.training.deepspeed import zero_stage
from tasks.training.model import check_fits
from tasks.training.rank import local_rank, rank
from tasks.training.trainer import barrier

# Fields that published configs hold and Transformers takes under another name.
OTHER_SPELLINGS = {"model_type", "rope_theta", "rope_scaling", "torch_dtype", "transformers_version", "architectures"}
WHERE = "pretrained.model.config"


def prepared_model(plan: dict[str, Any]) -> Any:
    """The model that the plan starts from, with an adapter where it says so; the same on every rank."""
    seed = plan["optimization"]["seed"]
    torch.manual_seed(seed)
    if plan["model"]["config"] and zero_stage(plan["deepspeed"]) == 3:
        model = loaded_model(plan, whole_new_model(plan))
    elif plan["model"]["config"]:
        model = new_model(plan["model"], plan["optimization"]["precision"])
    else:
        model = loaded_model(plan, plan["model"]["folder"])
    check_fits(model.config.to_dict(), plan["block_size"], plan["vocab_size"], plan["label"])
    model.generation_config = GenerationConfig(**plan["generation"])
    if plan["adapter"]:
        from tasks.training.adapters.layers import add_adapter

        return add_adapter(model, plan["adapter"], plan["label"], plan["optimization"]["gradient_checkpointing"])
    return model


def new_model(model: dict[str, Any], precision: str = "fp32") -> PreTrainedModel:
    """A model with random weights, in fp32; for bf16 with such as bf16 has, which ZeRO-0 alone would not round them to."""
    try:
        config = checked_config(model["config"])
        made = AutoModelForCausalLM.from_config(config, attn_implementation=model["attention"], dtype=torch.float32)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise RecipeError(f"{WHERE}: {' '.join(str(error).split())}; change the config") from error
    if precision == "bf16":
        with torch.no_grad():
            for weight in made.parameters():
                weight.copy_(weight.bfloat16())
    return made


def checked_config(fields: dict[str, Any]) -> PreTrainedConfig:
    """The config that ``fields`` spell.

    Raises RecipeError for a field that the model type has not: Transformers takes it, and it counts for nothing.
    """
    kind = CONFIG_MAPPING[fields["model_type"]]
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map) | OTHER_SPELLINGS
    if unknown := sorted(set(fields) - known):
        raise RecipeError(f"{WHERE}: {fields['model_type']} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return AutoConfig.for_model(**fields)


def whole_new_model(plan: dict[str, Any]) -> str:
    """The folder where rank 0, and on a node whose store is a bucket its first rank, has saved a new model made in one piece.

    Made in pieces its random numbers would be others, and no artifact may depend on the ZeRO stage.
    """
    beside = plan["checkpoint_dir"] if plan["is_spread"] else plan["result_path"]
    folder = str(Path(beside).with_name("initial"))
    if rank() == 0 or (plan["is_arriving"] and local_rank() == 0):
        pieces = deepspeed_settings()
        unset_hf_deepspeed_config()
        made = new_model(plan["model"], plan["optimization"]["precision"])
        made.should_save_on_this_rank = lambda is_main_process: True  # else Transformers has only rank 0 write
        made.save_pretrained(folder)
        set_hf_deepspeed_config(pieces)
    barrier()
    return folder


def deepspeed_settings() -> Any:
    """What Transformers looks at to see that models are built in pieces."""
    found = transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref
    assert found is not None
    return found()


def loaded_model(plan: dict[str, Any], folder: str) -> PreTrainedModel:
    """A model with the weights of a folder."""
    precision = plan["optimization"]["precision"]
    if plan["adapter"] and plan["adapter"]["method"] == "qlora":
        from tasks.training.adapters.quantized import quantization

        quantized = {"quantization_config": quantization(plan["adapter"]["fields"], precision)}
    else:
        quantized = {}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        **quantized,
        attn_implementation=plan["model"]["attention"],
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )


def compile_layers(model: Any) -> None:
    """Let torch compile every layer by itself: the loss, and what DeepSpeed does between layers, stay as they are."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(inner._no_split_modules or ())  # the classes of a model's layers
    for layer in inner.modules():
        if type(layer).__name__ in names:
            layer.forward = torch.compile(layer.forward)
