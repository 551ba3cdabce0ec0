"""A checkpoint of whatever files a test wrote."""

from pathlib import Path
from typing import Any

from tasks.store import digest_file
from tasks.training.checkpoints import MANIFEST_NAME, seal_checkpoint


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Seal ``folder`` with every file that lies in it."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST_NAME]
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    files = {name: {"num_bytes": path.stat().st_size, "digest": digest_file(path)} for name, path in named.items()}
    seal_checkpoint(folder, facts, files)
