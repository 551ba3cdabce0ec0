"""Checkpoints: whole or not there. A checkpoint's manifest is written last, by rename, and lists every file's digest.

Reads   checkpoints/checkpoint-<step>/*               what Trainer and DeepSpeed saved
Writes  checkpoints/checkpoint-<step>/manifest.json
"""

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from tasks.errors import SettingsError, StoreError
from tasks.store import digest_file, write_atomically
from tasks.store.digest import fsync_tree

log = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
NUM_KEPT = 2  # the newest, and one to fall back to
FOLDER = re.compile(r"^checkpoint-(\d+)$")

# A checkpoint is resumed only where all of these are as they were; what to do where they are not.
SAME_DATA = ("data", "spec")
SAME_MACHINE = ("num_ranks", "zero_stage")


def seal_checkpoint(folder: Path, facts: dict[str, Any]) -> None:
    """Put a saved checkpoint on disk and write its manifest, which makes it exist. Call it once all ranks have saved."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    fsync_tree(folder)
    files = {
        path.relative_to(folder).as_posix(): {"num_bytes": path.stat().st_size, "digest": digest_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_atomically(folder / MANIFEST_NAME, orjson.dumps({"facts": facts, "files": files}))
    fsync_tree(folder)


def prune_checkpoints(root: Path, keep: int = NUM_KEPT) -> None:
    """Delete all but the newest ``keep`` whole checkpoints, and the torn ones older than those."""
    whole = [folder for folder in checkpoint_folders(root) if (folder / MANIFEST_NAME).is_file()]
    for folder in checkpoint_folders(root):
        if len(whole) >= keep and step_of(folder) < step_of(whole[keep - 1]):
            # Its manifest first: a deletion cut short must not leave what looks whole.
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
            shutil.rmtree(folder)


def newest_checkpoint(root: Path, facts: dict[str, Any]) -> Path | None:
    """The newest checkpoint that is whole, digests and all; says which it passed over and why.

    Raises StoreError where it belongs to other data, SettingsError where it was written by another number of ranks or
    under another ZeRO stage.
    """
    for folder in checkpoint_folders(root):
        manifest, problem = _verified(folder)
        if problem:
            log.warning("%s: passed over: %s", folder, problem)
            continue
        assert manifest
        _check_facts(folder, manifest["facts"], facts)
        return folder
    return None


def clear_torn(root: Path, newest: Path | None) -> None:
    """Delete what is newer than the checkpoint to resume from: torn, and about to be written again."""
    for folder in checkpoint_folders(root):
        if newest is None or step_of(folder) > step_of(newest):
            shutil.rmtree(folder)


def checkpoint_folders(root: Path) -> Iterator[Path]:
    """The folders that look like checkpoints, newest first, whole or not."""
    found = [path for path in root.glob("checkpoint-*") if FOLDER.match(path.name) and path.is_dir()]
    return iter(sorted(found, key=step_of, reverse=True))


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was written."""
    found = FOLDER.match(folder.name)
    assert found, folder
    return int(found[1])


def _verified(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The checkpoint's manifest, or what is wrong with the checkpoint."""
    try:
        manifest = orjson.loads((folder / MANIFEST_NAME).read_bytes())
    except FileNotFoundError:
        return None, "no manifest: its writing was cut short"
    except (OSError, orjson.JSONDecodeError) as error:
        return None, f"unreadable manifest ({error})"
    for name, entry in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["num_bytes"]:
            return None, f"{name} is {'missing' if size is None else f'{size} bytes'}, its manifest says {entry['num_bytes']}"
        if digest_file(path) != entry["digest"]:
            return None, f"{name} has another digest than its manifest says"
    return manifest, None


def _check_facts(folder: Path, written: dict[str, Any], now: dict[str, Any]) -> None:
    for name in SAME_DATA:
        if written[name] != now[name]:
            raise StoreError(
                f"{folder}: written for {name} {written[name][:12]}, this run has {now[name][:12]}; "
                f"delete {folder.parent} to start over"
            )
    other = [f"{name} {written[name]} (now {now[name]})" for name in SAME_MACHINE if written[name] != now[name]]
    if other:
        raise SettingsError(
            f"{folder}: written with {', '.join(other)}; use the same again to resume, or delete {folder.parent} to start over"
        )
