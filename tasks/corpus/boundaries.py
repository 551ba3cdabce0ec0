"""Where a documents shard ends: the documents themselves decide, so that a change moves only the boundaries near it.

A shard's size is the UTF-8 bytes of its texts and the 32 bytes of each document's digest, so that the shortest documents do
not fill the memory. It ends at the document with the smallest boundary number among those that leave it between a quarter of
its greatest size and the greatest size. Counting documents instead would move every boundary behind an inserted one.
"""

import hashlib
from array import array
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tasks.store import Digest, digest_bytes

DIGEST_BYTES = 32
LEAST_SHARE = 4  # a shard holds at least a quarter of the greatest size


class Document(NamedTuple):
    """A text as UTF-8, its length in characters, and its identity: the SHA-256 of these bytes."""

    data: bytes
    num_characters: int
    digest: bytes


def read_document(text: str) -> Document:
    """Raises UnicodeEncodeError for a text with lone surrogates, which has no UTF-8."""
    data = text.encode()
    return Document(data, len(text), hashlib.sha256(data).digest())


def is_validation(digest: bytes, fraction: float) -> bool:
    """Whether a document is of the validation split: its digest's first 8 bytes decide."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class Shard:
    """Documents in order, as flat buffers: no Python object per document, so that small documents cost no memory."""

    def __init__(self) -> None:
        self.data, self.digests = bytearray(), bytearray()
        self.sizes, self.characters = array("q"), array("q")

    def __len__(self) -> int:
        return len(self.sizes)

    def append(self, document: Document) -> None:
        self.data += document.data
        self.digests += document.digest
        self.sizes.append(len(document.data))
        self.characters.append(document.num_characters)

    def split_off(self, num_documents: int) -> "Shard":
        """Take the first documents out, as a shard of their own."""
        head, num_bytes = Shard(), sum(self.sizes[:num_documents])
        head.data, self.data = self.data[:num_bytes], self.data[num_bytes:]
        head.digests, self.digests = self.digests[: num_documents * DIGEST_BYTES], self.digests[num_documents * DIGEST_BYTES :]
        head.sizes, self.sizes = self.sizes[:num_documents], self.sizes[num_documents:]
        head.characters, self.characters = self.characters[:num_documents], self.characters[num_documents:]
        return head

    @property
    def size(self) -> int:
        return len(self.data) + len(self.digests)

    @property
    def identity(self) -> Digest:
        """The digest of its documents' digests."""
        return digest_bytes(bytes(self.digests))

    @property
    def stats(self) -> dict[str, Any]:
        return {"num_documents": len(self), "num_bytes": len(self.data), "num_characters": sum(self.characters)}


class Sharder:
    """Cuts a stream of documents into shards of at most ``greatest_bytes`` (one larger document stands alone)."""

    def __init__(self, greatest_bytes: int) -> None:
        self.greatest_bytes = greatest_bytes
        self.pending = Shard()

    def add(self, document: Document) -> Shard | None:
        """Take the next document; returns a shard when one is full."""
        self.pending.append(document)
        return self.split() if self.pending.size > self.greatest_bytes else None

    def finish(self) -> list[Shard]:
        """What is left when the stream ends."""
        left = []
        while self.pending.size > self.greatest_bytes and len(self.pending) > 1:
            left.append(self.split())
        return left + [self.pending] * bool(len(self.pending))

    def split(self) -> Shard:
        """Cut the next shard off; what waits is greater than one may be."""
        sizes = np.array(self.pending.sizes, np.int64) + DIGEST_BYTES
        return self.pending.split_off(boundary(sizes, boundary_numbers(self.pending.digests), self.greatest_bytes))


def boundary_numbers(digests: bytes | bytearray) -> npt.NDArray[np.uint64]:
    """Of each digest its second 8 bytes: the first decide the split."""
    return np.frombuffer(bytes(digests), ">u8").reshape(-1, DIGEST_BYTES // 8)[:, 1].astype(np.uint64)


def boundary(sizes: npt.NDArray[np.int64], numbers: npt.NDArray[np.uint64], greatest_bytes: int) -> int:
    """How many of the documents make the first shard; their sizes together exceed ``greatest_bytes``."""
    ends = np.cumsum(sizes)
    fitting = int(np.searchsorted(ends, greatest_bytes, "right"))
    least = int(np.searchsorted(ends, greatest_bytes / LEAST_SHARE, "left"))
    if fitting <= least:  # a large document leaves no choice: what fits, or else that document alone
        return max(fitting, 1)
    return least + int(np.argmin(numbers[least:fitting])) + 1
