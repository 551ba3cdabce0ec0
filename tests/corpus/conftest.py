"""A store, and small artifacts to build on, for the tests of the corpus stages."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tasks.corpus.documents import DocumentsSpec, build_documents
from tasks.corpus.tokenizer import TokenizerSpec, build_tokenizer
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Built, Spec, Work, digest_bytes, stage

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class BytesSpec(Spec):
    digest: str


def store_archive(store: ArtifactStore, data: bytes) -> Artifact:
    """An archive artifact of these bytes, as the archive stage leaves it."""

    @stage("archive", revision=1)
    def build_archive(work: Work, spec: BytesSpec) -> Built:
        (work.folder / "archive").write_bytes(data)
        return Built()

    return build_archive(store, Machine(), BytesSpec(digest=digest_bytes(data)))


def json_lines(texts: Sequence[str]) -> bytes:
    return b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


@pytest.fixture
def archive_of(store: ArtifactStore) -> Callable[[bytes], Artifact]:
    return lambda data: store_archive(store, data)


@pytest.fixture
def documents_of(store: ArtifactStore) -> Callable[..., Artifact]:
    """Documents of these texts; all of them in the train split unless validation_fraction says otherwise."""

    def make(texts: Sequence[str], **fields: Any) -> Artifact:
        spec = DocumentsSpec(**{"validation_fraction": 0.0, **fields})
        return build_documents(store, Machine(), spec, archive=store_archive(store, json_lines(texts)))

    return make


@pytest.fixture(scope="session")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer whose tokens are the 256 bytes (id = rank of its letter) and the special tokens 256 to 258."""
    folder = tmp_path_factory.mktemp("bytes-tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def tokenizer(store: ArtifactStore, bytes_tokenizer: Path) -> Artifact:
    return build_tokenizer(store, Machine(), TokenizerSpec(source=str(bytes_tokenizer)))
