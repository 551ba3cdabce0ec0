import bz2
import gzip
import random
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tasks.corpus import reader
from tasks.corpus.compressed import open_decompressed
from tasks.corpus.reader import BadLine, read_records
from tasks.errors import CorpusError
from tests.corpus.archives import tar_of, tar_of_one

LINES = '{"text":"春眠不觉晓"}\n\n{"text":"b"}'.encode()
RECORDS = [(1, {"text": "春眠不觉晓"}), (3, {"text": "b"})]

# Several bzip2 blocks of 100 kB of text that does not compress away.
LONG = b"".join(b'{"text":"%d"}\n' % random.Random(7).getrandbits(4000) for _ in range(1)) + b"".join(
    b'{"text":"%x"}\n' % random.Random(n).getrandbits(4000) for n in range(400)
)


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "archive"
    path.write_bytes(data)
    return path


def as_is(data: bytes) -> bytes:
    return data


@pytest.mark.parametrize("wrap", [as_is, tar_of_one])
@pytest.mark.parametrize("compress", [as_is, gzip.compress, bz2.compress, zstandard.compress])
def test_every_form_gives_the_same_records_and_tells_every_byte(tmp_path, wrap, compress) -> None:
    path, told = write(tmp_path, compress(wrap(LINES))), []
    assert list(read_records(path, told.append)) == RECORDS
    assert sum(told) == path.stat().st_size


def test_lines_are_numbered_from_1_with_blank_ones_counted(tmp_path) -> None:
    assert list(read_records(write(tmp_path, b"1\r\n\n3"))) == [(1, 1), (3, 3)]


def test_a_line_that_spans_reads_comes_out_whole(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", 3)
    assert list(read_records(write(tmp_path, b"12345678\n\n9\n"))) == [(1, 12345678), (3, 9)]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path) -> None:
    path = write(tmp_path, '{"text":"a\u2028b\x85"}\n'.encode())
    assert list(read_records(path)) == [(1, {"text": "a\u2028b\x85"})]


def test_a_byte_order_mark_is_passed_over(tmp_path) -> None:
    assert list(read_records(write(tmp_path, b"\xef\xbb\xbf" + LINES))) == RECORDS


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"nonsense", "not JSON"),
        (b'{"text":"a"', "not JSON"),
        (b'{"text":"a"} {}', "not JSON"),
        (b'{"text":"\xff\xfe"}', "not UTF-8"),
        (rb'{"text":"\ud83d"}', "not JSON"),  # half a surrogate pair
        ('{"text":"a"}'.encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_bad_line_comes_out_as_one(tmp_path, line, reason) -> None:
    ((number, bad), after) = read_records(write(tmp_path, line + b"\n{}"))
    assert (number, after) == (1, (2, {}))
    assert isinstance(bad, BadLine)
    assert bad.reason.startswith(reason)
    assert bad.excerpt == line


def test_a_bad_line_is_excerpted(tmp_path) -> None:
    ((_, bad),) = read_records(write(tmp_path, b"x" * 5000))
    assert isinstance(bad, BadLine)
    assert bad.excerpt == b"x" * 200


def test_a_json_array_gives_its_elements(tmp_path) -> None:
    assert list(read_records(write(tmp_path, b' [{"a": 1},\n {"a": 2}]'))) == [(1, {"a": 1}), (2, {"a": 2})]


def test_a_byte_order_mark_may_stand_before_an_array(tmp_path) -> None:
    assert list(read_records(write(tmp_path, b"\xef\xbb\xbf [1, 2]"))) == [(1, 1), (2, 2)]


def test_an_array_cut_short_is_refused(tmp_path) -> None:
    with pytest.raises(CorpusError, match="begins as a JSON array, and is not one"):
        list(read_records(write(tmp_path, b'[{"a": 1},')))


def test_parquet_gives_its_rows(tmp_path) -> None:
    path, told = tmp_path / "archive", []
    pq.write_table(pa.table({"text": ["a", None], "n": [1, 2]}), path)
    assert list(read_records(path, told.append)) == [(1, {"text": "a", "n": 1}), (2, {"text": None, "n": 2})]
    assert sum(told) == path.stat().st_size


def test_a_parquet_text_that_is_not_utf_8_is_a_bad_line(tmp_path) -> None:
    offsets, data = pa.py_buffer(np.array([0, 2, 4], np.int32)), pa.py_buffer(b"ok\xff\xfe")
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(2, offsets, data)}), tmp_path / "archive")
    assert list(read_records(tmp_path / "archive")) == [(1, {"text": "ok"}), (2, BadLine("not UTF-8", b"\xff\xfe"))]


