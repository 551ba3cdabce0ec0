"""Examples on a frozen base to an adapter.

Reads   base        pretrained | finetuned: a Hugging Face model folder with its tokenizer
        examples    EXAMPLES, train and validation, and the chat template that made them
Writes  adapter_config.json, adapter_model.safetensors, the tokenizer's files, chat_template.jinja
        merged/     config.json, generation_config.json, model.safetensors and the same files, on request
"""

from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import Field

from tasks.store import Artifact, Built, Spec, Work, stage, unkeyed
from tasks.training.finetuned import base_model, copy_tokenizer, example_rows
from tasks.training.launch import run_worker
from tasks.training.model import read_config
from tasks.training.optimization import OptimizationSpec
from tasks.training.run import train

MERGE = "tasks.training.merge"


class LoraSpec(Spec):
    """Low-rank products added to weights (arXiv:2106.09685)."""

    rank: int = Field(8, ge=1, description="rank of the products")
    alpha: float = Field(32, gt=0, description="scale: a product counts alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of a product's inputs dropped in training")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "v_proj"), min_length=1, description="names of nn.Linear and nn.Embedding modules, such as embed_tokens"
    )
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead (arXiv:2312.03732)")


class AdapterSpec(OptimizationSpec):
    """How the adapter is trained."""

    base: Literal["pretrained", "finetuned"] = unkeyed("finetuned", description="the model that is adapted; keyed by content")
    method: Literal["lora"] = Field("lora", description="what is added to the base")
    lora: LoraSpec = Field(default_factory=LoraSpec, description="for method lora")
    merge: bool = Field(False, description="write the base with the adapter merged in, too")


@stage("adapter", revision=1)
def build_adapter(work: Work, spec: AdapterSpec, base: Artifact, examples: Artifact) -> Built:
    """Train an adapter on examples; the base stays as it is, to the bit."""
    lora = {**spec.lora.model_dump(mode="json"), "base_ref": base.ref}
    outcome = train(work, spec, "adapter", example_rows(base, examples), base_model(base, examples, "adapter", lora))
    copy_tokenizer(base, examples, work.folder)
    if spec.merge:
        merge_adapter(work, base, examples)
    return outcome.built(num_trainable_parameters=outcome.num_trainable_parameters, base_content=base.content)


def merge_adapter(work: Work, base: Artifact, examples: Artifact) -> None:
    """Write the merged model into merged/."""
    target = work.folder / "merged"
    target.mkdir(exist_ok=True)
    plan: dict[str, Any] = {
        "base_dir": str(base.path),
        "adapter_dir": str(work.folder),
        "output_dir": str(target),
        "dtype": number_format(base.path),
    }
    path = work.scratch / "merge.json"
    path.write_bytes(orjson.dumps(plan))
    run_worker(MERGE, path, num_ranks=1, settings=work.machine.training, label="adapter (merge)")
    copy_tokenizer(base, examples, target)


def number_format(folder: Path) -> str:
    """The number format of a model folder's weights, as its config says."""
    config = read_config(folder)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")
