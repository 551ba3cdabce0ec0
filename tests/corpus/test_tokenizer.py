import ctypes
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer

from tasks.corpus.bpe import SPECIAL_TOKENS, interruptible
from tasks.corpus.tokenizer import TokenizerSpec, TokenizerTrainingSpec, build_tokenizer, read_vocabulary
from tasks.errors import CorpusError, SourceError
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore

from .conftest import PRACTICE

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def training(**fields: Any) -> TokenizerSpec:
    return TokenizerSpec(train=TokenizerTrainingSpec(**{"vocab_size": 300, **fields}))


def files_of(artifact: Artifact) -> dict[str, bytes]:
    return {entry.name: artifact.file(entry.name).read_bytes() for entry in artifact.manifest.files}


def test_a_trained_tokenizer_has_the_tokens_asked_for(trained: Artifact) -> None:
    assert trained.stats == {"vocab_size": 380, "special_tokens": {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}}
    assert set(files_of(trained)) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def test_any_text_comes_back_from_a_trained_tokenizer(trained: Artifact) -> None:
    tokenizer = Tokenizer.from_file(str(trained.file("tokenizer.json")))
    for text in ("今天天气很好", "龘 👩‍👩‍👧 \u0301\x00 ſ", "def f():\n\treturn 1"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_numbers_are_cut_into_digits_and_text_is_composed_as_qwen_does(trained: Artifact) -> None:
    tokenizer = Tokenizer.from_file(str(trained.file("tokenizer.json")))
    assert tokenizer.encode("123").tokens == ["1", "2", "3"]
    assert tokenizer.decode(tokenizer.encode("e\u0301").ids) == "é"


def test_training_twice_gives_the_same_bytes(documents_of: Callable[..., Artifact], store: ArtifactStore) -> None:
    documents, found = documents_of(PRACTICE, shard_bytes=2_000), []
    for name in ("one", "two"):
        other = ArtifactStore(store.root.parent / name)
        (other.root / "documents-shard").parent.mkdir()
        (other.root / "documents-shard").symlink_to(store.root / "documents-shard")
        found.append(files_of(build_tokenizer(other, Machine(), training(), documents=documents)))
    assert found[0] == found[1]


ON_ONE_THREAD = """
import sys
from pathlib import Path
from tasks.corpus.tokenizer import TokenizerSpec, TokenizerTrainingSpec, build_tokenizer
from tasks.machine import Machine
from tasks.store import ArtifactStore
store = ArtifactStore(Path(sys.argv[1]))
(documents,) = store.artifacts("documents")
spec = TokenizerSpec(train=TokenizerTrainingSpec(vocab_size=300, min_frequency=3))
print(build_tokenizer(store, Machine(), spec, documents=documents).content)
"""


def test_the_number_of_threads_does_not_change_the_bytes(documents_of: Callable[..., Artifact], store: ArtifactStore) -> None:
    documents = documents_of(PRACTICE, shard_bytes=2_000)
    environment = {"RAYON_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    told = subprocess.run(
        [sys.executable, "-c", ON_ONE_THREAD, str(store.root)], env=environment, capture_output=True, text=True, check=True
    )
    (store.root / "tokenizer").rename(store.root.parent / "made-on-one-thread")
    here = build_tokenizer(store, Machine(), training(min_frequency=3), documents=documents)
    assert told.stdout.strip() == here.content


def counting(told: list[int]) -> Machine:
    """A machine whose progress bars add up in ``told``."""

    @contextmanager
    def count(label: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        yield told.append

    return Machine(progress=count)


def test_a_signal_is_heard_while_a_tokenizer_is_learned() -> None:
    def stop(*_: Any) -> None:
        raise InterruptedError("told to end")

    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)  # zeros: a mutex that is free
    libc.pthread_mutex_lock(mutex)
    before = signal.signal(signal.SIGTERM, stop)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        with pytest.raises(InterruptedError, match="told to end"):
            interruptible(lambda: libc.pthread_mutex_lock(mutex) and None)  # native code that no signal ends
    finally:
        signal.signal(signal.SIGTERM, before)
        libc.pthread_mutex_unlock(mutex)


def test_what_fails_in_learning_fails_here() -> None:
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: print(1 / 0))


