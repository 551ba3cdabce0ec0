"""The checkpoint to go on from: the newest whole one, here or in the bucket; what is only there is fetched.

Reads   checkpoints/checkpoint-<step>/*, and the bucket: see tasks.training.remote
Writes  checkpoints/checkpoint-<step>/*, metrics.jsonl   as they were on another machine
"""

import logging
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from tasks.errors import StoreError
from tasks.machine import Progress
from tasks.store import write_atomically
from tasks.training.checkpoints import (
    PARTS,
    WEIGHT,
    check_facts,
    checkpoint_folders,
    is_cut_alike,
    newest_checkpoint,
    part_name,
    step_of,
    verified,
)
from tasks.training.metrics import read_metrics
from tasks.training.remote import Kept, RemoteCheckpoints

log = logging.getLogger(__name__)


def needed_files(manifest: dict[str, Any], facts: dict[str, Any], ranks: Sequence[int]) -> list[str]:
    """The files of a checkpoint that a node with these ranks reads, of a training with ``facts``.

    With as many ranks as wrote it, under the same stage and file of DeepSpeed, each rank reads its own; else the cuts fall
    elsewhere, and any may be read.
    """
    files = list(manifest["files"])
    if not is_cut_alike(manifest["facts"], facts):
        return files
    own = {part_name(rank) for rank in ranks}
    return [name for name in files if not fnmatch(name, PARTS) or name in own]


def files_to_fetch(remote: RemoteCheckpoints, kept: Kept, facts: dict[str, Any], ranks: Sequence[int]) -> list[str]:
    """``needed_files`` of a checkpoint in the bucket; under ZeRO-3 those alone in which these ranks' cuts lie, whoever wrote it.

    ZeRO-3 cuts each weight into as many equal parts as there are ranks, so what the files hold tells which a rank reads.
    """
    needed = needed_files(kept.manifest, facts, ranks)
    parts = [name for name in needed if fnmatch(name, PARTS)]
    if facts["zero_stage"] != 3 or is_cut_alike(kept.manifest["facts"], facts) or len(ranks) == facts["num_ranks"]:
        return needed
    try:
        held = [_held(header) for header in remote.headers(kept, parts)]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        log.warning("%s/checkpoint-%d: all of it is fetched (%s)", remote.address, kept.step, error)
        return needed
    read = overlapping(dict(zip(parts, held, strict=True)), facts["num_ranks"], ranks)
    return [name for name in needed if name not in parts or name in read]


def _held(header: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Start and end of what a rank's file holds of each weight."""
    held = {}
    for key, entry in header.items():
        part, _, place = key.partition(":")
        if part == WEIGHT:
            start, _, name = place.partition(":")
            held[name] = int(start), int(start) + int(entry["shape"][0])
    return held


def overlapping(held: dict[str, dict[str, tuple[int, int]]], num_ranks: int, ranks: Sequence[int]) -> set[str]:
    """The files that hold numbers of which ``ranks``, one after the other, have a part each under ZeRO-3.

    held: of each file, by weight, start and end of its numbers.
    """
    counts: dict[str, int] = {}
    for places in held.values():
        for name, (_, end) in places.items():
            counts[name] = max(counts.get(name, 0), end)
    sizes = {name: -(-count // num_ranks) for name, count in counts.items()}
    first, last = min(ranks), max(ranks) + 1
    return {
        file
        for file, places in held.items()
        if any(start < last * sizes[name] and first * sizes[name] < end for name, (start, end) in places.items())
    }


def newest_anywhere(
    root: Path, remote: RemoteCheckpoints | None, facts: dict[str, Any], ranks: Sequence[int], progress: Progress
) -> Path | None:
    """The newest checkpoint that is whole, in ``root`` or in the bucket; says which it passed over and why.

    From the bucket comes what ``ranks`` read. Raises StoreError as ``newest_checkpoint``, where the bucket does not answer, and
    where it has checkpoints of which none can be used.
    """
    if remote is None:
        return newest_checkpoint(root, facts)
    kept = {one.step: one for one in remote.kept()}
    for step in sorted({*kept, *map(step_of, checkpoint_folders(root))}, reverse=True):
        folder = root / f"checkpoint-{step}"
        where, fetch = str(folder), None
        if one := kept.get(step):
            where = f"{remote.address}/{folder.name}"
            check_facts(where, remote.address, one.manifest["facts"], facts)
            fetch = partial(_fetch, remote, one, partial(files_to_fetch, remote, one, facts, ranks), folder, progress)
        if problem := _problem(folder, facts, fetch):
            log.warning("%s: passed over: %s", where, problem)
            continue
        return folder
    if kept:  # to begin anew would delete them, and it may be this machine that reads them wrong
        raise StoreError(
            f"{remote.address}: none of its checkpoints (steps {', '.join(map(str, kept))}) can be used here; look at the "
            "warnings above, or delete it to start over"
        )
    return None


def _problem(folder: Path, facts: dict[str, Any], fetch: Callable[[], str | None] | None) -> str | None:
    """What is wrong with one checkpoint, None where it can be gone on from: it is then in ``folder``."""
    manifest, problem = verified(folder)
    if manifest is None:
        return fetch() if fetch else problem
    check_facts(str(folder), str(folder.parent), manifest["facts"], facts)
    return None


def _fetch(
    remote: RemoteCheckpoints, kept: Kept, find_names: Callable[[], list[str]], folder: Path, progress: Progress
) -> str | None:
    names = find_names()
    size = sum(kept.files[name]["num_bytes"] for name in names)
    with progress(f"fetch {folder.name}", size, "B") as advance:
        problem = remote.fetch(kept, names, folder, advance)
    if problem is None:
        log.info("%s/%s: fetched, %d of %d files, %.1f MB", remote.address, folder.name, len(names), len(kept.files), size / 1e6)
    return problem


def take_up_metrics(path: Path, remote: RemoteCheckpoints, step: int) -> None:
    """The reports up to a checkpoint's step, where another machine made more of them than this one knows."""
    kept = next((one for one in remote.kept() if one.step == step), None)
    if kept is None or (data := remote.metrics(kept)) is None:
        return
    own = [row for row in read_metrics(path) if row["step"] <= step]
    if data.count(b"\n") > len(own):
        write_atomically(path, data)
