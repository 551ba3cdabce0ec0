"""The published bytes, verified: fetched, copied, or found in the store under another key.

Reads   a URL or a local file
Writes  archive/archive   the bytes as published, under one name whatever their form
"""

import hashlib
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import field_validator

from tasks.corpus.fetch import Fetched, Remote, ask, check_room, discard, fetch
from tasks.corpus.sources import check_url, resolve
from tasks.errors import SourceError
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Built, Digest, Spec, Work, digest_file, stage, unkeyed
from tasks.store.digest import READ_BYTES, write_all

log = logging.getLogger(__name__)

ARCHIVE_NAME = "archive"
# An object store's: the MD5 of an object, or of its parts' MD5s and how many they are.
MADE_FROM_BYTES = re.compile(r'etag:"[0-9a-f]{32}(-\d+)?"')


class ArchiveSpec(Spec):
    """Which published bytes. The digest decides: the same bytes under another URL are the same archive."""

    url: str = unkeyed(description="https://, file:, a path, modelscope://owner/name/path[@revision] or hf://datasets/...")
    sha256: str | None = unkeyed(None, description="the SHA-256 that the bytes must have, 64 hexadecimal characters")
    md5: str | None = unkeyed(None, description="the MD5 that the bytes must have, 32 hexadecimal characters")

    @field_validator("url")
    @classmethod
    def _is_known(cls, url: str) -> str:
        return check_url(url)

    @field_validator("sha256")
    @classmethod
    def _is_sha256(cls, value: str | None) -> str | None:
        return _hexadecimal(value, 64)

    @field_validator("md5")
    @classmethod
    def _is_md5(cls, value: str | None) -> str | None:
        return _hexadecimal(value, 32)


def _hexadecimal(value: str | None, length: int) -> str | None:
    if value is not None and not re.fullmatch(rf"[0-9a-fA-F]{{{length}}}", value):
        raise ValueError(f"{value!r} is not {length} hexadecimal characters")
    return value.lower() if value else None


def identify_archive(spec: ArchiveSpec, store: ArtifactStore, machine: Machine) -> str:
    """What the bytes are: the digest that the recipe states, else a local file's own, else what the server calls them.

    Raises SourceError where the file is not there or has another digest than the recipe states, or where the server gives
    neither ETag nor date. With a stated digest a file that is gone does no harm: the store may have its bytes.
    """
    where = resolve(spec.url, machine.endpoints)
    if isinstance(where, Path) and not spec.md5 and (where.is_file() or not spec.sha256):
        _check_local(where)
        with machine.progress("digest", where.stat().st_size, "B") as advance:
            found = store.digests.digest(where, advance)
        if spec.sha256 not in (None, found):
            raise SourceError(
                f"{where}: sha256 {found[:12]} differs from the {spec.sha256[:12]} that the recipe states; leave sha256 out of "
                "the recipe, or give it the file that it was written for"
            )
        return f"sha256:{found}"
    if spec.sha256:
        return f"sha256:{spec.sha256}"
    if spec.md5:
        return f"md5:{spec.md5}"
    assert isinstance(where, str)
    return _identify_remote(spec.url, where, ask(where, machine.tokens))


def _identify_remote(name: str, url: str, remote: Remote) -> str:
    if remote.sha256:
        return f"sha256:{remote.sha256}"
    if remote.validator is None or remote.num_bytes is None:
        raise SourceError(
            f"{url}: the server gives no ETag, or no date and size; state the sha256 or md5 of the file in the recipe"
        )
    return _called(name, remote.validator, remote.num_bytes)


def _called(url: str, validator: str | None, num_bytes: int) -> str:
    """What a server calls the bytes: an ETag that is made from them alone, or a name that holds at its address only.

    Many servers make an ETag from date and size, which a folder of equally large files may share.
    """
    called = f"{validator} {num_bytes}"
    return called if MADE_FROM_BYTES.fullmatch(validator or "") else f"{called} {url}"


