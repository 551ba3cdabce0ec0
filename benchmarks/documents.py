"""Measures archive to documents: decompression, parsing, sharding. `python -m benchmarks.documents ARCHIVE --store DIR`."""

from collections.abc import Mapping

from benchmarks.inputs import Inputs, read_inputs
from benchmarks.measure import measure
from tasks.store import Artifact


def run(inputs: Inputs) -> Mapping[str, int]:
    documents: Artifact = inputs.documents()
    splits = [documents.stats[split] for split in ("train", "validation")]
    return {
        "bytes": sum(split["num_bytes"] for split in splits),
        "num_documents": documents.stats["num_documents"],
        "num_shards": sum(split["num_shards"] for split in splits),
        "num_workers": inputs.num_workers,
    }


if __name__ == "__main__":
    told = read_inputs(__doc__)
    told.archive()
    told.forget("documents", "documents-shard")
    measure("documents", lambda: run(told))
