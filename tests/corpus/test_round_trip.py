"""Nothing lost, nothing doubled: the documents of any small corpus are rebuilt from its blocks and compared with what went in."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from flows.verify import verify
from tasks.corpus.blocks import BlocksSpec, build_blocks
from tasks.corpus.boundaries import is_validation, read_document
from tasks.corpus.bpe import QWEN_PATTERN, SPECIAL_TOKENS
from tasks.corpus.documents import DocumentsSpec, build_documents
from tasks.corpus.tokenizer import TokenizerSpec, build_tokenizer
from tasks.corpus.tokens import TokensSpec, build_tokens
from tasks.machine import Machine
from tasks.schemas import SPLITS
from tasks.store import Artifact, ArtifactStore

from .conftest import PRACTICE, json_lines, store_archive

FRACTION = 0.3
# In the train split, and longer than any block of these tests: the train split is never too small.
ANCHOR = "".join(PRACTICE[:2])

# What has broken a corpus: composed and decomposed letters, joined emoji, marks of direction, the edges of UTF-8's lengths,
# line ends of every kind, and what looks like a special token.
ODD = [
    "", " ", "\n", "\r\n", "\t\x0b\x0c", "\x00", "\u2028\u2029\x85", "\ufeff", "\u0301", "e\u0301 é", "각 \u1100\u1161\u11a8",
    "ﬁ \u212b Å", "👩‍👩‍👧‍👦🏳️‍🌈", "🇨🇳👍🏽", "\u202eabc\u202c", "\x7f\x80\u07ff\u0800\uffff\U00010000\U0010ffff", "𠮷野家", "好",
    "你好，世界。", "<|endoftext|>", "a<|endoftext|>b<|endoftext|>", "<|endoftext", "<|im_start|>user\n", "1234567890",
    "  def f(x):\n\treturn x\n", "zalgo\u0300\u0301\u0302",
]  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(ODD),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),  # a lone surrogate has no UTF-8: quarantined, not a document
    st.lists(st.sampled_from(ODD), max_size=6).map("".join),
    st.builds(lambda text, times: text * times, st.sampled_from([*ODD, *PRACTICE[:3]]), st.integers(50, 400)),
)


@st.composite
def corpora(draw: st.DrawFn) -> list[str]:
    """Texts, some of them twice, with the anchor among them."""
    texts = draw(st.lists(TEXTS, max_size=12))
    again = draw(st.lists(st.sampled_from(texts), max_size=4)) if texts else []
    return draw(st.permutations([*texts, *again, ANCHOR]))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE that gives back every text: no normalizer, and merges of Chinese, English and code."""
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(PRACTICE, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@dataclass(frozen=True)
class Corpus:
    """What the stages made of some texts."""

    documents: Artifact
    tokens: Artifact
    blocks: Artifact


def build(root: Path, texts: Sequence[str], bpe: Path, shard_bytes: int, block_size: int) -> Corpus:
    store, machine = ArtifactStore(root), Machine()
    spec = DocumentsSpec(validation_fraction=FRACTION, shard_bytes=shard_bytes)
    documents = build_documents(store, machine, spec, archive=store_archive(store, json_lines(texts)))
    tokenizer = build_tokenizer(store, machine, TokenizerSpec(source=str(bpe)))
    tokens = build_tokens(store, machine, TokensSpec(), documents=documents, tokenizer=tokenizer)
    return Corpus(documents, tokens, build_blocks(store, machine, BlocksSpec(block_size=block_size), tokens=tokens))


def ids_of(path: Path) -> list[int]:
    """The ids of a file of blocks, end to end."""
    with pa.OSFile(str(path)) as source:
        ids: list[int] = pa.ipc.open_stream(source).read_all()["input_ids"].combine_chunks().flatten().to_pylist()
        return ids


def rebuilt_shards(blocks: Artifact, split: str) -> Iterator[list[int]]:
    """The ids of each shard of a split, in order: its blocks, and its part of the blocks that all tails were packed to."""
    name = f"{split}-tail.arrow"
    tails = ids_of(blocks.file(name)) if blocks.has_file(name) else []
    for entry in blocks.shards(split):
        num_tail = entry.stats["num_tail"]
        yield ids_of(blocks.shard_file(entry, "blocks.arrow")) + tails[:num_tail]
        tails = tails[num_tail:]
    assert tails == []


def documents_of(ids: list[int], end_id: int) -> list[list[int]]:
    """The ids between end-of-document ids; what follows the last one is a document that was cut."""
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == end_id:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


@settings(max_examples=25, deadline=None)
@given(corpora(), st.sampled_from([64, 200, 1_000, 100_000]), st.sampled_from([2, 7, 16, 33]))
def test_the_documents_are_rebuilt_from_the_blocks(bpe: Path, texts: list[str], shard_bytes: int, block_size: int) -> None:
    reference = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    reference.encode_special_tokens = True  # as text
    with tempfile.TemporaryDirectory() as folder:
        corpus = build(Path(folder), texts, bpe, shard_bytes, block_size)
        end_id = corpus.blocks.stats["end_of_document_id"]
        for split in SPLITS:
            expected = [text for text in texts if is_validation(read_document(text).digest, FRACTION) == (split == "validation")]
            num_missing = 0
            for entry, ids in zip(corpus.documents.shards(split), rebuilt_shards(corpus.blocks, split), strict=True):
                num_documents = entry.stats["num_documents"]
                shard, expected = expected[:num_documents], expected[num_documents:]
                encoded = [[*reference.encode(text, add_special_tokens=False).ids, end_id] for text in shard]
                *whole, _ = documents_of(ids, end_id)
                assert [reference.decode(document, skip_special_tokens=False) for document in whole] == shard[: len(whole)]
                # The document that was cut begins as it should; the rest of the shard is what is missing.
                assert ids == list(chain.from_iterable(encoded))[: len(ids)]
                num_missing += sum(map(len, encoded)) - len(ids)
            assert expected == []
            assert num_missing == corpus.blocks.stats[split]["num_remainder"] < block_size
        assert [problem.problem for problem in verify(ArtifactStore(Path(folder)), ["blocks"], Machine()).problems] == []


def test_what_is_missing_is_at_the_end_of_the_last_tails(bpe: Path, tmp_path: Path) -> None:
    blocks = build(tmp_path, [*PRACTICE, ANCHOR], bpe, 2_000, 64).blocks
    for split in SPLITS:
        entries, shards = list(blocks.shards(split)), list(rebuilt_shards(blocks, split))
        missing = [entry.stats["num_tokens"] - len(ids) for entry, ids in zip(entries, shards, strict=True)]
        first_cut = next((number for number, short in enumerate(missing) if short), len(missing))
        # From the first shard that lacks an id on, every tail is gone whole.
        assert missing[first_cut + 1 :] == [entry.stats["num_tail"] for entry in entries[first_cut + 1 :]]
        assert sum(missing) == blocks.stats[split]["num_remainder"]
    assert len(list(blocks.shards("train"))) > 3