@stage("archive", revision=1, identify_source=identify_archive)
def build_archive(work: Work, spec: ArchiveSpec) -> Built:
    """Get the bytes, verify them, record both digests."""
    target = work.folder / ARCHIVE_NAME
    expected = _expected(work.source, spec)
    if adopted := _adopt(work.store, expected, target):
        stats = adopted.stats
        log.info("%s: the bytes are in the store as %s", spec.url, adopted.short)
        return Built(stats, digests={ARCHIVE_NAME: Digest(stats["sha256"])}, produced_by={"adopted": adopted.ref})
    where = resolve(spec.url, work.machine.endpoints)
    if isinstance(where, Path):
        had = _copy(where, work)
    else:
        had = fetch(where, work.scratch, work.machine.progress, tokens=work.machine.tokens)
    if not expected and work.source != _called(spec.url, had.validator, had.num_bytes):
        discard(work.scratch)
        raise SourceError(f"{spec.url}: changed on the server while it was fetched; run again")
    _verify(spec.url, had, expected, work.scratch)
    had.path.rename(target)
    return Built(
        {"num_bytes": had.num_bytes, "sha256": had.sha256, "md5": had.md5},
        digests={ARCHIVE_NAME: Digest(had.sha256)},
        produced_by={"address": str(where)},
    )


def _expected(source: str | None, spec: ArchiveSpec) -> dict[str, str]:
    """The digests that the bytes must have, by name; the identity's own is one of them where it is a digest."""
    stated = {"sha256": spec.sha256, "md5": spec.md5}
    name, _, value = (source or "").partition(":")
    if name in stated:
        stated[name] = value
    return {name: value for name, value in stated.items() if value}


def _adopt(store: ArtifactStore, expected: dict[str, str], target: Path) -> Artifact | None:
    """Link an archive of the same digests that stands in the store under another key, read through once more."""
    for artifact in store.artifacts("archive"):
        is_same = expected and all(artifact.stats.get(name) == value for name, value in expected.items())
        if not is_same or store.damage(artifact):
            continue
        source = artifact.file(ARCHIVE_NAME)
        if digest_file(source) != artifact.stats["sha256"]:
            log.warning("%s: has another digest than its manifest says; not used", artifact.short)
            continue
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, target)
        return artifact
    return None


def _copy(source: Path, work: Work) -> Fetched:
    """Copy a local file, never link it: its owner may write to it again."""
    _check_local(source)
    num_bytes = source.stat().st_size
    partial = work.scratch / "copy"
    partial.unlink(missing_ok=True)
    check_room(work.folder, num_bytes, str(source))
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    with (
        work.machine.progress("archive", num_bytes, "B") as advance,
        source.open("rb", buffering=0) as reader,
        partial.open("wb", buffering=0) as writer,
        ThreadPoolExecutor(1) as beside,  # MD5 takes as long as all the rest
    ):
        while data := reader.read(READ_BYTES):
            of_md5 = beside.submit(md5.update, data)
            write_all(writer, data)
            sha256.update(data)
            of_md5.result()
            size += len(data)
            advance(len(data))
    return Fetched(partial, size, sha256.hexdigest(), md5.hexdigest())


def _verify(url: str, had: Fetched, expected: dict[str, str], scratch: Path) -> None:
    found = {"sha256": had.sha256, "md5": had.md5}
    for name, value in expected.items():
        if found[name] != value:
            had.path.unlink()
            discard(scratch)
            raise SourceError(
                f"{url}: {name} {found[name][:12]} of {had.num_bytes:,} bytes differs from the expected {value[:12]}; "
                "what came is deleted: the file was changed upstream, or the recipe states the digest of another"
            )


def _check_local(path: Path) -> None:
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "no such file"
        raise SourceError(f"{path}: {what}; check the path, which is relative to the current directory")
