"""Checkpoints: whole or not there. A checkpoint's manifest is written last, by rename, and lists every file's digest.

Reads   checkpoints/checkpoint-<step>/*               what the ranks wrote
Writes  checkpoints/checkpoint-<step>/manifest.json   {"facts", "files", "digest": of these two}
"""

import logging
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from tasks.errors import StoreError
from tasks.store import digest_file, digest_json, write_atomically
from tasks.store.digest import fsync_path

log = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
NUM_KEPT = 2  # the newest, and one to fall back to
FOLDER = re.compile(r"^checkpoint-(\d+)$")
PARTS = "rank-*.safetensors"  # what the ranks write; all else in a checkpoint is rank 0's
WEIGHT = "weight"  # in those begins the name of what is not one of AdamW's moments: see tasks.training.state

# A checkpoint is resumed only where these are as they were. The number of ranks and the ZeRO stage may be others.
SAME = ("data", "spec")
NUM_AGAIN, AGAIN_SECONDS = 4, 0.5  # tries at deleting a folder, and between two of them
MOST_FIELDS = 6  # named in the message that refuses a checkpoint


def part_name(rank: int) -> str:
    """The name of a rank's own file."""
    return f"rank-{rank}.safetensors"


def is_cut_alike(written: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether each rank holds the numbers that the rank of its number wrote, by a checkpoint's facts and a training's.

    ZeRO-3 cuts every weight by the ranks' number alone; the order in which the others lay weights is DeepSpeed's, by its file.
    """
    if any(written[name] != now[name] for name in ("num_ranks", "zero_stage")):
        return False
    return now["zero_stage"] == 3 or (written.get("cut") is not None and written.get("cut") == now.get("cut"))


def seal_checkpoint(folder: Path, facts: dict[str, Any], files: dict[str, Any]) -> None:
    """Write a checkpoint's manifest, which makes it exist. Call it once all ranks have saved.

    files: size and digest of each, by name, of files that are on disk.
    """
    fsync_path(folder)  # the files' names
    body = {"facts": facts, "files": files}
    write_atomically(folder / MANIFEST_NAME, orjson.dumps({**body, "digest": digest_json(body)}))
    fsync_path(folder)
    fsync_path(folder.parent)


def prune_checkpoints(root: Path, keep: int = NUM_KEPT) -> None:
    """Delete all but the newest ``keep`` whole checkpoints, and the torn ones older than those."""
    whole = [folder for folder in checkpoint_folders(root) if (folder / MANIFEST_NAME).is_file()]
    for folder in checkpoint_folders(root):
        if len(whole) >= keep and step_of(folder) < step_of(whole[keep - 1]):
            _remove(folder)


def newest_checkpoint(root: Path, facts: dict[str, Any]) -> Path | None:
    """The newest checkpoint that is whole, digests and all; says which it passed over and why.

    Raises StoreError, with the fields that differ, where it belongs to other data or another spec, and where there are some that
    were sealed, of which none can be used.
    """
    for folder in checkpoint_folders(root):
        manifest, problem = verified(folder)
        if problem:
            log.warning("%s: passed over: %s", folder, problem)
            continue
        assert manifest
        check_facts(str(folder), str(root), manifest["facts"], facts)
        return folder
    if newest_sealed(root):  # to begin anew would delete them, and it may be this machine that reads them wrong
        raise StoreError(f"{root}: none of its checkpoints can be used; look at the warnings above, or delete it to start over")
    return None


def newest_sealed(root: Path) -> Path | None:
    """The newest checkpoint that has a manifest, whatever of it is here."""
    return next((folder for folder in checkpoint_folders(root) if (folder / MANIFEST_NAME).is_file()), None)


def clear_torn(root: Path, newest: Path | None) -> None:
    """Delete what is newer than the checkpoint to resume from: torn, and about to be written again."""
    for folder in checkpoint_folders(root):
        if newest is None or step_of(folder) > step_of(newest):
            _remove(folder)


def _remove(folder: Path) -> None:
    # Its manifest first: a deletion cut short must not leave what looks whole.
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    for again in reversed(range(NUM_AGAIN)):
        try:
            shutil.rmtree(folder)
            return
        except OSError:  # a rank that is dying, or an upload, has put a file there meanwhile
            if not again:
                raise
        time.sleep(AGAIN_SECONDS)


def checkpoint_folders(root: Path) -> Iterator[Path]:
    """The folders that look like checkpoints, newest first, whole or not."""
    found = [path for path in root.glob("checkpoint-*") if FOLDER.match(path.name) and path.is_dir()]
    return iter(sorted(found, key=step_of, reverse=True))


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was written."""
    found = FOLDER.match(folder.name)
    assert found, folder
    return int(found[1])


def written_facts(folder: Path) -> dict[str, Any]:
    """What a checkpoint that is whole belongs to, and by how many ranks under which ZeRO stage it was written."""
    facts: dict[str, Any] = read_manifest(folder)["facts"]
    return facts


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole."""
    manifest: dict[str, Any] = orjson.loads((folder / MANIFEST_NAME).read_bytes())
    return manifest


def listed_files(folder: Path) -> list[str]:
    """The names of a whole checkpoint's files."""
    return list(read_manifest(folder)["files"])


def verified(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The checkpoint's manifest, or what is wrong with the checkpoint. Raises StoreError where it cannot be read."""
    try:
        return _verified(folder)
    except OSError as error:  # may pass, as a network's does: no reason to give the checkpoint up
        raise StoreError(f"{folder}: cannot be read ({error.strerror or error}); mend that and run again") from error


def _verified(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    try:
        manifest = read_manifest(folder)
        body = {"facts": manifest["facts"], "files": manifest["files"]}
        digest = manifest["digest"]
    except FileNotFoundError:
        return None, "no manifest: its writing was cut short"
    except orjson.JSONDecodeError as error:
        return None, f"unreadable manifest ({error})"
    except (KeyError, TypeError) as error:
        return None, f"incomplete manifest (no {error})"
    if digest_json(body) != digest:
        return None, "its manifest has another digest than it says"
    problems = (file_problem(folder / name, entry) for name, entry in body["files"].items())
    problem = next((problem for problem in problems if problem), None)
    return (None, problem) if problem else (manifest, None)


def file_problem(path: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with one file of a checkpoint, by its size and digest in the manifest."""
    size = path.stat().st_size if path.is_file() else None
    if size != entry["num_bytes"]:
        return f"{path.name} is {'missing' if size is None else f'{size} bytes'}, its manifest says {entry['num_bytes']}"
    return None if digest_file(path) == entry["digest"] else f"{path.name} has another digest than its manifest says"


def check_facts(where: str, root: str, written: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise StoreError, with the fields that differ, where a checkpoint in ``root`` belongs to other data or another spec."""
    was, is_now = ({name: value for fact in SAME for name, value in _flat(fact, facts[fact])} for facts in (written, now))
    differing = [name for name in sorted(was.keys() | is_now.keys()) if was.get(name) != is_now.get(name)]
    if differing:
        named = ", ".join(f"{name} {_short(was.get(name))} (now {_short(is_now.get(name))})" for name in differing[:MOST_FIELDS])
        more = f" and {len(differing) - MOST_FIELDS} more" if len(differing) > MOST_FIELDS else ""
        raise StoreError(f"{where}: written with {named}{more}; delete {root} to start over")


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A value's fields by dotted name, those within mappings too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
