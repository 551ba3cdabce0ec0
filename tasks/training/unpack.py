"""The unpacking process: a GGUF file to a model folder; `python -m tasks.training.unpack PLAN.json`.

Reads   a GGUF file: weights, config, tokenizer and chat template in one
Writes  config.json, generation_config.json, model.safetensors, the tokenizer's files
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.errors import SourceError
from tasks.training.rank import run_rank

# What speaks of the packed file that the folder no longer is.
OF_THE_FILE = ("quantization_config", "_name_or_path", "_model_name_or_path")


def unpack(plan: dict[str, Any]) -> None:
    """Load the file and save it as a folder."""
    file, target, dtype = Path(plan["file"]), Path(plan["output_dir"]), getattr(torch, plan["dtype"])
    if importlib.util.find_spec("gguf") is None:
        raise SourceError(f"{file}: reading GGUF takes the package gguf; install seqmill[smollm2]")
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        packed = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{file}: cannot be read as GGUF ({' '.join(str(error).split())}); get the file again") from error
    plain(packed, dtype).save_pretrained(target)
    tokenizer.save_pretrained(target)


def plain(packed: Any, dtype: torch.dtype) -> Any:
    """The same model without its packing: what counts as quantized cannot be saved, nor trained by DeepSpeed."""
    config = packed.config
    for name in OF_THE_FILE:
        if hasattr(config, name):
            delattr(config, name)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    return model


if __name__ == "__main__":
    run_rank(unpack)
