"""An archive to documents by many processes: ranges are read, stitched here, and written as shards, again by all.

Reads   archive          archive
Writes  range-shard                          what each worker reads: tasks.corpus.ranges; in the store for a cluster, which
                                             shares nothing else, and in the build's scratch folder for this machine's pool
        documents-shard  documents.parquet   DOCUMENTS: text

It is the way for what may be read in the middle: bzip2 or plain, JSON Lines or a tar of it. Everything else, and whatever does
not turn out as it should, is left to the one reader, whose word is final.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tasks.corpus.bzip2 import MOST_BLOCK_BYTES, RangeError, check_chain, decode_range
from tasks.corpus.compressed import codec_of
from tasks.corpus.members import Layout, find_member
from tasks.corpus.ranges import RangeSpec, RangeWork, build_range, read_in_pool
from tasks.corpus.reader import BYTE_ORDER_MARK, PARQUET_MAGIC
from tasks.corpus.shards import build_shards
from tasks.corpus.stitching import Stitcher, write_in_pool
from tasks.errors import CorpusError
from tasks.store import Artifact, ArtifactStore, ShardEntry, Work, shard_entry
from tasks.store.lease import end_lease

log = logging.getLogger(__name__)

# Of the archive's file: some 65 MB of text of a bzip2, 2 s of decoding, and 400 MB of a worker's memory. Enters the ranges' keys.
RANGE_BYTES = 16 << 20
PLAIN_RANGE_BYTES = 64 << 20
HEAD_BYTES = 1 << 20

OWN_RANGES = "ranges"  # a store in the build's scratch folder: a build that was killed goes on with it, the commit removes it


class Plan:
    """The ranges of one archive, and where its one file lies in the decompressed bytes."""

    def __init__(self, layout: Layout, specs: Sequence[RangeSpec]) -> None:
        self.layout, self.specs = layout, specs


def plan_ranges(archive: Artifact, scratch: Path, template: RangeSpec) -> Plan | None:
    """The ranges to read; None where one reader is to read the archive. ``template`` says how lines are judged."""
    num_bytes = archive.entry("archive").num_bytes
    if num_bytes < 2 * min(RANGE_BYTES, PLAIN_RANGE_BYTES):
        return None
    head, start = archive.read("archive", 0, HEAD_BYTES + MOST_BLOCK_BYTES), scratch / "head"
    try:
        start.write_bytes(head)
        codec = codec_of(start)
        range_bytes = RANGE_BYTES if codec else PLAIN_RANGE_BYTES
        if codec not in (None, "bz2") or num_bytes < 2 * range_bytes:
            return None
        text = decode_range(head, 0, HEAD_BYTES)[0] if codec else head
        start.write_bytes(text)
        layout = find_member(start) if codec_of(start) is None else None
    except (CorpusError, RangeError) as error:
        log.debug("%s: %s; one reader reads it", archive.ref, error)
        return None
    finally:
        start.unlink(missing_ok=True)
    if layout is None or not _is_lines(text[layout.start :]):
        return None
    places = range(0, num_bytes, range_bytes)
    given = {"codec": codec, "num_bytes": range_bytes}
    specs = [template.model_copy(update={**given, "start": place, "skip": 0 if place else layout.start}) for place in places]
    last = specs[-1]
    specs[-1] = last.model_copy(update={"num_bytes": num_bytes - last.start})
    return Plan(layout, specs)


def _is_lines(text: bytes) -> bool:
    """Whether a member that begins so is JSON Lines: no Parquet, and no one array."""
    first = text.removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
    return bool(first) and first != b"[" and not text.startswith(PARQUET_MAGIC)


def read_ranges(work: Work, plan: Plan, archive: Artifact, stitcher: Stitcher) -> None:
    """Have every range read, and stitch them. Raises RangeError where one reader should look."""
    store = work.store if work.machine.cluster else ArtifactStore(work.scratch / OWN_RANGES)
    items = [RangeWork(spec, {"archive": archive}, store) for spec in plan.specs]
    ranges = build_shards(replace(work, store=store), build_range, read_in_pool, items, "ranges")
    if store is not work.store:
        end_lease(store.root)  # a file server (NFS) keeps the folder of a file that is held open, and the commit removes it
    for one in ranges:
        stitcher.take(one)
    if plan.specs[0].codec:
        check_chain(stitcher.pieces, archive.entry("archive").num_bytes)
    size = plan.layout.size
    stitcher.finish(0 if size is None else stitcher.num_bytes - plan.layout.start - size)


def write_shards(work: Work, stitcher: Stitcher) -> tuple[ShardEntry, ...]:
    """Have every shard written; they come back in order."""
    items = stitcher.shards(work.store)
    artifacts = work.machine.map_shards(write_in_pool, items, "documents")
    return tuple(shard_entry(item.name, artifact) for item, artifact in zip(items, artifacts, strict=True))


def forget_ranges(work: Work) -> None:
    """Give back the disk of ranges that were read for nothing."""
    shutil.rmtree(work.scratch / OWN_RANGES, ignore_errors=True)
