"""A model's card, README.md of its folder: how to use it, how it was trained, what it was measured at, where it comes from.

Reads   the manifests of the model and of all that it was made from; those of its evaluations
"""

import json
from collections.abc import Iterator
from typing import Any

from tasks.store import Artifact, ArtifactStore

# Of a spec, what a reader of the card asks first.
TOLD_FIELDS = (
    "method", "global_batch_size", "num_steps", "num_epochs", "learning_rate", "schedule", "warmup_steps", "weight_decay",
    "precision", "seed",
)  # fmt: skip
FIGURES = {
    "validation_loss": "validation loss, nats a token",
    "validation_bits_per_byte": "validation, bits per byte",
    "examples_loss": "answers of validation examples, nats a token",
    "held_out_loss": "answers of held-out conversations, nats a token",
    "held_out_accuracy": "held-out conversations answered exactly",
    "label_accuracy": "held-out conversations whose label is the likeliest",
    "majority_share": "the same by always giving the commonest answer",
}


def model_card(store: ArtifactStore, model: Artifact, merged: bool, is_read_alike: bool = True) -> str:
    """The card as Markdown, with the fields that the Hugging Face hub reads in front.

    is_read_alike: Transformers, unless told, reads the folder's tokenizer as training did.
    """
    lines = list(ancestors(store, model))
    sections = [
        front_matter(model, merged),
        f"# {title(model, merged)}",
        use(model, merged, is_read_alike),
        table("Training", ("field", "value"), training(model)),
        table("Evaluation", ("figure", "value"), evaluation(store, model)),
        table("Lineage", ("stage", "key", "content", "made from"), lineage(lines)),
        "A key is the digest of what decided an artifact, a content that of its files; both are SHA-256.",
        f"Made by seqmill with {packages(model)}.",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def front_matter(model: Artifact, merged: bool) -> str:
    """YAML between two lines of dashes."""
    is_adapter = model.has_file("adapter_config.json") and not merged
    library = "peft" if is_adapter else "transformers"
    return f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n- seqmill\n---"


def title(model: Artifact, merged: bool) -> str:
    """What it is, in a line."""
    name = f"{model.kind} model" if model.kind != "adapter" else "adapted model" if merged else "adapter"
    return f"{name[0].upper()}{name[1:]} {model.key[:12]}"


def use(model: Artifact, merged: bool, is_read_alike: bool = True) -> str:
    """Code that loads the folder."""
    if model.has_file("adapter_config.json") and not merged:
        # PEFT has no such method, and knows it from then on.
        first = "import tasks.training.adapters.bottleneck\n" if model.spec.get("method") == "bottleneck" else ""
        return (
            f"```python\n{first}from peft import AutoPeftModelForCausalLM\n\n"
            'model = AutoPeftModelForCausalLM.from_pretrained("this folder")\n```\n\n'
            "The base is named in adapter_config.json; the adapter means nothing on another."
        )
    asked = '[{"role": "user", "content": "..."}]' if has_chat_template(model) else '"..."'
    call = 'ask = pipeline("text-generation", "this folder"'
    if is_read_alike:
        return f"```python\nfrom transformers import pipeline\n\n{call})\nask({asked})\n```"
    return (
        "```python\nfrom transformers import PreTrainedTokenizerFast, pipeline\n\n"
        'tokenizer = PreTrainedTokenizerFast.from_pretrained("this folder")\n'
        f"{call}, tokenizer=tokenizer)\nask({asked})\n```\n\n"
        "Not with AutoTokenizer, nor with a server that takes it: of this type of model it has rules of its own, by which text "
        "becomes other ids than the model was trained on."
    )


def has_chat_template(model: Artifact) -> bool:
    """Whether the folder's tokenizer can put turns into a text."""
    if model.has_file("chat_template.jinja"):
        return True
    return model.has_file("tokenizer_config.json") and bool(
        json.loads(model.file("tokenizer_config.json").read_bytes()).get("chat_template")
    )


def training(model: Artifact) -> list[tuple[str, str]]:
    """The fields of the spec that are told, and the counts of the run."""
    told = {name: model.spec[name] for name in TOLD_FIELDS if model.spec.get(name) is not None}
    counts = {name: value for name, value in model.stats.items() if name.startswith("num_") or name.endswith("_loss")}
    return [(name, _text(value)) for name, value in {**told, **counts}.items() if value is not None]


def evaluation(store: ArtifactStore, model: Artifact) -> list[tuple[str, str]]:
    """The figures of the newest evaluation of the model that the store has."""
    role = "adapter" if model.kind == "adapter" else "model"
    of_model = [
        found
        for found in store.artifacts("evaluation")
        if found.manifest.identity["inputs"].get(role) == model.content
        and (role == "adapter" or "adapter" not in found.manifest.identity["inputs"])
    ]
    if not of_model:
        return []
    stats = of_model[-1].stats
    figures = [(told, _text(stats[name])) for name, told in FIGURES.items() if stats.get(name) is not None]
    return [*figures, *((name, _text(value)) for name, value in stats.get("harness", {}).items())]


def ancestors(store: ArtifactStore, model: Artifact) -> Iterator[Artifact]:
    """The model and all that it was made from that the store still has, each once, nearest first."""
    waiting, seen = [model], {model.ref}
    while waiting:
        artifact = waiting.pop(0)
        yield artifact
        for ref in artifact.manifest.produced_by.get("inputs", {}).values():
            kind, _, key = ref.partition("/")
            if ref not in seen and (found := store.load(kind, key)):
                waiting.append(found)
            seen.add(ref)


def lineage(artifacts: list[Artifact]) -> list[tuple[str, ...]]:
    """A row an artifact, back to the archives; what comes from outside the store is told by its digest and address."""
    rows: list[tuple[str, ...]] = []
    for artifact in artifacts:
        inputs = artifact.manifest.produced_by.get("inputs", {})
        parts = [f"{name} {ref.partition('/')[2][:12]}" for name, ref in inputs.items()]
        source = artifact.manifest.identity["inputs"].get("source")
        if source:
            unkeyed = artifact.manifest.produced_by.get("unkeyed", {})
            where = next((unkeyed[name] for name in ("url", "weights", "source") if name in unkeyed), "")
            parts.append(" ".join(filter(None, ["source", str(source)[:12], str(where)])))
        rows.append((artifact.kind, artifact.key[:12], artifact.content[:12], ", ".join(parts) or "–"))
    return rows


def packages(model: Artifact) -> str:
    """The versions that made the model."""
    versions: dict[str, str] = model.manifest.produced_by.get("packages", {})
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "versions are not recorded"


def table(name: str, columns: tuple[str, ...], rows: list[Any]) -> str:
    """A section with a table; nothing where it has no row."""
    if not rows:
        return ""
    lines = [columns, ("---",) * len(columns), *rows]
    return f"## {name}\n\n" + "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')
