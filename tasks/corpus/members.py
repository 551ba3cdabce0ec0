"""The one regular file that an archive holds, whether it is a tar or not, as a stream that may begin in the middle."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

from tasks.corpus.compressed import BEGINNING, Mark, Readable, Stream, open_decompressed
from tasks.errors import CorpusError
from tasks.machine import Advance

READ_BYTES = 1 << 20


class Layout(NamedTuple):
    """Where the member lies in the decompressed bytes; size: None where it is all of them (no tar)."""

    start: int
    size: int | None
    name: str


class Member:
    """The bytes of an archive's one regular file; at its end, the rest of a tar is looked through too."""

    def __init__(self, path: Path, layout: Layout, stream: Stream, offset: int) -> None:
        self.path, self.layout, self.stream = path, layout, stream
        self.left = None if layout.size is None else layout.size - offset

    def read(self, size: int, /) -> bytes:
        if self.left is None:
            return self.stream.read(size)
        data = self.stream.read(min(size, self.left))
        self.left -= len(data)
        if data:
            return data
        if self.left:
            raise CorpusError(
                f"{self.path}: member {self.layout.name} is truncated, it lacks {self.left} bytes; fetch the archive again"
            )
        self._look_behind()
        return b""

    def mark(self, offset: int) -> Mark:
        """Where decompression may begin to read on from byte ``offset`` of the member."""
        return self.stream.mark(self.layout.start + offset)

    def _look_behind(self) -> None:
        """Raise CorpusError for a second member, or where the compressed stream's end is damaged."""
        assert self.layout.size is not None
        _read_exactly(self.stream, -self.layout.size % tarfile.BLOCKSIZE)
        block = _read_exactly(self.stream, tarfile.BLOCKSIZE)
        if len(block) == tarfile.BLOCKSIZE:
            with _open_tar(self.path, _Behind(block, self.stream)) as archive:
                self._refuse_second(_next_regular(self.path, archive))
        while self.stream.read(READ_BYTES):
            pass

    def _refuse_second(self, second: tarfile.TarInfo | None) -> None:
        if second:
            name = self.layout.name
            raise CorpusError(
                f"{self.path}: a second member {second.name} after {name}; publish a tar with one regular file"
                + (" (macOS adds ._ files: set COPYFILE_DISABLE=1)" if "._" in second.name + name else "")
            )


@contextmanager
def open_member(path: Path, advance: Advance, num_threads: int = 1, offset: int = 0, mark: Mark = BEGINNING) -> Iterator[Member]:
    """Open an archive's one regular file as decompressed bytes, from byte ``offset`` of it.

    num_threads: for decompression. mark: what ``Member.mark`` said of ``offset``.
    """
    layout = find_member(path)
    with open_decompressed(path, advance, num_threads, layout.start + offset, mark) as stream:
        yield Member(path, layout, stream, offset)


def find_member(path: Path) -> Layout:
    """Where the one regular file lies; whether the archive is a tar is told by its first block."""
    with open_decompressed(path, lambda amount: None) as stream:
        block = _read_exactly(stream, tarfile.BLOCKSIZE)
        if not _is_tar_header(block):
            return Layout(0, None, path.name)
        with _open_tar(path, _Behind(block, stream)) as archive:
            info = _next_regular(path, archive)
    if info is None:
        raise CorpusError(f"{path}: a tar without a regular member; publish one with the corpus as its one file")
    return Layout(info.offset_data, info.size, info.name)


def _read_exactly(stream: Readable, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


def _is_tar_header(block: bytes) -> bool:
    if len(block) < tarfile.BLOCKSIZE:
        return False
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return not any(block)  # a tar without members is all zeros
    return True


class _Behind:
    """A stream with a block in front that was read of it already."""

    def __init__(self, block: bytes, stream: Readable) -> None:
        self.block, self.stream = block, stream

    def read(self, size: int, /) -> bytes:
        if self.block:
            data, self.block = self.block[:size], self.block[size:]
            return data
        return self.stream.read(size)


class _Header(tarfile.TarInfo):
    """A member's header. ``ignore_zeros`` passes over damaged ones too, and so over the members behind them: not here."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error


@contextmanager
def _open_tar(path: Path, source: Readable) -> Iterator[tarfile.TarFile]:
    # ignore_zeros: a second tar behind the first is seen, and refused, instead of being lost.
    try:
        with tarfile.open(
            fileobj=cast(Any, source), mode="r|", bufsize=READ_BYTES, ignore_zeros=True, tarinfo=_Header
        ) as archive:
            yield archive
    except tarfile.ReadError as error:
        raise CorpusError(f"{path}: the tar is truncated or damaged ({error}); fetch the archive again") from error


def _next_regular(path: Path, archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member, past plain folders. Raises CorpusError for what an archive may not hold."""
    while (info := archive.next()) is not None:
        _check(path, info)
        if info.isreg():
            return info
    return None


def _check(path: Path, info: tarfile.TarInfo) -> None:
    place = PurePosixPath(info.name)
    if place.is_absolute() or ".." in place.parts:
        raise CorpusError(f"{path}: member {info.name} has an absolute or dotted path; do not trust this archive")
    if not (info.isreg() or info.isdir()) or info.issparse():
        kind = "a link" if info.issym() or info.islnk() else "a device, a sparse file or another special file"
        raise CorpusError(f"{path}: member {info.name} is {kind}; publish a tar with one regular file")
