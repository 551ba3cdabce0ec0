"""A file's decompressed bytes as a stream; the compression is told by the file's first bytes, never by its name.

A stream that is cut short, damaged or followed by other bytes is refused: it never just ends early.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import indexed_bzip2
import pyarrow as pa

from tasks.errors import CorpusError
from tasks.machine import Advance

MAGIC_BYTES = 6
CODECS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}
REFUSED = {b"PK\x03\x04": "zip", b"\xfd7zXZ\x00": "xz", b"7z\xbc\xaf\x27\x1c": "7-zip"}

# One process parses what about 8 threads decode (45 MB/s each); a thread holds 5 MB of decoded blocks.
MAX_THREADS = 16

BZIP2_BLOCK = 0x314159265359  # the 48 bits that open a block, and those that close a stream
BZIP2_END = 0x177245385090
BZIP2_MARK_BITS = 48 + 32  # either is followed by a CRC of 32 bits


class Readable(Protocol):
    """What the reader asks of a stream."""

    def read(self, size: int, /) -> bytes: ...


def codec_of(path: Path) -> str | None:
    """ "gzip", "bz2" or "zstd", or None for bytes that are not compressed. Raises CorpusError for zip, xz and 7-zip."""
    with path.open("rb") as source:
        magic = source.read(MAGIC_BYTES)
    for start, name in REFUSED.items():
        if magic.startswith(start):
            raise CorpusError(f"{path}: a {name} file, which cannot be streamed here; publish it as .gz, .bz2, .zst or plain")
    return next((codec for start, codec in CODECS.items() if magic.startswith(start)), None)


@contextmanager
def open_decompressed(path: Path, advance: Advance, num_threads: int = 1) -> Iterator[Readable]:
    """Open ``path`` as decompressed bytes; ``advance`` is told the compressed bytes that were read.

    num_threads: bzip2 decodes its blocks on so many threads, MAX_THREADS at most.
    """
    codec = codec_of(path)
    if codec == "bz2" and num_threads > 1:
        with indexed_bzip2.IndexedBzip2File(str(path), parallelization=min(num_threads, MAX_THREADS)) as blocks:
            yield _Stream(path, blocks, lambda: blocks.tell_compressed() // 8, advance, lambda: verify_bzip2(path, blocks))
        return
    with pa.OSFile(str(path), "rb") as source:
        stream = pa.CompressedInputStream(source, codec) if codec else source
        yield _Stream(path, stream, source.tell, advance, lambda: None)


class _Stream:
    """Tells progress, and turns a decoder's errors into ours."""

    def __init__(
        self, path: Path, stream: Any, position: Callable[[], int], advance: Advance, verify: Callable[[], None]
    ) -> None:
        self.path, self.stream, self.position, self.advance, self.verify = path, stream, position, advance, verify
        self.size = path.stat().st_size
        self.told = 0
        self.is_ended = False

    def read(self, size: int, /) -> bytes:
        try:
            data: bytes = self.stream.read(size)
        except (OSError, RuntimeError, ValueError, LookupError, ArithmeticError) as error:  # what C++ raises becomes one of these
            problem = "truncated" if "Truncated" in str(error) else f"truncated or damaged ({str(error).strip()})"
            raise CorpusError(
                f"{self.path}: the compressed stream is {problem} near byte {max(self.told, self._position())} of {self.size}; "
                "fetch the archive again"
            ) from error
        if not data and not self.is_ended:
            self.is_ended = True
            self.verify()
        self._tell(self.size if self.is_ended else self._position())
        return data

    def _position(self) -> int:
        return min(self.position(), self.size)

    def _tell(self, position: int) -> None:
        if position > self.told:
            self.advance(position - self.told)
            self.told = position


def verify_bzip2(path: Path, blocks: Any) -> None:
    """Check that what was decoded is the whole file: each stream closed, under the CRC of all its blocks, and nothing behind.

    The parallel decoder checks each block's CRC, but not the stream's, and ends without an error where no block follows.
    """
    combined, end_bit = 0, 0
    with path.open("rb") as source:
        for bit in sorted(blocks.block_offsets()):
            mark, crc = _mark(source, bit)
            if mark == BZIP2_BLOCK:
                combined, end_bit = ((combined << 1 | combined >> 31) & 0xFFFFFFFF) ^ crc, 0
            elif mark == BZIP2_END:
                if crc != combined:
                    raise CorpusError(
                        f"{path}: the bzip2 stream ending at byte {bit // 8} lacks a block; fetch the archive again"
                    )
                combined, end_bit = 0, bit + BZIP2_MARK_BITS
    end, size = (end_bit + 7) // 8, path.stat().st_size
    if end == 0:
        raise CorpusError(f"{path}: the bzip2 stream is truncated at byte {size}; fetch the archive again")
    if end != size:
        raise CorpusError(f"{path}: {size - end} bytes follow the end of the bzip2 stream at byte {end}; fetch the archive again")


def _mark(source: Any, bit: int) -> tuple[int, int]:
    """The 48-bit mark at a bit of the file, and the CRC behind it."""
    source.seek(bit // 8)
    data = source.read(BZIP2_MARK_BITS // 8 + 1).ljust(BZIP2_MARK_BITS // 8 + 1, b"\0")
    both = int.from_bytes(data, "big") >> (8 - bit % 8) & ((1 << BZIP2_MARK_BITS) - 1)
    return both >> 32, both & 0xFFFFFFFF
