import json
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import SettingsError
from tasks.training.deepspeed import load_deepspeed_config, preset, zero_stage


def written(tmp_path: Path, config: Any) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("name", "stage"),
    [("zero0", 0), ("zero1", 1), ("zero2", 2), ("zero2_offload", 2), ("zero3", 3), ("zero3_offload", 3)],
)
def test_every_preset_is_accepted(name: str, stage: int) -> None:
    assert zero_stage(load_deepspeed_config(preset(name))) == stage


def test_without_a_file_the_preset_is_zero2() -> None:
    assert load_deepspeed_config(None) == load_deepspeed_config(preset("zero2"))


def test_what_the_recipe_decides_may_be_left_out_or_auto(tmp_path: Path) -> None:
    config = load_deepspeed_config(written(tmp_path, {"gradient_clipping": "auto", "fp16": {"enabled": False}}))
    assert config["train_micro_batch_size_per_gpu"] == "auto"
    assert config["bf16"] == {"enabled": "auto"}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"train_batch_size": 32}, "train_batch_size = 32 \\(the recipe's global_batch_size\\)"),
        ({"gradient_clipping": 1.0}, "gradient_clipping = 1.0 \\(the recipe's max_grad_norm\\)"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = True \\(the recipe's precision\\)"),
        ({"fp16": {"enabled": True}}, "fp16.enabled = True"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer \\(the recipe's learning_rate, adam_\\* and weight_decay\\)"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler \\(the recipe's schedule and warmup_steps\\)"),
        ({"train_batch_size": 8, "scheduler": {}}, "train_batch_size = 8 .*, scheduler .*; remove it"),
    ],
)
def test_what_the_recipe_decides_may_not_be_set(tmp_path: Path, config: Any, named: str) -> None:
    with pytest.raises(SettingsError, match=f"ds.json: sets {named}"):
        load_deepspeed_config(written(tmp_path, config))


def test_zero3_that_would_save_empty_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"stage3_gather_16bit_weights_on_model_save is None; set it to true"):
        load_deepspeed_config(written(tmp_path, {"zero_optimization": {"stage": 3}}))


def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds a list"):
        load_deepspeed_config(written(tmp_path, []))
    with pytest.raises(SettingsError, match="cannot be read as a DeepSpeed file"):
        load_deepspeed_config(tmp_path / "absent.json")


def test_state_on_a_disk_of_deepspeeds_is_refused(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}
    with pytest.raises(SettingsError, match=r'offload_optimizer\.device is nvme; set it to "cpu"'):
        load_deepspeed_config(written(tmp_path, config))