def test_parquet_cut_short_is_refused(tmp_path) -> None:
    path = tmp_path / "archive"
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(CorpusError, match="not readable as Parquet"):
        list(read_records(write(tmp_path, path.read_bytes()[:-20])))


def test_a_line_of_no_end_is_refused_instead_of_filling_the_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reader, "MAX_LINE_BYTES", 10)
    with pytest.raises(CorpusError, match="line 2 is longer than 10 bytes"):
        list(read_records(write(tmp_path, b"1\n" + b"2" * 11)))


@pytest.mark.parametrize("data", [b"", gzip.compress(b"", mtime=0), bz2.compress(b""), tar_of_one(b"")])
def test_an_empty_archive_is_refused(tmp_path, data) -> None:
    with pytest.raises(CorpusError, match="the archive is empty"):
        list(read_records(write(tmp_path, data)))


REGULAR = ("a.jsonl", LINES, tarfile.REGTYPE)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([REGULAR, ("b.jsonl", LINES, tarfile.REGTYPE)], "a second member b.jsonl after a.jsonl"),
        ([REGULAR, ("b.jsonl", b"", tarfile.REGTYPE)], "a second member b.jsonl after a.jsonl"),
        ([("._a.jsonl", b"x", tarfile.REGTYPE), REGULAR], "a second member a.jsonl after ._a.jsonl.*COPYFILE_DISABLE"),
        ([("a", b"", tarfile.SYMTYPE)], "member a is a link"),
        ([REGULAR, ("b", b"", tarfile.LNKTYPE)], "member b is a link"),
        ([("a", b"", tarfile.CHRTYPE)], "member a is a device"),
        ([("a", b"", tarfile.FIFOTYPE)], "member a is a device"),
        ([("/etc/a", LINES, tarfile.REGTYPE)], "member /etc/a has an absolute or dotted path"),
        ([("x/../../a", LINES, tarfile.REGTYPE)], "member x/../../a has an absolute or dotted path"),
        ([], "a tar without a regular member"),
        ([("folder", b"", tarfile.DIRTYPE)], "a tar without a regular member"),
    ],
)
@pytest.mark.parametrize("compress", [as_is, bz2.compress])
def test_a_tar_of_anything_but_one_regular_member_is_refused(tmp_path, members, message, compress) -> None:
    with pytest.raises(CorpusError, match=message):
        list(read_records(write(tmp_path, compress(tar_of(*members)))))


def test_a_tar_behind_a_tar_is_refused_not_lost(tmp_path) -> None:
    with pytest.raises(CorpusError, match=r"a second member corpus\.jsonl"):
        list(read_records(write(tmp_path, tar_of_one(LINES) * 2)))


def test_a_member_behind_a_damaged_header_is_refused_not_lost(tmp_path) -> None:
    one = tar_of_one(LINES)
    behind = tar_of(("second.jsonl", LINES, tarfile.REGTYPE)).replace(b"second", b"damage", 1)  # another checksum now
    with pytest.raises(CorpusError, match="the tar is truncated or damaged"):
        list(read_records(write(tmp_path, one + behind)))


def test_a_tar_that_opens_with_a_damaged_extended_header_is_refused(tmp_path) -> None:
    data = bytearray(tar_of(("x" * 120, LINES, tarfile.REGTYPE)))
    data[tarfile.BLOCKSIZE * 2] ^= 1  # the member's own header, behind the one that holds its long name
    with pytest.raises(CorpusError, match="the tar is truncated or damaged"):
        list(read_records(write(tmp_path, bytes(data))))


def test_a_member_may_lie_in_a_folder(tmp_path) -> None:
    data = tar_of(("data", b"", tarfile.DIRTYPE), ("data/corpus.jsonl", LINES, tarfile.REGTYPE))
    assert list(read_records(write(tmp_path, data))) == RECORDS


