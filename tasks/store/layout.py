"""What is where in a bucket: the names of an artifact's objects.

<kind>/<key>/manifest.json       the commit
<kind>/<key>/<place>/<file>      files; the place is drawn anew for every build, and stands in the manifest
"""

import re
import secrets
from pathlib import PurePosixPath
from typing import Any

from pydantic import ValidationError

from tasks.store.artifact import MANIFEST_NAME, FileEntry, Manifest
from tasks.store.store import KIND

PLACE = "place"
DIGEST = re.compile(r"[0-9a-f]{64}")
NUMBER = re.compile(r"[0-9a-f]{16}")


def new_number() -> str:
    """A name that nobody else draws."""
    return secrets.token_hex(8)


def placed(produced_by: dict[str, Any]) -> dict[str, Any]:
    """What produced an artifact, with a place of its own in the bucket."""
    return {**produced_by, PLACE: new_number()}


def moved(manifest: Manifest) -> Manifest:
    """The manifest with another place for its files."""
    return manifest.model_copy(update={"produced_by": placed(manifest.produced_by)})


def place_of(manifest: Manifest) -> str | None:
    """Where its files are; None where each is below its digest, as before builds had places."""
    place = manifest.produced_by.get(PLACE)
    return str(place) if place is not None else None


def places_of(manifest: Manifest) -> set[str]:
    """The folders that hold its files."""
    place = place_of(manifest)
    return {entry.digest for entry in manifest.files} if place is None else {place}


def manifest_name(kind: str, key: str) -> str:
    return f"{kind}/{key}/{MANIFEST_NAME}"


def file_name(manifest: Manifest, entry: FileEntry) -> str:
    return f"{manifest.kind}/{manifest.key}/{place_of(manifest) or entry.digest}/{entry.name}"


def is_place(name: str) -> bool:
    """Whether a folder below a key can hold files of a build: what else lies in a bucket is somebody's own."""
    return bool(NUMBER.fullmatch(name) or DIGEST.fullmatch(name))


def read_manifest(kind: str, key: str, data: bytes) -> Manifest | None:
    """The manifest that an object's bytes are; None where it is not to be used: torn, another's, or not plain."""
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError:
        return None
    return manifest if (manifest.kind, manifest.key) == (kind, key) and is_plain(manifest) else None


def is_plain(manifest: Manifest) -> bool:
    """Whether all that becomes a path leads into its folder: a bucket is written by others."""
    files = [PurePosixPath(entry.name) for entry in manifest.files]
    if any(path.is_absolute() or ".." in path.parts or path.name in ("", MANIFEST_NAME) for path in files):
        return False
    place = place_of(manifest)
    digests = [entry.digest for entry in manifest.files] + [entry.key for entry in manifest.shards]
    is_placed = place is None or NUMBER.fullmatch(place) is not None
    return is_placed and all(map(DIGEST.fullmatch, digests)) and all(KIND.fullmatch(entry.kind) for entry in manifest.shards)
