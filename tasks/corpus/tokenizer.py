"""The tokenizer: a published one, copied, or byte-level BPE trained on the documents.

Reads   documents-shard  documents.parquet      DOCUMENTS: text (the train split, when one is trained)
        published        a model's folder, where the tokenizer is that model's own
        source           a folder, or a model on the Hugging Face hub
Writes  tokenizer        tokenizer.json         and, where it has them, the other TOKENIZER_FILES
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import Field, model_validator

from tasks.corpus.bpe import MIN_VOCAB_SIZE, TokenizerTrainingSpec, train
from tasks.errors import CorpusError, SourceError
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Built, Spec, Work, digest_file, digest_json, stage, unkeyed

__all__ = ["MIN_VOCAB_SIZE", "TokenizerSpec", "TokenizerTrainingSpec", "Vocabulary", "build_tokenizer", "read_vocabulary"]

TOKENIZER_JSON = "tokenizer.json"
# All that makes a fast tokenizer; a folder's weights, and vocab.json and merges.txt, which tokenizer.json repeats, stay behind.
TOKENIZER_FILES = (
    TOKENIZER_JSON, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip

DEFAULT_ENDPOINT = "https://huggingface.co"
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


class TokenizerSpec(Spec):
    """Which tokenizer: exactly one of ``source``, ``train`` and ``of_published``."""

    source: str | None = unkeyed(None, description="a folder, or a model's name on the hub, that holds a tokenizer.json")
    revision: str | None = unkeyed(
        None, description="the hub's branch, tag or commit; with a commit of 40 digits nothing is asked of the hub twice"
    )
    train: TokenizerTrainingSpec | None = Field(None, description="train a tokenizer on the documents so")
    of_published: Literal[True] | None = Field(None, description="true: the one that lies with the recipe's published model")

    @model_validator(mode="after")
    def _one_origin(self) -> "TokenizerSpec":
        if sum(origin is not None for origin in (self.source, self.train, self.of_published)) != 1:
            raise ValueError("a tokenizer comes from `source`, from `train` or with a published model: set exactly one of them")
        if self.revision is not None and self.source is None:
            raise ValueError("`revision` names a commit of `source`, which is not set: leave it out")
        return self


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer.json. ids: of every token, added ones among them. special: the names of its special tokens."""

    ids: dict[str, int]
    special: tuple[str, ...]

    @property
    def size(self) -> int:
        """Ids run from 0 to size - 1."""
        return max(self.ids.values()) + 1


def read_vocabulary(path: Path) -> Vocabulary:
    """Read the tokens of a tokenizer.json without loading a tokenizer."""
    try:
        tokenizer = orjson.loads(path.read_bytes())
        added = {token["content"]: int(token["id"]) for token in tokenizer.get("added_tokens", [])}
        vocab = tokenizer["model"]["vocab"]
        # A unigram model lists [token, score] pairs in the order of their ids.
        ids = dict(vocab) if isinstance(vocab, dict) else {token: number for number, (token, _) in enumerate(vocab)}
        special = tuple(token["content"] for token in tokenizer.get("added_tokens", []) if token.get("special"))
        if not ids | added:
            raise ValueError("it has no token")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{path}: not a tokenizer.json ({type(error).__name__}: {error}); name another tokenizer") from error
    return Vocabulary(ids | added, special)


def identify_tokenizer(spec: TokenizerSpec, store: ArtifactStore, machine: Machine) -> str | None:
    """What a published tokenizer's bytes are: the digest of a folder's tokenizer files, or the hub's commit."""
    if spec.source is None:
        return None
    if folder := _folder(spec.source):
        return digest_json({path.name: digest_file(path) for path in _files_in(folder)})
    if spec.revision and COMMIT.fullmatch(spec.revision):
        return spec.revision
    return str(_ask_hub(spec, machine, spec.revision).sha)


@stage("tokenizer", revision=1, identify_source=identify_tokenizer)
def build_tokenizer(
    work: Work, spec: TokenizerSpec, documents: Artifact | None = None, published: Artifact | None = None
) -> Built:
    """Copy the published tokenizer, or train one on ``documents``."""
    if spec.train is not None:
        assert documents is not None, "training a tokenizer takes documents"
        train(work, spec.train, documents)
    elif spec.of_published:
        assert published is not None, "a published model's tokenizer takes published"
        for path in _files_in(published.path):
            shutil.copyfile(path, work.folder / path.name)
    elif folder := _folder(str(spec.source)):
        for path in _files_in(folder):
            shutil.copyfile(path, work.folder / path.name)
    else:
        _fetch(work, spec)
    vocabulary = read_vocabulary(work.folder / TOKENIZER_JSON)
    special = {token: vocabulary.ids[token] for token in vocabulary.special}
    return Built(stats={"vocab_size": vocabulary.size, "special_tokens": special})


def _folder(source: str) -> Path | None:
    """The folder that ``source`` names; None where it is a hub's name. Raises SourceError where it is neither."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(source):
        raise SourceError(f"{source}: no such folder, nor a hub's name (owner/model); set tokenizer.source to one of these")
    return None


def _files_in(folder: Path) -> list[Path]:
    if not (folder / TOKENIZER_JSON).is_file():
        raise SourceError(_without_json(str(folder), [path.name for path in folder.iterdir()]))
    return [path for name in TOKENIZER_FILES if (path := folder / name).is_file()]


def _without_json(where: str, names: list[str]) -> str:
    found = ", ".join(sorted(names)[:8]) or "nothing"
    return f"{where}: no {TOKENIZER_JSON} (it has {found}); only fast tokenizers can be used: save one with transformers"


def _ask_hub(spec: TokenizerSpec, machine: Machine, revision: str | None) -> Any:
    """What the hub knows of the model: its commit (sha) and its files (siblings)."""
    from huggingface_hub import HfApi

    endpoint = machine.endpoints.get("huggingface", DEFAULT_ENDPOINT)
    with _hub_errors(spec, endpoint):
        return HfApi(endpoint=endpoint).model_info(str(spec.source), revision=revision)


def _fetch(work: Work, spec: TokenizerSpec) -> None:
    """Download the tokenizer files of the identified commit into the artifact's folder."""
    from huggingface_hub import hf_hub_download

    endpoint = work.machine.endpoints.get("huggingface", DEFAULT_ENDPOINT)
    names = [sibling.rfilename for sibling in _ask_hub(spec, work.machine, work.source).siblings or ()]
    if TOKENIZER_JSON not in names:
        raise SourceError(_without_json(f"{endpoint}/{spec.source}", names))
    for name in (name for name in TOKENIZER_FILES if name in names):
        with _hub_errors(spec, endpoint):
            fetched = hf_hub_download(
                str(spec.source), name, revision=work.source, endpoint=endpoint, local_dir=work.scratch / "hub"
            )
        shutil.copyfile(fetched, work.folder / name)


@contextmanager
def _hub_errors(spec: TokenizerSpec, endpoint: str) -> Iterator[None]:
    """Turns what the hub's client raises into a SourceError."""
    from huggingface_hub import errors

    where = f"{endpoint}/{spec.source}" + (f" at {spec.revision}" if spec.revision else "")
    try:
        yield
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise SourceError(
            f"{where}: the hub has no such model, revision or file; check tokenizer.source and tokenizer.revision"
        ) from error
    except Exception as error:  # its HTTP library, and so what that raises, differs between releases
        raise SourceError(
            f"{where}: cannot be fetched ({type(error).__name__}: {_first_line(error)}); try again, set the hub's endpoint, "
            "or name a folder that holds the tokenizer"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
