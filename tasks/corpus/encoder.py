"""Texts to token ids: the one place that calls a tokenizer on documents.

Two paths give the same ids: `fastokens`, which is fast and young, and Hugging Face `tokenizers`, which is the reference.
Text that only looks like a special token ("<|endoftext|>" written in a document) is encoded as the ordinary text that it is
on both, so no document can close itself.
"""

import logging
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tasks.errors import CorpusError
from tasks.machine import give_back_memory
from tasks.store import Digest

log = logging.getLogger(__name__)

SAMPLE_EVERY = 500  # one document of so many is also encoded by the reference: about 3% of the time
SAMPLE_CHARACTERS = 1 << 20  # longer ones are not: the reference takes about 150 bytes of memory a token

FASTOKENS, TOKENIZERS = "fastokens", "tokenizers"


class Encoded(NamedTuple):
    """Texts' ids end to end: text i has ids[offsets[i] : offsets[i + 1]].

    ids: int32 (num_tokens,). offsets: int64 (num_texts + 1,).
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]


Encode = Callable[[Sequence[str]], Encoded]


class MismatchError(Exception):
    """The fast path gave other ids than the reference."""


def reference_encode(path: Path) -> Encode:
    """The reference over a tokenizer.json, without the truncation and padding that such a file may ask for."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise CorpusError(f"{path}: not a tokenizer that tokenizers can read ({error}); name another tokenizer") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if hasattr(tokenizer.model, "_resize_cache"):  # BPE's, of 10,000 runs of text: 200 MB of Chinese, and no two are alike
        tokenizer.model._resize_cache(0)
    tokenizer.encode_special_tokens = True  # means: special tokens in a text are encoded as text

    def encode(texts: Sequence[str]) -> Encoded:
        rows = [np.array(row.ids, np.int32) for row in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        lengths = [len(row) for row in rows]
        offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int64)
        return Encoded(np.concatenate(rows) if rows else np.empty(0, np.int32), offsets)

    return encode


def fast_encode(path: Path) -> Encode:
    """fastokens over a tokenizer.json. Raises what it raises for one that it cannot read."""
    from fastokens._native import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(texts: Sequence[str]) -> Encoded:
        ids, offsets = tokenizer.encode_batch_flat(list(texts), add_special_tokens=False, split_special_tokens=True)
        # Little-endian uint32 and uint64; no id or offset reaches the sign bit.
        return Encoded(np.frombuffer(ids, "<u4").astype(np.int32), np.frombuffer(offsets, "<u8").astype(np.int64))

    return encode


class Encoder:
    """Encodes by the fast path and samples it against the reference; by the reference alone where there is no fast path.

    note: why the fast path is not used, None while it is.
    """

    def __init__(self, fast: Encode | None, reference: Encode, note: str | None = None) -> None:
        self.fast, self.reference, self.note = fast, reference, note

    @property
    def path(self) -> str:
        return FASTOKENS if self.fast else TOKENIZERS

    def encode(self, texts: Sequence[str], first: int = 0) -> Encoded:
        """Encode a batch whose first text is number ``first`` of its shard; every SAMPLE_EVERY-th text is checked.

        Raises MismatchError where it is not the reference's: encode the shard again from its start, ``by_reference``.
        """
        if self.fast is None:
            return self.reference(texts)
        encoded = self.fast(texts)
        for i in range(-first % SAMPLE_EVERY, len(texts), SAMPLE_EVERY):
            if len(texts[i]) > SAMPLE_CHARACTERS:
                continue
            expected = self.reference([texts[i]]).ids
            if not np.array_equal(encoded.ids[encoded.offsets[i] : encoded.offsets[i + 1]], expected):
                raise MismatchError(f"{FASTOKENS} gave other ids than {TOKENIZERS} for document {first + i} of a shard")
        return encoded

    def by_reference(self, mismatch: MismatchError) -> "Encoder":
        """The encoder for the shard that did not agree. Only for that one: which shards this process had before, and so
        how many processes there are, must not decide what another becomes.
        """
        log.warning("%s; %s encodes that shard", mismatch, TOKENIZERS)
        return Encoder(None, self.reference, str(mismatch))


def encoder_for(path: Path, digest: Digest) -> Encoder:
    """The encoder of a tokenizer.json, loaded once a process; ``digest`` keeps apart what may lie at one path."""
    with _loading:  # of threads that ask at once, one loads
        return _load(path, digest)


def forget_encoders() -> None:
    """Give back the memory of the encoders that this process loaded: some 400 MB with 151,936 tokens."""
    _load.cache_clear()
    give_back_memory()


_loading = threading.Lock()


@lru_cache(maxsize=2)
def _load(path: Path, digest: Digest) -> Encoder:
    with ThreadPoolExecutor(1) as beside:  # neither load holds Python's lock for long
        reference = beside.submit(reference_encode, path)
        try:
            fast, note = fast_encode(path), None
        except Exception as error:  # whatever a young library raises, the reference does the work
            fast, note = None, f"{FASTOKENS} cannot be used ({type(error).__name__}: {error})"
        encoder = Encoder(fast, reference.result(), note)
    give_back_memory()  # 120 MB of parsed JSON
    if note:
        log.warning("%s: %s; %s is used, which is slower", path, note, TOKENIZERS)
    return encoder


def start_encoder(path: Path, digest: Digest, num_threads: int) -> Encoder:
    """Load an encoder whose own threads, which it starts at its first use in a process, are at most ``num_threads``."""
    encoder = encoder_for(path, digest)  # on all cores: two loads go on beside each other
    if not hasattr(os, "sched_setaffinity"):
        return encoder
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:num_threads])  # fastokens heeds nothing else
    try:
        encoder.encode(["a"] * 2)
    except MismatchError:  # seen again, and told, in the first shard
        pass
    finally:
        os.sched_setaffinity(0, allowed)
    return encoder


@contextmanager
def one_core() -> Iterator[None]:
    """Keep a pool's worker process on one core; both tokenizers start a thread for every core that they are allowed.

    Does nothing in the main process, and where affinity cannot be set (macOS).
    """
    number = re.search(r"(\d+)$", multiprocessing.current_process().name)  # SpawnProcess-3: the third of the pool
    if multiprocessing.parent_process() is None or not number or not hasattr(os, "sched_setaffinity"):
        yield  # a cluster's worker too: which core is its own, nobody has said
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(allowed)[int(number[1]) % len(allowed)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
