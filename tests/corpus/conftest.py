"""A store, and small artifacts to build on, for the tests of the corpus stages."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tasks.corpus import fetch
from tasks.corpus.documents import DocumentsSpec, build_documents
from tasks.corpus.examples import ExamplesSpec, build_examples
from tasks.corpus.tokenizer import TokenizerSpec, TokenizerTrainingSpec, build_tokenizer
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Built, Spec, Work, digest_bytes, stage
from tests.corpus.http_server import Loopback, serving
from tests.corpus.templates import write_tokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class BytesSpec(Spec):
    digest: str


def store_archive(store: ArtifactStore, data: bytes) -> Artifact:
    """An archive artifact of these bytes, as the archive stage leaves it."""

    @stage("archive", revision=1)
    def build_archive(work: Work, spec: BytesSpec) -> Built:
        (work.folder / "archive").write_bytes(data)
        return Built({"num_bytes": len(data), "sha256": digest_bytes(data)})

    return build_archive(store, Machine(), BytesSpec(digest=digest_bytes(data)))


def json_lines(texts: Sequence[str]) -> bytes:
    return b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    """A server on loopback; what drops is asked for again at once."""
    monkeypatch.setattr(fetch, "RETRY_WAITS_SECONDS", (0, 0, 0))
    monkeypatch.setenv("NO_PROXY", "*")
    with serving() as loopback:
        yield loopback


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


# Written for these tests: enough repetition that merges are learned in Chinese, English and code.
PRACTICE = [
    f"第{i}课：今天天气很好，我们去公园散步吧。小猫在树下睡觉，小狗在草地上跑来跑去。\n"
    f"Lesson {i}: the weather is fine today, so we'll walk in the park.\n\n    def lesson_{i}(x):\n        return x + {i}\n"
    for i in range(40)
]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tokenizer of 380 tokens trained on PRACTICE."""
    store = ArtifactStore(tmp_path_factory.mktemp("trained"))
    archive = store_archive(store, json_lines(PRACTICE))
    documents = build_documents(store, Machine(), DocumentsSpec(validation_fraction=0.0), archive=archive)
    spec = TokenizerSpec(train=TokenizerTrainingSpec(vocab_size=380))
    return build_tokenizer(store, Machine(), spec, documents=documents)


@pytest.fixture
def tokenizer(store: ArtifactStore, bytes_tokenizer: Path) -> Artifact:
    return build_tokenizer(store, Machine(), TokenizerSpec(source=str(bytes_tokenizer)))


class TemplateSpec(Spec):
    template: str | None = None


@pytest.fixture
def tokenizer_of(store: ArtifactStore) -> Callable[[str | None], Artifact]:
    @stage("tokenizer", revision=1)
    def build_tokenizer(work: Work, spec: TemplateSpec) -> Built:
        write_tokenizer(work.folder, spec.template)
        return Built()

    return lambda template: build_tokenizer(store, Machine(), TemplateSpec(template=template))


@pytest.fixture
def make(
    store: ArtifactStore, archive_of: Callable[[bytes], Artifact], tokenizer_of: Callable[[str | None], Artifact]
) -> Callable[..., Artifact]:
    """Build examples of these conversations, and of held-out ones where given."""

    def build(lines: bytes, held_out: bytes | None = None, template: str | None = None, **fields: Any) -> Artifact:
        inputs = {"conversations": archive_of(lines), "tokenizer": tokenizer_of(template)}
        if held_out is not None:
            inputs["held_out"] = archive_of(held_out)
        return build_examples(store, Machine(), ExamplesSpec(**{"block_size": 64, **fields}), **inputs)

    return build
