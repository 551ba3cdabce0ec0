"""A model as it was published: nothing is trained, all that is needed to adapt it, ask it and measure it lies in the store.

Reads   source      a model folder, a GGUF file, a Hugging Face id, or a Python package that ships a GGUF file
Writes  config.json, generation_config.json, *.safetensors, the tokenizer's files, chat_template.jinja
"""

import math
import shutil
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import Field

from tasks.errors import SourceError
from tasks.machine import Machine
from tasks.store import ArtifactStore, Built, Spec, Work, digest_json, stage, unkeyed
from tasks.training.launch import run_worker
from tasks.training.model import WEIGHT_FILES, ModelSpec, fetch_weights, hub_commit, read_config, weight_files

UNPACK = "tasks.training.unpack"
TOKENIZER_JSON = "tokenizer.json"
# Fast tokenizers alone, as everywhere here: what tokenizer.json repeats stays behind.
TOKENIZER_FILES = (
    TOKENIZER_JSON, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
PACKAGE = "package:"
# Of a GGUF file's tensors, which have 4 to 8 bits: bfloat16 keeps as many.
GGUF_DTYPE = "bfloat16"


class PublishedSpec(Spec):
    """Which published model."""

    weights: str = unkeyed(
        description="a model folder, a .gguf file, a Hugging Face id, or package:NAME of a Python package that ships a .gguf "
        "file; keyed by content"
    )
    weights_revision: str = unkeyed("main", description="branch, tag or commit of the Hugging Face id; its commit is keyed")
    number_format: Literal["bfloat16", "float32"] | None = Field(
        None, description="of a GGUF file's weights once unpacked; absent: bfloat16"
    )


def identify_published(spec: PublishedSpec, store: ArtifactStore, machine: Machine) -> str:
    """The digest of a GGUF file or of a folder's files, or the commit of a Hugging Face id."""
    if file := gguf_file(spec.weights):
        return store.digests.digest(file)
    folder = Path(spec.weights).expanduser()
    if folder.is_dir():
        return digest_json({path.name: store.digests.digest(path) for path in model_files(folder)})
    return hub_commit(spec.weights, spec.weights_revision, machine)


@stage("published", revision=2, identify_source=identify_published)
def build_published(work: Work, spec: PublishedSpec) -> Built:
    """Copy, fetch or unpack the model into a plain Hugging Face folder."""
    if file := gguf_file(spec.weights):
        unpack(work, file, spec.number_format or GGUF_DTYPE)
    else:
        assert work.source
        model = ModelSpec(weights=spec.weights, weights_revision=spec.weights_revision)
        folder = fetch_weights(model, work.source, work.machine, work.scratch, (*WEIGHT_FILES, *TOKENIZER_FILES))
        for path in model_files(folder):
            shutil.copyfile(path, work.folder / path.name)
    config = read_config(work.folder)
    complete_generation_config(work.folder, config)
    return Built(stats={"num_parameters": num_parameters(work.folder), "vocab_size": config.get("vocab_size")})


def gguf_file(weights: str) -> Path | None:
    """The GGUF file that ``weights`` means; None where it means a folder or a hub's name. Raises SourceError."""
    if weights.startswith(PACKAGE):
        return shipped_file(weights.removeprefix(PACKAGE))
    path = Path(weights).expanduser()
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise SourceError(f"{path}: no such file; name a .gguf file that is here")
    return path


def shipped_file(package: str) -> Path:
    """The one .gguf file of an installed Python package, which is not imported."""
    try:
        found = [file for file in files(package) or () if file.suffix == ".gguf"]
    except PackageNotFoundError:
        raise SourceError(f"{PACKAGE}{package}: no such package is installed here; install it with pip") from None
    if len(found) != 1:
        raise SourceError(f"{PACKAGE}{package}: {len(found)} .gguf files in the package; name one file by its path")
    return Path(str(found[0].locate()))


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that are read, its tokenizer's among them. Raises SourceError where one is missing."""
    if not (folder / TOKENIZER_JSON).is_file():
        raise SourceError(f"{folder}: no {TOKENIZER_JSON}; only fast tokenizers can be used: save one into it with transformers")
    return [*weight_files(folder), *(path for name in TOKENIZER_FILES if (path := folder / name).is_file())]


def unpack(work: Work, file: Path, dtype: str) -> None:
    """Unpack a GGUF file into the artifact's folder, in a process of its own: it imports torch."""
    plan = work.scratch / "unpack.json"
    plan.write_bytes(orjson.dumps({"file": str(file), "output_dir": str(work.folder), "dtype": dtype}))
    run_worker(UNPACK, plan, num_ranks=1, settings=work.machine.training, label="published (GGUF)")


def complete_generation_config(folder: Path, config: dict[str, Any]) -> None:
    """Let generation_config.json say where a text ends: by the config, where the publisher left the file out, or the ids in it.

    A file that says so already stays as it is.
    """
    path = folder / "generation_config.json"
    told = orjson.loads(path.read_bytes()) if path.is_file() else {"pad_token_id": config.get("pad_token_id")}
    ends = told.get("eos_token_id")
    listed = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
    if listed and listed in (ends, [ends]):
        return
    told["eos_token_id"] = listed or config.get("eos_token_id")
    path.write_bytes(orjson.dumps({name: value for name, value in sorted(told.items()) if value is not None}))


def num_parameters(folder: Path) -> int:
    """The numbers in a folder's *.safetensors, as their headers tell."""
    return sum(math.prod(tensor["shape"]) for path in folder.glob("*.safetensors") for tensor in _tensors(path))


def _tensors(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as file:
        header = orjson.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [tensor for name, tensor in header.items() if name != "__metadata__"]
