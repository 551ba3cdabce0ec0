"""What a model starts from: a config, with random weights, or published weights.

Reads   config.json, *.safetensors    of a local folder, or of a Hugging Face repository at one commit
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import orjson
from pydantic import Field, model_validator

from tasks.errors import RecipeError, SourceError
from tasks.machine import Machine
from tasks.store import ArtifactStore, Spec, digest_json, unkeyed

# All that is read of published weights: no pickles, no code.
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")


class ModelSpec(Spec):
    """The model to pretrain: exactly one of ``config`` and ``weights``."""

    config: dict[str, Any] | None = Field(
        None, description="fields of a Transformers config, model_type among them; vocab_size is the tokenizer's where absent"
    )
    weights: str | None = unkeyed(None, description="published weights: a local folder, or a Hugging Face id; keyed by content")
    weights_revision: str = unkeyed("main", description="branch, tag or commit of the Hugging Face id; its commit is keyed")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="implementation of attention")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.config is None) == (self.weights is None):
            both = "both config and weights" if self.config is not None else "neither config nor weights"
            raise ValueError(f"{both}; give exactly one of them")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError(f"config has model_type {self.config.get('model_type')!r}; name one, such as qwen2 or llama")
        return self


def identify_weights(model: ModelSpec, store: ArtifactStore, machine: Machine) -> str | None:
    """What identifies published weights: the digest of a local folder's files, or the commit of a Hugging Face id."""
    if model.weights is None:
        return None
    folder = Path(model.weights).expanduser()
    if folder.is_dir():
        digests = {path.name: store.digests.digest(path) for path in weight_files(folder)}
        return digest_json(digests)
    return hub_commit(model.weights, model.weights_revision, machine)


def weight_files(folder: Path) -> list[Path]:
    """The files that are read of a folder of weights. Raises SourceError where weights or config are missing."""
    found = sorted({path for pattern in WEIGHT_FILES for path in folder.glob(pattern)})
    if not any(path.suffix == ".safetensors" for path in found) or not (folder / "config.json").is_file():
        raise SourceError(f"{folder}: no *.safetensors or no config.json; give a Transformers model folder")
    return found


def hub_commit(name: str, revision: str, machine: Machine) -> str:
    """The commit that a revision of a Hugging Face repository stands for now."""
    from huggingface_hub import HfApi

    with _hub_errors(f"{name}@{revision}"):
        commit = HfApi(endpoint=machine.endpoints.get("huggingface")).model_info(name, revision=revision).sha
    assert commit
    return str(commit)


def fetch_weights(model: ModelSpec, source: str, machine: Machine, scratch: Path, patterns: Sequence[str] = WEIGHT_FILES) -> Path:
    """The folder of the published weights, fetched at commit ``source`` where it is not a local one.

    patterns: of the files that are fetched.
    """
    assert model.weights
    folder = Path(model.weights).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    target = scratch / "weights"
    with _hub_errors(f"{model.weights}@{source[:12]}"):
        snapshot_download(
            model.weights,
            revision=source,
            endpoint=machine.endpoints.get("huggingface"),
            local_dir=target,
            allow_patterns=list(patterns),
        )
    weight_files(target)
    return target


@contextmanager
def _hub_errors(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's HTTP library, and so what that raises, differs between releases
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise SourceError(
            f"{where}: neither a folder here nor to be had from the hub ({reason}); check the name, or run again to go on"
        ) from error


def completed_config(config: dict[str, Any], vocab_size: int, end_of_document_id: int) -> dict[str, Any]:
    """A recipe's config with what the tokenizer decides, where the recipe leaves it open.

    No id is padding: its row of the embedding table would begin as noughts and get no gradient, and every block is full.
    """
    ends = {"bos_token_id": None, "eos_token_id": end_of_document_id, "pad_token_id": None}
    return {"vocab_size": vocab_size, **ends, **config}


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder."""
    try:
        return dict(orjson.loads((folder / "config.json").read_bytes()))
    except (OSError, orjson.JSONDecodeError) as error:
        raise SourceError(f"{folder}/config.json: cannot be read ({error})") from error


def vocab_size_of(config: dict[str, Any], where: str) -> int:
    """The ids that a model knows, by its config. Raises RecipeError for one that has them in a part, as of text and images."""
    if isinstance(size := config.get("vocab_size"), int):
        return size
    parts = sorted(name for name, part in config.items() if isinstance(part, dict) and "vocab_size" in part)
    nested = f" but in {', '.join(parts)}" if parts else ""
    raise RecipeError(
        f"{where}: the config of its base ({config.get('model_type')}) has no vocab_size{nested}; "
        "only models of text alone can be trained: take the language model by itself"
    )


def check_fits(config: dict[str, Any], block_size: int, vocab_size: int, where: str) -> None:
    """Raise RecipeError where rows or ids do not fit the model; what the config leaves open is checked by the worker."""
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if positions is not None and block_size > positions:
        raise RecipeError(
            f"{where}: block_size {block_size} is more than the model's {positions} positions; "
            "lower block_size or raise max_position_embeddings"
        )
    if (size := config.get("vocab_size")) is not None and vocab_size > size:
        raise RecipeError(
            f"{where}: the tokenizer has {vocab_size} ids, the model's vocab_size is {size}; "
            "raise vocab_size or take the model's own tokenizer"
        )
