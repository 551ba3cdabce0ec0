"""DeepSpeed files: the presets, and what a file may not say because the recipe says it.

Reads   deepspeed_configs/*.json, or the user's own
"""

from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

from tasks.errors import SettingsError
from tasks.store import digest_bytes

DEFAULT_PRESET = "zero2"

# What the recipe decides: a file may leave these out, or say "auto".
OWNED_BY_RECIPE = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
}
# What Trainer makes from the recipe; DeepSpeed's own are other functions (its "auto" scheduler is another schedule).
NOT_ALLOWED = {"optimizer": "learning_rate, adam_* and weight_decay", "scheduler": "schedule and warmup_steps"}


def load_deepspeed_config(path: Path | None) -> dict[str, Any]:
    """The DeepSpeed file at ``path`` (None: the default preset), checked, with "auto" wherever the recipe decides.

    Raises SettingsError for a file that cannot be read, or that sets what the recipe sets.
    """
    source = path or preset(DEFAULT_PRESET)
    try:
        config = orjson.loads(source.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise SettingsError(f"{source}: cannot be read as a DeepSpeed file ({error}); give a JSON file") from error
    if not isinstance(config, dict):
        raise SettingsError(f"{source}: holds a {type(config).__name__}; a DeepSpeed file is one JSON object")
    _check(config, source)
    return _completed(config)


def preset(name: str) -> Path:
    """The path of one of the files in deepspeed_configs."""
    return Path(str(resources.files("deepspeed_configs") / f"{name}.json"))


def zero_stage(config: dict[str, Any]) -> int:
    """How far the training state is spread over the ranks, 0 to 3."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def cut_of(config: dict[str, Any]) -> str:
    """What decides, beside their number, which of a model's numbers each rank holds: DeepSpeed's file and its release."""
    return digest_bytes(orjson.dumps([config, version("deepspeed")], option=orjson.OPT_SORT_KEYS))


def _check(config: dict[str, Any], source: Path) -> None:
    found = [
        f"{name} = {value} (the recipe's {owner})"
        for name, owner in OWNED_BY_RECIPE.items()
        if (value := _value(config, name)) not in (None, "auto") and not (name == "fp16.enabled" and value is False)
    ]
    found += [f"{name} (the recipe's {owner})" for name, owner in NOT_ALLOWED.items() if name in config]
    if found:
        raise SettingsError(f'{source}: sets {", ".join(found)}; remove it, or say "auto"')
    _check_offload(config, source)
    gather = _value(config, "zero_optimization.stage3_gather_16bit_weights_on_model_save")
    if zero_stage(config) == 3 and gather is not True:
        raise SettingsError(
            f"{source}: zero_optimization.stage3_gather_16bit_weights_on_model_save is {gather}; "
            "set it to true, or the saved weights are empty"
        )


def _check_offload(config: dict[str, Any], source: Path) -> None:
    for name in ("offload_optimizer", "offload_param"):
        if (device := _value(config, f"zero_optimization.{name}.device")) == "nvme":
            raise SettingsError(
                f'{source}: zero_optimization.{name}.device is {device}; set it to "cpu": checkpoints are read out of memory'
            )


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {**config, **dict.fromkeys(auto, "auto"), "bf16": {**config.get("bf16", {}), "enabled": "auto"}}


def _value(config: dict[str, Any], name: str) -> Any:
    node: Any = config
    for part in name.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
