"""An archive that is cut short, or has a wrong bit, gives no documents: the error names the archive and the place."""

import bz2
import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tasks.corpus.documents import DocumentsSpec, build_documents
from tasks.errors import CorpusError
from tasks.machine import Machine
from tasks.store import ArtifactStore
from tests.corpus.archives import tar_of_one
from tests.corpus.conftest import store_archive
from tests.faults.corpus import json_lines

FORMS: dict[str, Callable[[bytes], bytes]] = {
    "tar.bz2": lambda data: bz2.compress(tar_of_one(data), 1),
    "bz2": lambda data: bz2.compress(data, 1),
    "tar.gz": lambda data: gzip.compress(tar_of_one(data)),
    "gz": gzip.compress,
    "tar.zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(tar_of_one(data)),
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    "tar": tar_of_one,
}
PLACE = r"near byte [\d,]+ of [\d,]+|at byte [\d,]+|ending at byte [\d,]+|member corpus\.jsonl is truncated"


def refuse(root: Path, data: bytes, num_workers: int) -> list[str]:
    """What is said of an archive that gives no documents; it is said again by the next run."""
    store = ArtifactStore(root)
    archive = store_archive(store, data)
    said = []
    for _ in range(2):
        with pytest.raises(CorpusError, match=PLACE) as caught:
            build_documents(store, Machine(num_workers=num_workers), DocumentsSpec(shard_bytes=32_768), archive=archive)
        said.append(str(caught.value))
    assert list(store.artifacts("documents")) == []
    assert said[0].startswith(f"{archive.file('archive')}: ")
    assert "\n" not in said[0]
    return said


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("share", [0.4, 0.9])
@pytest.mark.parametrize("form", FORMS)
def test_an_archive_cut_in_the_middle_gives_no_documents(form: str, share: float, num_workers: int, tmp_path: Path) -> None:
    data = FORMS[form](json_lines())
    first, second = refuse(tmp_path, data[: int(len(data) * share)], num_workers)
    assert first == second


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("form", ["tar.bz2", "bz2"])
def test_a_bzip2_block_with_a_flipped_bit_gives_no_documents(form: str, num_workers: int, tmp_path: Path) -> None:
    data = bytearray(FORMS[form](json_lines()))
    data[len(data) * 2 // 3] ^= 4
    refuse(tmp_path, bytes(data), num_workers)
