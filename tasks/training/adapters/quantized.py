"""A base whose linear weights are held in 4 bits, by bitsandbytes."""

from typing import Any

import torch
from transformers import BitsAndBytesConfig


def quantization(fields: dict[str, Any], precision: str) -> BitsAndBytesConfig:
    """How the base is loaded: as method qlora's fields say, computing in ``precision``."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=fields["quantization"],
        bnb_4bit_use_double_quant=fields["double_quantization"],
        bnb_4bit_compute_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )


def keep_packing(model: Any) -> None:
    """Keep 4-bit weights as they were loaded: on CPU bitsandbytes packs them otherwise at the first validation."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