def test_only_the_train_split_is_trained_on(documents_of: Callable[..., Artifact], store: ArtifactStore) -> None:
    documents = documents_of([f"qqqq zzzz {i}" for i in range(40)], validation_fraction=0.9)
    told: list[int] = []

    build_tokenizer(store, counting(told), training(), documents=documents)
    assert sum(told) == documents.stats["train"]["num_bytes"] < documents.stats["validation"]["num_bytes"]


def test_a_large_corpus_is_sampled_evenly(documents_of: Callable[..., Artifact], store: ArtifactStore) -> None:
    documents, told = documents_of([f"{text} {i}" for i in range(20) for text in PRACTICE]), []
    total = documents.stats["train"]["num_bytes"]

    build_tokenizer(store, counting(told), training(max_bytes=total // 10), documents=documents)
    assert total / 20 < sum(told) < total / 5


def test_a_corpus_that_teaches_less_gives_fewer_tokens_and_says_so(
    documents_of: Callable[..., Artifact], store: ArtifactStore, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = build_tokenizer(store, Machine(), training(vocab_size=1_000), documents=documents_of(["ab", "abc"]))
    assert artifact.stats["vocab_size"] == 260  # "ab" is the one pair seen twice
    assert "only 260 of 1000 tokens could be learned from 5 bytes" in caplog.text


def test_transformers_loads_it_fast_with_its_special_tokens_and_template(trained: Artifact) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(trained.path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.eos_token_id, len(tokenizer)) == (
        "<|endoftext|>", "<|endoftext|>", 0, 380,
    )  # fmt: skip
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hello"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_transformers_gives_the_same_ids_even_beside_a_qwen2_config(trained: Artifact, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, data in files_of(trained).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    reference = Tokenizer.from_file(str(trained.file("tokenizer.json")))
    text = "第3课：今天 e\u0301 it's\n\n    x = 1234"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == reference.encode(text).ids


def published(tmp_path: Path, source: Path) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "vocab.json").write_text("{}")
    return folder


def test_a_folder_gives_its_tokenizer_files_only(store: ArtifactStore, bytes_tokenizer: Path, tmp_path: Path) -> None:
    artifact = build_tokenizer(store, Machine(), TokenizerSpec(source=str(published(tmp_path, bytes_tokenizer))))
    assert set(files_of(artifact)) == {"tokenizer.json", "tokenizer_config.json"}
    assert artifact.stats == {"vocab_size": 259, "special_tokens": dict(zip(SPECIAL_TOKENS, (256, 257, 258), strict=True))}


def test_a_tokenizer_enters_the_key_by_its_bytes_not_by_its_name(
    store: ArtifactStore, bytes_tokenizer: Path, tmp_path: Path
) -> None:
    folder = published(tmp_path, bytes_tokenizer)
    first = build_tokenizer(store, Machine(), TokenizerSpec(source=str(folder)))
    moved = build_tokenizer(store, Machine(), TokenizerSpec(source=str(folder.rename(tmp_path / "elsewhere"))))
    (tmp_path / "elsewhere" / "model.safetensors").write_bytes(b"other weights")
    retrained = build_tokenizer(store, Machine(), TokenizerSpec(source=str(tmp_path / "elsewhere")))
    (tmp_path / "elsewhere" / "tokenizer_config.json").write_text("{}")
    changed = build_tokenizer(store, Machine(), TokenizerSpec(source=str(tmp_path / "elsewhere")))
    assert first.key == moved.key == retrained.key != changed.key


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere/at/all", "a b"])
def test_a_source_that_is_neither_folder_nor_name_is_refused(store: ArtifactStore, source: str) -> None:
    with pytest.raises(SourceError, match="no such folder, nor a hub's name"):
        build_tokenizer(store, Machine(), TokenizerSpec(source=source))


def test_a_folder_without_a_fast_tokenizer_is_refused(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(SourceError, match=r"no tokenizer\.json \(it has .*tokenizer\.model"):
        build_tokenizer(store, Machine(), TokenizerSpec(source=str(tmp_path)))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"model": {"vocab": {}}}', b'{"model": {"vocab": null}}'])
def test_a_tokenizer_json_that_is_none_is_refused(store: ArtifactStore, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(CorpusError, match=r"not a tokenizer\.json"):
        build_tokenizer(store, Machine(), TokenizerSpec(source=str(tmp_path)))


def test_the_vocabulary_counts_added_tokens_and_gaps(tmp_path: Path) -> None:
    value = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 7, "content": "<s>", "special": True}]}
    (tmp_path / "tokenizer.json").write_bytes(orjson.dumps(value))
    vocabulary = read_vocabulary(tmp_path / "tokenizer.json")
    assert (vocabulary.size, vocabulary.ids, vocabulary.special) == (8, {"a": 0, "b": 1, "<s>": 7}, ("<s>",))


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for owner/model, whose branch main stands at COMMIT."""

    files: dict[str, bytes]
    requests: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path in ("/api/models/owner/model", f"/api/models/owner/model/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.files]
            return self.answer(200, json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": siblings}).encode())
        name = self.path.removeprefix(f"/owner/model/resolve/{COMMIT}/")
        if name in self.files:
            return self.answer(200, self.files[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"'})
        return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound" if "/revision/" in self.path else "RepoNotFound"})

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(bytes_tokenizer: Path) -> Iterator[tuple[Machine, type[Hub]]]:
    files = {"tokenizer.json": (bytes_tokenizer / "tokenizer.json").read_bytes(), "model.safetensors": b"weights"}
    handler = type("OneHub", (Hub,), {"files": files, "requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Machine(endpoints={"huggingface": f"http://127.0.0.1:{server.server_port}"}), handler
        server.shutdown()
        thread.join()


def test_a_hub_s_name_is_identified_by_its_commit_and_only_tokenizer_files_are_fetched(
    store: ArtifactStore, hub: tuple[Machine, type[Hub]]
) -> None:
    machine, handler = hub
    artifact = build_tokenizer(store, machine, TokenizerSpec(source="owner/model"))
    assert files_of(artifact) == {"tokenizer.json": handler.files["tokenizer.json"]}
    assert artifact.manifest.identity["inputs"] == {"source": COMMIT}
    assert "owner" not in json.dumps(artifact.manifest.identity)
    assert not [path for path in handler.requests if "safetensors" in path]


def test_a_commit_is_found_without_asking_the_hub(store: ArtifactStore, hub: tuple[Machine, type[Hub]]) -> None:
    machine, handler = hub
    spec = TokenizerSpec(source="owner/model", revision=COMMIT)
    first = build_tokenizer(store, machine, spec)
    handler.requests.clear()
    again = build_tokenizer(store, machine, spec)
    assert (again.key, again.found, handler.requests) == (first.key, True, [])


def test_an_unknown_model_or_revision_is_told(store: ArtifactStore, hub: tuple[Machine, type[Hub]]) -> None:
    for spec in (TokenizerSpec(source="owner/other"), TokenizerSpec(source="owner/model", revision="nope")):
        with pytest.raises(SourceError, match=r"the hub has no such model, revision or file; check tokenizer\.source"):
            build_tokenizer(store, hub[0], spec)


def test_a_hub_that_cannot_be_reached_is_told(store: ArtifactStore) -> None:
    machine = Machine(endpoints={"huggingface": "http://127.0.0.1:9"})  # the discard port: nothing listens
    with pytest.raises(SourceError, match=r"http://127\.0\.0\.1:9/owner/model: cannot be fetched .*; try again"):
        build_tokenizer(store, machine, TokenizerSpec(source="owner/model"))


def test_exactly_one_origin_is_asked_for() -> None:
    for fields in ({}, {"source": "a", "train": TokenizerTrainingSpec(vocab_size=300)}, {"revision": "main"}):
        with pytest.raises(ValidationError):
            TokenizerSpec(**fields)


def test_a_vocabulary_that_cannot_hold_every_byte_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 259"):
        TokenizerTrainingSpec(vocab_size=258)


def test_every_training_field_changes_the_identity() -> None:
    changed = {"vocab_size": 301, "min_frequency": 3, "max_bytes": 5}
    assert set(changed) == set(TokenizerTrainingSpec.model_fields)
    identities = [training(**{name: value}).identity() for name, value in changed.items()]
    assert training().identity() not in identities
    assert TokenizerSpec(source="a", revision="b").identity() == TokenizerSpec(source="c").identity()