@pytest.mark.parametrize("size", [600, 5_000, 100_000])
def test_a_tar_cut_short_is_refused(tmp_path, size) -> None:
    with pytest.raises(CorpusError, match=r"member corpus\.jsonl is truncated"):
        list(read_records(write(tmp_path, tar_of_one(LONG)[:size])))


def read_all(path: Path, num_threads: int) -> bytes:
    with open_decompressed(path, lambda amount: None, num_threads) as stream:
        return b"".join(iter(lambda: stream.read(50_000), b""))


COMPRESSED = {
    ("gzip", 1): gzip.compress(LONG, mtime=0),
    ("zstd", 1): zstandard.ZstdCompressor(write_checksum=True).compress(LONG),
    ("bz2", 1): bz2.compress(LONG, 1),
    ("bz2", 2): bz2.compress(LONG, 1),
}


@pytest.mark.parametrize("codec", COMPRESSED, ids=str)
@pytest.mark.parametrize("cut", [1, 3, 11, 4_000, 100_000], ids=lambda cut: f"{cut} bytes short")
def test_a_compressed_stream_cut_short_never_ends_quietly(tmp_path, codec, cut) -> None:
    with pytest.raises(CorpusError, match=r"truncated.*fetch the archive again"):
        read_all(write(tmp_path, COMPRESSED[codec][:-cut]), codec[1])


@pytest.mark.parametrize("codec", COMPRESSED, ids=str)
@pytest.mark.parametrize("place", [0.3, 0.5, 0.9999])
def test_a_flipped_bit_is_refused(tmp_path, codec, place) -> None:
    data = bytearray(COMPRESSED[codec])
    data[int(len(data) * place) - 1] ^= 4
    with pytest.raises(CorpusError, match="fetch the archive again"):
        read_all(write(tmp_path, bytes(data)), codec[1])


@pytest.mark.parametrize("codec", COMPRESSED, ids=str)
def test_bytes_behind_the_stream_are_refused(tmp_path, codec) -> None:
    with pytest.raises(CorpusError, match="fetch the archive again"):
        read_all(write(tmp_path, COMPRESSED[codec] + b"something else"), codec[1])


@pytest.mark.parametrize("codec", COMPRESSED, ids=str)
def test_streams_end_to_end_are_one(tmp_path, codec) -> None:
    assert read_all(write(tmp_path, COMPRESSED[codec] * 2), codec[1]) == LONG * 2


@pytest.mark.parametrize("num_threads", [1, 2])
def test_damage_that_is_met_only_as_the_end_is_checked_is_told(tmp_path, num_threads) -> None:
    damaged = bytearray(bz2.compress(bytes(1000)))
    damaged[12] ^= 1  # of the block's CRC
    behind = bz2.compress(bytes(4 << 20))  # more than is decoded ahead
    path = write(tmp_path, bz2.compress(b"member") + behind + damaged)
    with open_decompressed(path, lambda amount: None, num_threads) as stream:
        assert stream.read(6) == b"member"
        with pytest.raises(CorpusError, match="truncated or damaged"):
            stream.read(0)  # as the reader does behind a tar's member


def test_bzip2_blocks_that_were_lost_from_the_middle_are_missed(tmp_path) -> None:
    """The magic of a block is overwritten: the decoder that looks for it passes over the block."""
    data = bytearray(COMPRESSED["bz2", 2])
    bits = "".join(f"{byte:08b}" for byte in data)
    place = bits.index(f"{0x314159265359:048b}", 100)
    data[place // 8 + 2] ^= 0xFF
    with pytest.raises(CorpusError, match="fetch the archive again"):
        read_all(write(tmp_path, bytes(data)), 2)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\xfd7zXZ\x00"])
def test_formats_that_cannot_be_streamed_are_named(tmp_path, start) -> None:
    with pytest.raises(CorpusError, match=r"which cannot be streamed here; publish it as"):
        list(read_records(write(tmp_path, start + b"....")))


def test_parquet_inside_a_tar_is_named(tmp_path) -> None:
    with pytest.raises(CorpusError, match="Parquet inside another file"):
        list(read_records(write(tmp_path, tar_of_one(b"PAR1...."))))
