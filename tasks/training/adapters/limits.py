"""Where a method cannot work, known before a rank starts."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from tasks.errors import RecipeError, SettingsError

VIRTUAL = ("prefix", "p_tuning", "prompt")  # methods of virtual tokens
UNSPREAD = (*VIRTUAL, "qlora")  # do not train under ZeRO-3, which spreads weights


def check_zero_stage(method: str, fields: Any, stage: int) -> None:
    """Raise SettingsError where the method does not train under the ZeRO stage, or not without a package that is missing."""
    way_out = "give --deepspeed zero2, whose ranks spread all but the weights"
    if stage == 3 and method in VIRTUAL:
        raise SettingsError(
            f"adapter.method {method}: does not train under ZeRO-3: PEFT computes and saves virtual tokens on single ranks, from "
            f"weights that ZeRO-3 spreads over all of them; {way_out}"
        )
    if stage == 3 and method == "qlora":
        raise SettingsError(f"adapter.method qlora: does not train under ZeRO-3, which cannot spread 4-bit weights; {way_out}")
    if method == "qlora" and find_spec("bitsandbytes") is None:
        raise SettingsError(
            "adapter.method qlora: the package bitsandbytes, which holds weights in 4 bits, is not installed; "
            "install seqmill[qlora], or set adapter.method to lora"
        )


def check_room(config: Mapping[str, Any], block_size: int, num_virtual_tokens: int, where: str) -> None:
    """Raise RecipeError where virtual tokens and an example that fills its block do not both fit the model's positions."""
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if num_virtual_tokens and positions is not None and block_size + num_virtual_tokens > positions:
        raise RecipeError(
            f"{where}: {num_virtual_tokens} virtual tokens and examples of up to {block_size} are more than the model's "
            f"{positions} positions; lower num_virtual_tokens or examples.block_size"
        )
