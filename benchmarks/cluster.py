"""Measures what a cluster's engine takes of the time: documents to tokens and blocks by its workers on this machine.

`python -m benchmarks.cluster dask ARCHIVE --store DIR --workers 2 --tokenizer DIR` starts a scheduler and workers on loopback.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from benchmarks.inputs import Inputs, read_inputs
from benchmarks.measure import measure
from tasks.cluster.cluster import Cluster
from tasks.corpus.blocks import BlocksSpec, build_blocks
from tasks.corpus.tokens import TokensSpec, build_tokens
from tasks.machine import Machine
from tests.cluster.engines import cluster_of, wait_for
from tests.cluster.work import cache


def run(kind: Literal["dask", "ray"], address: str, inputs: Inputs) -> Mapping[str, float]:
    cluster = Cluster(kind, address, cache)
    wait_for(lambda: cluster.engine.num_slots() >= inputs.num_workers)
    documents, tokenizer = inputs.documents(), inputs.tokenizer()
    cluster.run(len, ["start"] * inputs.num_workers, "start", lambda amount: None)
    started = cluster.work_seconds, cluster.cost_seconds, cluster.num_groups
    tokens = build_tokens(inputs.store, Machine(cluster=cluster), TokensSpec(), documents=documents, tokenizer=tokenizer)
    build_blocks(inputs.store, Machine(cluster=cluster), BlocksSpec(), tokens=tokens)
    work, cost = cluster.work_seconds - started[0], cluster.cost_seconds - started[1]
    return {
        "bytes": sum(tokens.stats[split]["num_bytes"] for split in ("train", "validation")),
        "num_shards": 2 * len(list(tokens.shards())),
        "num_groups": cluster.num_groups - started[2],
        "work_seconds": round(work, 2),
        "runner_seconds": round(cost, 3),
        "runner_share": round(cost / (work + cost), 4),
        "seconds_to_start": round(started[1], 2),
    }


if __name__ == "__main__":
    kind: Literal["dask", "ray"] = "ray" if sys.argv.pop(1) == "ray" else "dask"
    told = read_inputs(__doc__)
    told.forget("tokens", "tokens-shard", "blocks", "blocks-shard")
    with cluster_of(kind, Path(tempfile.mkdtemp()), told.num_workers) as started:
        measure(f"cluster-{kind}", lambda: run(kind, started.address, told))
