import logging
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tasks.corpus import encoder as encoder_module
from tasks.corpus.encoder import Encode, Encoded, Encoder, MismatchError, encoder_for, fast_encode, one_core, reference_encode
from tasks.errors import CorpusError
from tasks.store import Artifact, Digest

ADVERSARIAL = [
    "",
    " ",
    "春眠不觉晓，处处闻啼鸟。",
    "e\u0301a\u0308 \u1100\u1161\u11a8 \u30ab\u3099",  # decomposed: NFC composes them
    "\u0301\u0302 lone marks \u20dd",
    "👩‍👩‍👧‍👦 👍🏽 🇨🇳 🏴󠁧󠁢󠁥󠁮󠁧󠁿 1️⃣",
    "<|endoftext|>",
    "before<|endoftext|>after <|im_start|>user\nhi<|im_end|>\n",
    "<|endoftext|><|endoftext|>",
    "<|endoftext",
    " " * 3_000 + "x" + "\n" * 3_000 + "\t \t \r\n\r\r\n",
    "for i in range(10):\r\n\tprint(f'{i:>4}')  # 打印\r\n\r\n",
    "𠮷𡈽𪚥 龘靐齉 \u3007〇 ㍿ ﬁ Å ",  # rare CJK, and what compatibility forms would change
    "I'll we'Ve IT'S can't 'RE ſ'ſ K",
    "１２３ 123 ٣٤٥ ५६७ Ⅷ ½",
    "a\x00b\x01\x7f\x85\u2028\u2029\ufeff\u200b\u200d\ufffd\uffff\U0010ffff",
    "العربية עברית ไทย हिन्दी русский",
    "x" * 5_000,
    "哈" * 5_000,
    "。，！？" * 500,
]


@pytest.fixture(scope="module")
def tokenizer_json(trained: Artifact) -> Path:
    return trained.file("tokenizer.json")


@pytest.fixture(scope="module")
def both(tokenizer_json: Path) -> tuple[Encode, Encode]:
    return fast_encode(tokenizer_json), reference_encode(tokenizer_json)


def rows(encoded: Encoded) -> list[list[int]]:
    return [encoded.ids[start:end].tolist() for start, end in zip(encoded.offsets, encoded.offsets[1:], strict=False)]


def test_both_paths_give_the_same_ids_for_adversarial_texts(both: tuple[Encode, Encode]) -> None:
    fast, reference = both
    assert rows(fast(ADVERSARIAL)) == rows(reference(ADVERSARIAL))


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=20))
def test_both_paths_give_the_same_ids_for_any_text(both: tuple[Encode, Encode], texts: list[str]) -> None:
    fast, reference = both
    found, expected = fast(texts), reference(texts)
    assert rows(found) == rows(expected)
    assert (found.ids.dtype, found.offsets.dtype) == (expected.ids.dtype, expected.offsets.dtype) == (np.int32, np.int64)


def test_texts_come_back_from_their_ids_in_nfc(both: tuple[Encode, Encode], tokenizer_json: Path) -> None:
    ids = both[1](["第3课：e\u0301 的 <|im_end|>"]).ids.tolist()
    assert Tokenizer.from_file(str(tokenizer_json)).decode(ids, skip_special_tokens=False) == "第3课：é 的 <|im_end|>"


@pytest.mark.parametrize("path", [0, 1], ids=["fastokens", "tokenizers"])
def test_text_that_looks_like_a_special_token_is_only_text(both: tuple[Encode, Encode], path: int) -> None:
    for text in ("<|endoftext|>", "a<|im_start|>b<|im_end|>"):
        ids = both[path]([text]).ids.tolist()
        assert not set(ids) & {0, 1, 2}  # the special tokens' ids
        assert len(ids) > 1


def test_truncation_and_padding_that_a_file_asks_for_are_not_done(tokenizer_json: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for make in (fast_encode, reference_encode):
        assert rows(make(tmp_path / "tokenizer.json")(["hello world, hello", "x"])) == rows(
            make(tokenizer_json)(["hello world, hello", "x"])
        )


def test_no_text_gives_no_ids(both: tuple[Encode, Encode]) -> None:
    for encode in both:
        encoded = encode([])
        assert (encoded.ids.tolist(), encoded.offsets.tolist()) == ([], [0])


def bytes_of(texts: Sequence[str]) -> Encoded:
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return Encoded(np.frombuffer(b"".join(encoded), np.uint8).astype(np.int32), offsets)


def wrong_for_x(texts: Sequence[str]) -> Encoded:
    return bytes_of([text.replace("x", "y") for text in texts])


def test_the_fast_path_is_used_while_it_agrees() -> None:
    encoder = Encoder(bytes_of, bytes_of)
    assert encoder.encode(["ab", "c"]).ids.tolist() == [97, 98, 99]
    assert (encoder.path, encoder.note) == ("fastokens", None)


def test_a_difference_in_a_sampled_document_leaves_that_shard_to_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(wrong_for_x, bytes_of)
    with pytest.raises(MismatchError, match="other ids than tokenizers for document 0") as mismatch:
        encoder.encode(["x", "a"])
    with caplog.at_level(logging.WARNING):
        exact = encoder.by_reference(mismatch.value)
    assert "other ids than tokenizers for document 0" in caplog.text
    assert (exact.path, exact.encode(["x"]).ids.tolist()) == ("tokenizers", [120])
    assert encoder.path == "fastokens"  # for the next shard


def test_every_500th_document_of_a_shard_is_sampled_whatever_the_batch() -> None:
    for first, place in ((0, 500), (300, 200), (999, 1)):
        texts = ["a"] * place + ["x"] + ["a"] * 10
        with pytest.raises(MismatchError):
            Encoder(wrong_for_x, bytes_of).encode(texts, first)
    Encoder(wrong_for_x, bytes_of).encode(["a", "x"], 0)  # document 1 is not of the sample


def test_a_very_long_document_is_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "SAMPLE_CHARACTERS", 3)
    assert Encoder(wrong_for_x, bytes_of).encode(["xxxx"]).ids.tolist() == [121] * 4


def test_a_tokenizer_that_the_fast_path_cannot_read_uses_the_reference(tmp_path: Path) -> None:
    from tokenizers import models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    encoder = encoder_for(tmp_path / "tokenizer.json", Digest("0" * 64))
    assert encoder.encode(["b a c"]).ids.tolist() == [1, 0, 2]
    assert encoder.path == "tokenizers"
    assert encoder.note is not None
    assert encoder.note.startswith("fastokens cannot be used")


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorpusError, match="not a tokenizer that tokenizers can read"):
        encoder_for(tmp_path / "tokenizer.json", Digest("1" * 64))


def cores_inside() -> tuple[int, int]:
    allowed = len(os.sched_getaffinity(0))
    with one_core():
        return allowed, len(os.sched_getaffinity(0))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_only_worker_processes_keep_to_one_core() -> None:
    before = os.sched_getaffinity(0)
    assert cores_inside() == (len(before), len(before))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(cores_inside) == (len(before), 1)
    assert os.sched_getaffinity(0) == before
