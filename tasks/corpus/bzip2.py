"""The blocks of a bzip2 file found without an index: a range of its bytes decodes alone, from the first block that begins in it.

A block begins with a mark of 48 bits, at any bit. What looks like a mark by chance is told by the block's CRC: the block before
decodes only together with it. Where a range's blocks begin and end is told, so that whoever has all ranges can see that
nothing is missing between them.
"""

import bz2
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import indexed_bzip2
import numpy as np
import numpy.typing as npt

from tasks.corpus.compressed import BZIP2_BLOCK, BZIP2_END, BZIP2_HEADER, BZIP2_MARK_BITS, combine

# A block of 900 kB of what does not compress, and its tables: no block's end lies further behind its beginning.
MOST_BLOCK_BYTES = 2 << 20
MOST_CHANCES = 3  # marks by chance within one block: one in 3,500 blocks' archives of 10 GB has a single one
MARK_BITS = 48


class Piece(NamedTuple):
    """A block, or the end of a stream: the bits of the file where it begins and ends, its CRC or that of all its blocks.

    opens: whether another stream begins behind the end.
    """

    is_block: bool
    start: int
    end: int
    crc: int
    opens: bool = False


class RangeError(Exception):
    """A range that does not decode as blocks one after the other."""


def decode_range(data: bytes, start: int, num_bytes: int) -> tuple[bytes, list[Piece]]:
    """The decompressed bytes of the blocks that begin in a range, and where they lie.

    data: the file's bytes from ``start`` on: ``num_bytes`` of the range, and MOST_BLOCK_BYTES behind it, or up to the file's end.
    """
    marks = list(find_marks(data))
    decoded: list[bytes] = []
    pieces: list[Piece] = []
    number = 0
    while number < len(marks) and marks[number][0] < 8 * num_bytes:
        bit, is_block = marks[number]
        number += 1
        if not is_block:
            behind = -(-(bit + BZIP2_MARK_BITS) // 8)
            opens = _is_header(data[behind : behind + len(BZIP2_HEADER)])
            pieces.append(Piece(False, 8 * start + bit, 8 * start + bit + BZIP2_MARK_BITS, _crc(data, bit), opens))
            continue
        run = _run(marks, number - 1, 8 * num_bytes)
        if len(run) > 2 and (text := _decode_run(data, run)) is not None:
            decoded.append(text)
            pieces += [Piece(True, 8 * start + first, 8 * start + end, _crc(data, first)) for first, end in pairwise(run)]
            number += len(run) - 2
            continue
        for last in range(number, min(number + MOST_CHANCES, len(marks))):
            if (text := _decode_block(data, bit, marks[last][0])) is not None:
                decoded.append(text)
                pieces.append(Piece(True, 8 * start + bit, 8 * start + marks[last][0], _crc(data, bit)))
                number = last
                break
        else:
            # A mark by chance, in the middle of the block before, which is another range's; or damage, seen as a gap.
            if any(piece.is_block for piece in pieces):
                raise RangeError(f"no block decodes at byte {start + bit // 8}")
    return b"".join(decoded), pieces


def find_marks(data: bytes) -> Iterator[tuple[int, bool]]:
    """Every bit at which a mark begins, in order, and whether it is a block's."""
    found = []
    for mark in (BZIP2_BLOCK, BZIP2_END):
        for shift in range(8):
            # The bytes that the mark fills wholly, where it begins ``shift`` bits into a byte.
            whole = (mark << (8 - shift) & (1 << 56) - 1).to_bytes(7, "big") if shift else mark.to_bytes(6, "big")
            wanted = whole[1:6] if shift else whole
            at = data.find(wanted)
            while at >= 0:
                bit = 8 * (at - 1) + shift if shift else 8 * at
                if bit >= 0 and _read_bits(data, bit, MARK_BITS) == mark:
                    found.append((bit, mark == BZIP2_BLOCK))
                at = data.find(wanted, at + 1)
    yield from sorted(found)


def check_chain(pieces: Iterable[Piece], num_bytes: int) -> None:
    """Raise RangeError where the pieces of all ranges, in order, are not a whole file of bzip2 streams."""
    expected, combined, is_open = 8 * len(BZIP2_HEADER), 0, True
    for piece in pieces:
        if not is_open or piece.start != expected:
            raise RangeError(f"a block is missing near byte {expected // 8}")
        if piece.is_block:
            combined, expected = combine(combined, piece.crc), piece.end
            continue
        if piece.crc != combined:
            raise RangeError(f"the stream that ends at byte {piece.start // 8} lacks a block")
        at = -(-piece.end // 8)
        combined, expected, is_open = 0, 8 * (at + len(BZIP2_HEADER)), piece.opens
        if not is_open and at != num_bytes:
            raise RangeError(f"{num_bytes - at} bytes follow the end of the stream at byte {at}")
    if is_open:
        raise RangeError(f"the stream is truncated at byte {num_bytes}")


def _is_header(data: bytes) -> bool:
    return data[:3] == BZIP2_HEADER[:3] and data[3:4] in {b"%d" % size for size in range(1, 10)}


def _run(marks: Sequence[tuple[int, bool]], number: int, end: int) -> list[int]:
    """The bits where the blocks from mark ``number`` on begin, as long as they begin before ``end``, and the bit behind the last.

    None where no mark stands behind the last.
    """
    bits = []
    for bit, is_block in marks[number:]:
        bits.append(bit)
        if not is_block or bit >= end:
            return bits
    return []


def _decode_run(data: bytes, bits: Sequence[int]) -> bytes | None:
    """Blocks that follow each other, as ``_run`` gives them; None where one is a mark by chance, or damaged.

    indexed_bzip2 takes two thirds of the time that bz2 does, and on one thread checks the CRC of the whole stream too.
    """
    stream = io.BytesIO(_as_stream(data, bits))
    try:
        with indexed_bzip2.IndexedBzip2File(stream, parallelization=1) as blocks:
            text: bytes = blocks.read()
            return text
    except (OSError, RuntimeError, ValueError, LookupError, ArithmeticError):  # what C++ raises becomes one of these
        return None


def _decode_block(data: bytes, first: int, last: int) -> bytes | None:
    """The block of the bits from ``first`` to ``last``; None where they are no block."""
    try:
        return bz2.decompress(_as_stream(data, [first, last]))
    except (OSError, ValueError, EOFError):
        return None


def _as_stream(data: bytes, bits: Sequence[int]) -> bytes:
    """The blocks that begin at these bits, of which the last one is where they end, as a stream of their own."""
    whole, left = divmod(bits[-1] - bits[0], 8)
    shifted = _shift(data, bits[0], whole + 1)
    combined = 0
    for first in bits[:-1]:
        combined = combine(combined, _crc(data, first))
    end = (int(shifted[whole]) >> (8 - left)) << BZIP2_MARK_BITS | BZIP2_END << 32 | combined
    tail_bits = left + BZIP2_MARK_BITS
    tail = (end << -tail_bits % 8).to_bytes(-(-tail_bits // 8), "big")
    return BZIP2_HEADER + shifted[:whole].tobytes() + tail


def _shift(data: bytes, bit: int, num_bytes: int) -> npt.NDArray[np.uint8]:
    """So many bytes from a bit on; zeros behind the end."""
    some = np.frombuffer(data[bit // 8 : bit // 8 + num_bytes + 1].ljust(num_bytes + 1, b"\0"), np.uint8)
    shift = bit % 8
    return (some[:-1] << shift | some[1:] >> (8 - shift)).astype(np.uint8) if shift else some[:-1]


def _crc(data: bytes, bit: int) -> int:
    return _read_bits(data, bit + MARK_BITS, 32)


def _read_bits(data: bytes, bit: int, number: int) -> int:
    some = data[bit // 8 : (bit + number + 7) // 8].ljust(-(-(bit % 8 + number) // 8), b"\0")
    return int.from_bytes(some, "big") >> (-(bit + number) % 8) & (1 << number) - 1
