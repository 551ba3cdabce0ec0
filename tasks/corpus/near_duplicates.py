"""Which documents are nearly one that came before: MinHash over character n-grams, with locality-sensitive hashing, on disk.

A document's signature is cut into bands. One that shares a band with an earlier kept document is compared with it, and is a near
duplicate where the share of equal signature values, which estimates the Jaccard similarity of the two sets of n-grams,
reaches the threshold (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", ch. 3).
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from tasks.corpus.duplicates import LOOKUP_ROWS, open_table
from tasks.corpus.scratch_log import ScratchLog, open_log
from tasks.errors import RecipeError
from tasks.store import Spec

SEED = 42  # of the permutations
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, 2**64 / the golden ratio: n-grams that differ in one character get far hashes
WAITING_DOCUMENTS = 20_000  # new ones held in memory until they are inserted: about 60 MB with 16 bands

KEPT_LOG = "near-kept"  # the signatures of what was kept, in order

Signatures = npt.NDArray[np.uint32]


class NearDuplicates(Spec):
    """When two documents are so alike that the later one is dropped."""

    threshold: float = Field(0.8, gt=0, le=1, description="the least estimated Jaccard similarity of their sets of n-grams")
    ngram_characters: int = Field(5, ge=1, description="characters an n-gram")
    num_permutations: int = Field(128, ge=8, le=1024, description="values a signature: the estimate's error is 1/sqrt of it")
    num_bands: int = Field(
        16,
        ge=1,
        description="bands a signature is cut into: pairs of a similarity of (1/num_bands)**(num_bands/num_permutations) are "
        "found about half the time, more alike ones more surely",
    )

    @model_validator(mode="after")
    def _bands_are_equal(self) -> "NearDuplicates":
        if self.num_permutations % self.num_bands:
            raise ValueError(f"num_bands {self.num_bands} does not divide num_permutations {self.num_permutations}")
        return self


def signatures(texts: Sequence[str], spec: NearDuplicates) -> Signatures:
    """The MinHash signatures of texts: (num_texts, num_permutations)."""
    rensa = _rensa()
    hashes = [ngram_hashes(text, spec.ngram_characters) for text in texts]
    offsets = np.cumsum([0, *map(len, hashes)], dtype=np.uint64)
    flat = np.concatenate(hashes)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, spec.num_permutations, SEED)
    return np.array(matrix.to_rows(), np.uint32)


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise RecipeError("documents.near_duplicates needs the package rensa; pip install 'seqmill[quality]'") from error
    return rensa


def ngram_hashes(text: str, size: int) -> npt.NDArray[np.uint64]:
    """One 64-bit number for each n-gram; a text shorter than one is its only n-gram."""
    points = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.uint64)
    size = min(size, len(points))
    hashes = np.zeros(len(points) - size + 1, np.uint64)
    for place in range(size):
        hashes = hashes * MULTIPLIER + points[place : len(points) - size + 1 + place] + np.uint64(1)
        hashes ^= hashes >> np.uint64(29)
    return hashes


class NearSeen:
    """The kept documents' signatures so far, by number, and which of them stands first in each band."""

    def __init__(self, connection: sqlite3.Connection, spec: NearDuplicates, log: ScratchLog) -> None:
        self.connection, self.spec, self.log = connection, spec, log
        self.num_kept = 0
        self.bands: dict[bytes, int] = {}  # those that wait to be inserted
        self.kept: dict[int, Signatures] = {}

    def firsts(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text is unlike all that were kept; those that are, are kept."""
        if not texts:
            return []
        rows = signatures(texts, self.spec)
        keys = [_band_keys(row, self.spec.num_bands) for row in rows]
        stored = self._stored([key for some in keys for key in some])
        fresh = [self._is_fresh(row, some, stored) for row, some in zip(rows, keys, strict=True)]
        if len(self.kept) >= WAITING_DOCUMENTS:
            self._insert()
        return fresh

    def settle(self) -> int:
        """Put what was kept on disk; returns the log's bytes, from which ``remember`` makes all of this anew."""
        self._insert()
        return self.log.settle()

    def remember(self) -> None:
        """Enter what the log has of a build that goes on."""
        for data in self.log.all():
            for row in np.frombuffer(data, np.uint32).reshape(-1, self.spec.num_permutations):
                for key in _band_keys(row, self.spec.num_bands):
                    self.bands.setdefault(key, self.num_kept)
                self.num_kept += 1
            self._insert_bands()

    def _is_fresh(self, row: Signatures, keys: list[bytes], stored: dict[bytes, int]) -> bool:
        candidates = {number for key in keys if (number := self.bands.get(key, stored.get(key))) is not None}
        if any(np.mean(row == self._signature(number)) >= self.spec.threshold for number in sorted(candidates)):
            return False
        for key in keys:
            if key not in stored:
                self.bands.setdefault(key, self.num_kept)
        self.kept[self.num_kept] = row
        self.num_kept += 1
        return True

    def _signature(self, number: int) -> Signatures:
        if number in self.kept:
            return self.kept[number]
        return np.frombuffer(self.log.record(number), np.uint32)

    def _stored(self, keys: list[bytes]) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        for start in range(0, len(keys), LOOKUP_ROWS):
            some = keys[start : start + LOOKUP_ROWS]
            query = f"SELECT band, number FROM bands WHERE band IN ({','.join('?' * len(some))})"  # noqa: S608 - marks only
            found.update(self.connection.execute(query, some))
        return found

    def _insert(self) -> None:
        self._insert_bands()
        self.log.append(b"".join(row.tobytes() for row in self.kept.values()))
        self.kept.clear()

    def _insert_bands(self) -> None:
        # Sorted: at random places, an insertion costs 50 us once the table outgrows its cache. The first of a band stays.
        self.connection.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", sorted(self.bands.items()))
        self.bands.clear()


def _band_keys(row: Signatures, num_bands: int) -> list[bytes]:
    """A band's number and values, as one key."""
    return [bytes([number % 256, number // 256]) + band.tobytes() for number, band in enumerate(np.split(row, num_bands))]


@contextmanager
def open_near_seen(folder: Path, spec: NearDuplicates, num_bytes: int = 0) -> Iterator[NearSeen]:
    """A memory in ``folder``, of what the first ``num_bytes`` of its log say: they were settled by a build that goes on."""
    table = "CREATE TABLE bands (band BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID"
    with (
        open_table(folder / "near.sqlite", table) as connection,
        open_log(folder / KEPT_LOG, 4 * spec.num_permutations, num_bytes) as log,
    ):
        seen = NearSeen(connection, spec, log)
        seen.remember()
        yield seen
