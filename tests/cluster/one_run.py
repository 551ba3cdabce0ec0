"""A run of its own process, as on a node of its own: `python -m tests.cluster.one_run KIND ADDRESS FOLDER WHAT`.

WHAT: "corpus" prints keys and contents of the corpus's stages; "marks" prints what came of many small items.
"""

import sys
from pathlib import Path

import orjson

from tasks.cluster.cluster import Cluster, Patience
from tasks.corpus import many_readers
from tasks.machine import Machine
from tasks.store import SharedStore
from tests.faults.corpus import Sources, build_all

from . import work

NUM_MARKS = 400


def main(kind: str, address: str, folder: Path, what: str) -> None:
    patience = Patience(late_seconds=3.0, first_late_seconds=20.0)
    cluster = Cluster("ray" if kind == "ray" else "dask", address, work.cache, patience=patience)
    if what == "corpus":
        many_readers.RANGE_BYTES = 4_000
        sources = Sources(str(folder / "sources" / "corpus"), str(folder / "sources" / "conversations"))
        built = build_all(SharedStore((folder / "bucket").as_uri(), folder / "here"), Machine(cluster=cluster), sources)
        told = {name: [artifact.key, artifact.content] for name, artifact in built.items()}
    else:
        marks = [work.Mark(folder / "marks", number) for number in range(NUM_MARKS)]
        told = {"done": cluster.run(work.take_a_while, marks, "marks", lambda amount: None)}
    (folder / f"{what}.json").write_bytes(orjson.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
