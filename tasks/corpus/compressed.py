"""A file's decompressed bytes as a stream; the compression is told by the file's first bytes, never by its name.

A stream that is cut short, damaged or followed by other bytes is refused: it never just ends early. Reading may begin in the
middle: plain files are sought, bzip2 begins at one of its blocks, gzip and zstd are decompressed up to there.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import indexed_bzip2
import pyarrow as pa

from tasks.errors import CorpusError
from tasks.machine import Advance

MAGIC_BYTES = 6
CODECS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}
REFUSED = {b"PK\x03\x04": "zip", b"\xfd7zXZ\x00": "xz", b"7z\xbc\xaf\x27\x1c": "7-zip"}
SKIP_BYTES = 1 << 20

# One process parses what about 8 threads decode (40 MB/s each); a thread holds 5 MB of decoded blocks.
MAX_THREADS = 16

BZIP2_HEADER = b"BZh9"  # of the largest blocks, and so of any
BZIP2_BLOCK = 0x314159265359  # the 48 bits that open a block, and those that close a stream
BZIP2_END = 0x177245385090
BZIP2_MARK_BITS = 48 + 32  # either is followed by a CRC of 32 bits


class Readable(Protocol):
    """What the reader asks of a stream."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True)
class Mark:
    """Where decompression may begin: a byte of the file, and how many decompressed bytes lie before it.

    crc: of the blocks before it in its bzip2 stream.
    """

    byte: int = 0
    decompressed: int = 0
    crc: int = 0


BEGINNING = Mark()


def codec_of(path: Path) -> str | None:
    """ "gzip", "bz2" or "zstd", or None for bytes that are not compressed. Raises CorpusError for zip, xz and 7-zip."""
    with path.open("rb") as source:
        magic = source.read(MAGIC_BYTES)
    for start, name in REFUSED.items():
        if magic.startswith(start):
            raise CorpusError(f"{path}: a {name} file, which cannot be streamed here; publish it as .gz, .bz2, .zst or plain")
    return next((codec for start, codec in CODECS.items() if magic.startswith(start)), None)


@contextmanager
def open_decompressed(
    path: Path, advance: Advance, num_threads: int = 1, start: int = 0, mark: Mark = BEGINNING
) -> Iterator["Stream"]:
    """Open ``path`` as decompressed bytes, from byte ``start`` of them; ``advance`` is told the compressed bytes that were read.

    num_threads: bzip2 decodes its blocks on so many threads, MAX_THREADS at most. mark: what ``Stream.mark`` said of a place
    at or before ``start``.
    """
    codec = codec_of(path)
    if codec == "bz2":
        with _Bzip2(path, num_threads, mark) as blocks:
            yield Stream(path, blocks, advance, start - mark.decompressed)
        return
    with pa.OSFile(str(path), "rb") as source:
        if codec:
            yield Stream(path, _Sequential(source, pa.CompressedInputStream(source, codec)), advance, start)
            return
        source.seek(start)
        yield Stream(path, _Sequential(source, source), advance)


class Decoder(Protocol):
    """Decompresses one file."""

    def read(self, size: int, /) -> bytes: ...

    def position(self) -> int:
        """The byte of the file up to which it was read."""

    def mark(self, before: int) -> Mark:
        """The last place to begin at that has at most ``before`` decompressed bytes before it."""

    def verify(self) -> None:
        """Raise CorpusError where the end that was met is not the file's."""


class _Sequential:
    """A decoder that Arrow brings, or none; it finds the end's faults by itself."""

    def __init__(self, source: Any, stream: Any) -> None:
        self.position, self.read = source.tell, stream.read

    def mark(self, before: int) -> Mark:
        return BEGINNING

    def verify(self) -> None:
        pass


class Stream:
    """Decompressed bytes; tells progress, and turns a decoder's errors into ours."""

    def __init__(self, path: Path, decoder: Decoder, advance: Advance, skip: int = 0) -> None:
        self.path, self.decoder, self.advance = path, decoder, advance
        self.size = path.stat().st_size
        self.told = 0
        self.is_ended = False
        while skip > 0 and (data := self.read(min(skip, SKIP_BYTES))):
            skip -= len(data)

    def read(self, size: int, /) -> bytes:
        try:
            data = self.decoder.read(size)
            if not data and not self.is_ended:
                self.is_ended = True
                self.decoder.verify()  # decodes what is left: behind a tar's member there may be damage too
        except (OSError, RuntimeError, ValueError, LookupError, ArithmeticError) as error:  # what C++ raises becomes one of these
            problem = "truncated" if "Truncated" in str(error) else f"truncated or damaged ({str(error).strip()})"
            raise CorpusError(
                f"{self.path}: the compressed stream is {problem} near byte {max(self.told, self._position())} of {self.size}; "
                "fetch the archive again"
            ) from error
        self._tell(self.size if self.is_ended else self._position())
        return data

    def mark(self, before: int) -> Mark:
        """The last place to begin at that has at most ``before`` decompressed bytes before it."""
        return self.decoder.mark(before)

    def _position(self) -> int:
        return min(self.decoder.position(), self.size)

    def _tell(self, position: int) -> None:
        if position > self.told:
            self.advance(position - self.told)
            self.told = position


