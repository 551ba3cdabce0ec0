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
            fetch = partial(_fetch, remote, one, needed_files(one.manifest, facts, ranks), folder, progress)
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


def _fetch(remote: RemoteCheckpoints, kept: Kept, names: Sequence[str], folder: Path, progress: Progress) -> str | None:
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
