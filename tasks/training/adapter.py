"""Examples on a frozen base to an adapter.

Reads   base        pretrained | finetuned: a Hugging Face model folder with its tokenizer
        examples    EXAMPLES, train and validation, and the chat template that made them
Writes  adapter_config.json, adapter_model.safetensors, the tokenizer's files, chat_template.jinja
        merged/     config.json, generation_config.json, model.safetensors and the same files, on request
        method full writes a model folder instead: config.json, generation_config.json, model.safetensors and the same files
"""

from pathlib import Path
from typing import Any, Literal, Self

import orjson
from pydantic import Field, model_validator

from tasks.errors import RecipeError
from tasks.machine import TrainingSettings
from tasks.store import Artifact, Built, Spec, Work, stage, unkeyed
from tasks.training.adapters.limits import check_room, check_zero_stage
from tasks.training.adapters.specs import (
    BottleneckSpec,
    Ia3Spec,
    LoraSpec,
    PrefixSpec,
    PromptSpec,
    PTuningSpec,
    QloraSpec,
)
from tasks.training.deepspeed import load_deepspeed_config, zero_stage
from tasks.training.finetuned import base_model, check_tokenizer, copy_tokenizer, example_rows
from tasks.training.launch import run_worker
from tasks.training.model import read_config
from tasks.training.optimization import OptimizationSpec
from tasks.training.run import train

MERGE = "tasks.training.merge"
MERGEABLE = ("lora", "ia3")  # a bottleneck is no linear map, virtual tokens are no weights, 4-bit weights take no sum

Method = Literal["lora", "qlora", "bottleneck", "prefix", "p_tuning", "prompt", "ia3", "full"]
SECTIONS: dict[str, type[Spec]] = {
    "lora": LoraSpec,
    "qlora": QloraSpec,
    "bottleneck": BottleneckSpec,
    "prefix": PrefixSpec,
    "p_tuning": PTuningSpec,
    "prompt": PromptSpec,
    "ia3": Ia3Spec,
}


def _section(method: str) -> Any:
    """The fields of one method: at their defaults where it is the chosen one, else absent."""
    make = SECTIONS[method]
    return Field(
        default_factory=lambda given: make() if given.get("method") == method else None, description=f"for method {method}"
    )


class AdapterSpec(OptimizationSpec):
    """How the adapter is trained."""

    base: Literal["published", "pretrained", "finetuned"] = unkeyed(
        "finetuned", description="the model that is adapted; keyed by content"
    )
    method: Method = Field("lora", description="what is added to the base; full: nothing, every weight of it is trained")
    lora: LoraSpec | None = _section("lora")
    qlora: QloraSpec | None = _section("qlora")
    bottleneck: BottleneckSpec | None = _section("bottleneck")
    prefix: PrefixSpec | None = _section("prefix")
    p_tuning: PTuningSpec | None = _section("p_tuning")
    prompt: PromptSpec | None = _section("prompt")
    ia3: Ia3Spec | None = _section("ia3")
    merge: bool = Field(False, description="write the base with the adapter merged in, too; of methods lora and ia3")

    @property
    def fields(self) -> Any:
        """The chosen method's own section; None for method full, which has none."""
        return getattr(self, self.method, None) if self.method in SECTIONS else None

    @property
    def num_virtual_tokens(self) -> int:
        """How many of the model's positions the adapter takes."""
        return getattr(self.fields, "num_virtual_tokens", 0)

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        for name in SECTIONS:
            if name != self.method and getattr(self, name) is not None:
                raise ValueError(f"{name} is given, the method is {self.method}; leave {name} out, or set method to {name}")
        if self.method in SECTIONS and self.fields is None:
            raise ValueError(f"{self.method} is null, and is the method; leave it out for its defaults, or give its fields")
        if self.merge and self.method not in MERGEABLE:
            raise ValueError(f"merge is true, the method is {self.method}; only {' and '.join(MERGEABLE)} can be merged")
        if self.method == "prefix" and self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing is true, the method is prefix, whose keys and values a second forward does not see; "
                "set it to false, or method to p_tuning"
            )
        return self


@stage("adapter", revision=1)
def build_adapter(work: Work, spec: AdapterSpec, base: Artifact, examples: Artifact) -> Built:
    """Train an adapter on examples; the base stays as it is, to the bit."""
    check_machine(spec, work.machine.training)
    check_tokenizer(work.store, base, examples, "adapter")
    check_room(read_config(base.path), examples.stats["block_size"], spec.num_virtual_tokens, f"adapter.{spec.method}")
    start = base_model(base, examples, "adapter", adapter_plan(spec, base))
    outcome = train(work, spec, "adapter", example_rows(base, examples), start)
    copy_tokenizer(base, examples, work.folder)
    if spec.merge:
        merge_adapter(work, base, examples)
    virtual = {"num_virtual_tokens": spec.num_virtual_tokens} if spec.num_virtual_tokens else {}
    return outcome.built(num_trainable_parameters=outcome.num_trainable_parameters, base_content=base.content, **virtual)


def adapter_plan(spec: AdapterSpec, base: Artifact) -> dict[str, Any] | None:
    """What the worker is told to add; None for method full."""
    if spec.method == "full":
        return None
    return {
        "method": spec.method,
        "fields": method_fields(spec.fields),
        "num_virtual_tokens": spec.num_virtual_tokens,
        "base_dir": str(base.path),
        "base_ref": base.ref,
    }


def method_fields(section: Spec) -> dict[str, Any]:
    """A method's fields as the worker takes them."""
    fields = section.model_dump(mode="json")
    return {**fields, "target_modules": list(section.target_modules)} if isinstance(section, BottleneckSpec) else fields


def check_machine(spec: AdapterSpec, settings: TrainingSettings) -> None:
    """Raise SettingsError where this machine, as it is set, cannot train the method."""
    check_zero_stage(spec.method, spec.fields, zero_stage(load_deepspeed_config(settings.deepspeed_config)))


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


def adapted_folders(base: Artifact, adapter: Artifact) -> tuple[Path, Path | None]:
    """The model folder and the PEFT folder that make up an adapted model; no PEFT folder where every weight was trained.

    Raises RecipeError where the adapter was trained on another base.
    """
    check_base(base, adapter)
    return (base.path, adapter.path) if adapter.has_file("adapter_config.json") else (adapter.path, None)


def check_base(base: Artifact, adapter: Artifact) -> None:
    """Raise RecipeError where the adapter was trained on another base: its numbers would mean nothing there."""
    trained_on = adapter.stats.get("base_content")
    if trained_on is not None and trained_on != base.content:
        raise RecipeError(
            f"{adapter.short}: trained on a base of content {trained_on[:12]}, {base.short} has {base.content[:12]}; "
            "give the base that it was trained on, or train it anew"
        )


def number_format(folder: Path) -> str:
    """The number format of a model folder's weights, as its config says."""
    config = read_config(folder)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")