class _Bzip2:
    """Decodes blocks in parallel, from a block that begins at a whole byte: about one in eight does.

    The parallel decoder checks each block's CRC, but not the stream's, and ends without an error where no block follows.
    """

    def __init__(self, path: Path, num_threads: int, begin: Mark) -> None:
        self.path, self.begin = path, begin
        source = str(path) if begin == BEGINNING else _Suffix(path, begin.byte)
        self.shift = 0 if begin == BEGINNING else 8 * (begin.byte - len(BZIP2_HEADER))  # in bits, from its places to the file's
        # On one thread it checks the CRC of the whole stream, which the blocks of a suffix cannot have: verify does.
        least = 1 if begin == BEGINNING else 2
        self.blocks = indexed_bzip2.IndexedBzip2File(source, parallelization=max(least, min(num_threads, MAX_THREADS)))
        self.read = self.blocks.read
        self.last, self.last_bit, self.crc = begin, -1, begin.crc

    def __enter__(self) -> "_Bzip2":
        return self

    def __exit__(self, *_: object) -> None:
        self.blocks.close()

    def position(self) -> int:
        return int(self.blocks.tell_compressed() + self.shift) // 8

    def mark(self, before: int) -> Mark:
        offsets = self.blocks.available_block_offsets()
        with self.path.open("rb") as source:
            for bit in sorted(bit for bit in offsets if bit > self.last_bit):
                decompressed = offsets[bit] + self.begin.decompressed
                if decompressed > before:
                    break
                kind, crc = _mark(source, bit + self.shift)
                if kind == BZIP2_BLOCK and bit % 8 == 0:
                    self.last = Mark((bit + self.shift) // 8, decompressed, self.crc)
                self.crc = combine(self.crc, crc) if kind == BZIP2_BLOCK else 0
                self.last_bit = bit
        return self.last

    def verify(self) -> None:
        """Check that the whole file was decoded: each stream closed, under the CRC of all its blocks, and nothing behind."""
        combined, end_bit, size = self.begin.crc, 0, self.path.stat().st_size
        with self.path.open("rb") as source:
            for bit in sorted(self.blocks.block_offsets()):
                kind, crc = _mark(source, bit + self.shift)
                if kind == BZIP2_BLOCK:
                    combined, end_bit = combine(combined, crc), 0
                elif kind == BZIP2_END:
                    if crc != combined:
                        raise CorpusError(
                            f"{self.path}: the bzip2 stream ending at byte {(bit + self.shift) // 8} lacks a block; "
                            "fetch the archive again"
                        )
                    combined, end_bit = 0, bit + self.shift + BZIP2_MARK_BITS
        end = (end_bit + 7) // 8
        if end == 0:
            raise CorpusError(f"{self.path}: the bzip2 stream is truncated at byte {size}; fetch the archive again")
        if end != size:
            raise CorpusError(
                f"{self.path}: {size - end} bytes follow the end of the bzip2 stream at byte {end}; fetch the archive again"
            )


def combine(combined: int, crc: int) -> int:
    """The CRC of a bzip2 stream with one more block."""
    return ((combined << 1 | combined >> 31) & 0xFFFFFFFF) ^ crc


def _mark(source: Any, bit: int) -> tuple[int, int]:
    """The 48-bit mark at a bit of the file, and the CRC behind it."""
    source.seek(bit // 8)
    data = source.read(BZIP2_MARK_BITS // 8 + 1).ljust(BZIP2_MARK_BITS // 8 + 1, b"\0")
    both = int.from_bytes(data, "big") >> (8 - bit % 8) & ((1 << BZIP2_MARK_BITS) - 1)
    return both >> 32, both & 0xFFFFFFFF


class _Suffix(io.RawIOBase):
    """A bzip2 file from one of its blocks on, under a header of its own."""

    def __init__(self, path: Path, start: int) -> None:
        self.file = path.open("rb", buffering=0)
        self.start = start - len(BZIP2_HEADER)
        self.size = path.stat().st_size - self.start
        self.place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def readinto(self, buffer: Any, /) -> int:
        header = BZIP2_HEADER[self.place : self.place + len(buffer)]
        view = memoryview(buffer)
        view[: len(header)] = header
        self.file.seek(self.start + max(self.place, len(BZIP2_HEADER)))
        read = len(header) + (self.file.readinto(view[len(header) :]) or 0)
        self.place += read
        return read

    def close(self) -> None:
        self.file.close()
        super().close()
