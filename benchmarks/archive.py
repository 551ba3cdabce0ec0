"""Measures a fetch over http from loopback: reading, both digests, writing. `python -m benchmarks.archive [MEGABYTES]`."""

import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.measure import measure
from tasks.corpus.archive import ArchiveSpec, build_archive
from tasks.machine import Machine
from tasks.store import ArtifactStore

BLOCK = bytes(range(256)) * 4096  # 1 MB


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder without a line for every request."""

    def log_message(self, *arguments: Any) -> None:
        pass


def run(store: ArtifactStore, url: str) -> Mapping[str, Any]:
    archive = build_archive(store, Machine(), ArchiveSpec(url=url))
    return {"bytes": archive.stats["num_bytes"], "from": url.partition(":")[0]}


def main(num_megabytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        published = Path(folder, "published")
        published.mkdir()
        with (published / "archive").open("wb") as target:
            for _ in range(num_megabytes):
                target.write(BLOCK)
        with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(published))) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_address[1]}/archive"
            measure("archive", lambda: run(ArtifactStore(Path(folder, "http")), url))
            server.shutdown()
        measure("archive", lambda: run(ArtifactStore(Path(folder, "file")), f"file:{published / 'archive'}"))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
