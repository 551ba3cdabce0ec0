"""The store, the planner and the collector on synthetic manifests of a corpus of many shards; what a corpus or model costs.

Writes  DIR/<shards>           a store from archive to blocks, whose shards are real manifests beside sparse files; made once
Prints  one JSON line a measurement, each taken in a process of its own, and at the end the tables of docs/scale.md

`python -m benchmarks.simulate_scale DIR --shards 1000 10000 100000` makes stores of so many shards in all, a third each of
documents, tokens and blocks, and measures on each:
  plan-found      `plan` where all is found: every manifest read, every file's size looked at
  plan-changed    the same with another block_size, so that a reason and an estimate are looked for
  resolve, ls     a key cut short looked up, all artifacts but the shards listed
  gc-kept         the collector where all is needed
  gc-collected    the collector where a tenth as many shards again are needed by nothing
Timings are of a local disk with a warm cache.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from benchmarks.measure import measure
from flows.dag import Node, ending_with, nodes_of
from flows.plan import plan
from flows.recipe import load_recipe
from tasks.corpus.documents import DocumentsSpec
from tasks.machine import Machine
from tasks.report.numbers import count, duration, size
from tasks.store import Artifact, ArtifactStore, ShardEntry, digest_bytes, digest_json
from tasks.store.gc import collect
from tasks.store.origin import environment, high_water
from tasks.store.pins import pin

RECIPE = """
name: simulated
archive: {url: corpus.jsonl.tar.bz2, sha256: "%s"}
tokenizer: {train: {vocab_size: 300}}
blocks: {block_size: 2048}
"""
SHARDED = {"documents": "documents.parquet", "tokens": "tokens.arrow", "blocks": "blocks.arrow"}
KEPT_FILE = {"documents": 22_000_000, "tokens": 53_000_000, "blocks": 53_000_000}  # bytes of a shard's file
MEASUREMENTS = ("plan-found", "plan-changed", "resolve", "ls", "gc-kept", "gc-collected")


def main() -> None:
    told = read_told()
    if told.measure:
        measure_one(told.folder, told.measure)
        return
    for num_shards in told.shards:
        store = made(told.folder / str(num_shards), num_shards)
        for name in told.only or MEASUREMENTS:
            command = [sys.executable, "-m", "benchmarks.simulate_scale", os.fspath(store.root), "--measure", name]
            subprocess.run(command, check=True)
    print(tables(), flush=True)


def read_told() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the stores")
    parser.add_argument("--shards", type=int, nargs="*", default=[], help="how many in all, of each store")
    parser.add_argument("--only", choices=MEASUREMENTS, nargs="*", help="these measurements")
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    return parser.parse_args()


# The stores


def nodes(folder: Path, overrides: Mapping[str, Any] | None = None) -> tuple[Node, ...]:
    """The recipe's nodes from archive to blocks."""
    path = folder / "recipe.yaml"
    if not path.exists():
        path.write_text(RECIPE % digest_bytes(b"corpus"))
    return ending_with(nodes_of(load_recipe(str(path), overrides)), ["blocks"])


def made(folder: Path, num_shards: int) -> ArtifactStore:
    """A store of ``num_shards`` shards in all; one that was made before is used again."""
    store = ArtifactStore(folder)
    if (folder / "made").exists():
        return store
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    artifacts: dict[str, Artifact] = {}
    for node in nodes(folder):
        inputs = {name: artifacts[source] for name, source in node.inputs.items()}
        artifacts[node.name] = write_artifact(store, node, inputs, num_shards // len(SHARDED))
    pin(store.notes, artifacts["blocks"], "measured")
    (folder / "made").touch()
    print(f"{folder}: made in {duration(time.perf_counter() - start)}", file=sys.stderr, flush=True)
    return store


def write_artifact(store: ArtifactStore, node: Node, inputs: Mapping[str, Artifact], num_shards: int) -> Artifact:
    """An artifact as a stage would leave it, with shards of its own where its kind has them."""
    shards = tuple(write_shards(store, node.kind, num_shards)) if node.kind in SHARDED else ()
    source = node.stage.source(node.spec, store, Machine())
    identity = node.stage.identity(node.spec, {name: artifact.content for name, artifact in inputs.items()}, source)
    split = {"num_documents": num_shards * 50_000, "num_tokens": num_shards * 13_000_000, "num_shards": num_shards}
    names = [] if shards else [("archive" if node.kind == "archive" else "tokenizer.json", 1_000_000)]
    others = {
        "shards": [shard.model_dump() for shard in shards],
        "stats": {"train": split},
        "produced_by": {"seconds": 100.0, "inputs": {name: artifact.ref for name, artifact in inputs.items()}},
    }
    manifest = write_manifest(store, identity, names, others)
    artifact = store.load(node.kind, manifest["key"])
    assert artifact
    return artifact


def write_shards(store: ArtifactStore, kind: str, num_shards: int, start: int = 0) -> Iterator[ShardEntry]:
    name, num_bytes = SHARDED[kind], KEPT_FILE[kind]
    stats = {"num_documents": 50_000, "num_bytes": 42_000_000, "num_tokens": 13_000_000}
    for i in range(start, start + num_shards):
        identity = {
            "kind": f"{kind}-shard",
            "revision": 1,
            "spec": {},
            "inputs": {"source": digest_bytes(f"{kind} {i}".encode())},
        }
        manifest = write_manifest(store, identity, [(name, num_bytes)], {"stats": stats})
        yield ShardEntry(
            name=f"train/{i:07}",
            kind=f"{kind}-shard",
            key=manifest["key"],
            content=manifest["content"],
            num_bytes=num_bytes,
            stats=stats,
        )


def write_manifest(
    store: ArtifactStore, identity: dict[str, Any], names: list[tuple[str, int]], others: dict[str, Any]
) -> dict[str, Any]:
    """A finished artifact whose files are holes of the right size. Plain values: a million models would take an hour."""
    key = digest_json(identity)
    files = [{"name": name, "num_bytes": num, "digest": digest_bytes(f"{key}{name}".encode())} for name, num in names]
    listed = [[shard["name"], shard["content"]] for shard in others.get("shards", [])]
    manifest = {
        "kind": identity["kind"],
        "key": key,
        "content": digest_json({"files": [list(file.values()) for file in files], "shards": listed}),
        "identity": identity,
        "files": files,
        "shards": [],
        "created": "2026-01-01T00:00:00+00:00",
        **others,
        "produced_by": {**environment(), "seconds": 1.0, "inputs": {}, **others.get("produced_by", {})},
    }
    folder = f"{store.root}/{identity['kind']}/{key}"
    os.makedirs(folder, exist_ok=True)
    for name, num_bytes in names:
        descriptor = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT)
        os.truncate(descriptor, num_bytes)
        os.close(descriptor)
    descriptor = os.open(f"{folder}/manifest.json", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, orjson.dumps(manifest))
    os.close(descriptor)
    return manifest


# The measurements


def measure_one(folder: Path, name: str) -> None:
    """One measurement, alone in this process."""
    store = ArtifactStore(folder)
    counts = {kind: len(store.keys(f"{kind}-shard")) for kind in SHARDED}
    works: dict[str, Callable[[], Mapping[str, Any]]] = {
        "plan-found": lambda: planned(store, None),
        "plan-changed": lambda: planned(store, {"blocks.block_size": 1024}),
        "resolve": lambda: {"found": store.resolve(store.keys("blocks-shard")[0][:16]).kind},
        "ls": lambda: {"found": len(list(store.artifacts(shards=False)))},
        "gc-kept": lambda: collected(store, dry_run=True),
        "gc-collected": lambda: collected(store, dry_run=False),
    }
    if name == "gc-collected":
        list(write_shards(store, "tokens", sum(counts.values()) // 10, start=100_000_000))
    measure(f"scale/{name}", lambda: {"num_shards": sum(counts.values()), **works[name](), "peak_rss_bytes": high_water()})


def planned(store: ArtifactStore, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    steps = plan(nodes(store.root, overrides), store, Machine(recipe="simulated"))
    return {"found": sum(step.status == "found" for step in steps), "build": sum(step.status == "build" for step in steps)}


def collected(store: ArtifactStore, dry_run: bool) -> dict[str, Any]:
    told = collect(store, keep_last=1, grace_seconds=0, dry_run=dry_run)
    return {"num_kept": told.num_kept, "num_taken": sum(taken.number for taken in told.taken)}


# On paper: what a corpus and a model come to. Every figure that is assumed is named here.

SHARD_BYTES = DocumentsSpec().shard_bytes * 5 // 8  # a boundary falls anywhere between a quarter of the greatest size and all
BYTES_PER_TOKEN = 3.3  # Chinese text, Qwen2.5's vocabulary (README, "Figures")
ARCHIVE_SHARE, PARQUET_SHARE = 1 / 4.5, 1.2 / 4.5  # of the text: packed by bzip2, and by zstd in Parquet
MANIFEST_BYTES, ENTRY_BYTES = 1_300, 400  # a shard's manifest; its line in the list of an artifact
SHARDED_STAGES = 3
# benchmarks/results/corpus-vs-recipe.jsonl: 101.6 MB of text in 2.4 s by two cores, in 4.0 s by one core.
DOCUMENTS_BYTES, TOKENS_BYTES = 42e6, 25e6
WRITE_BYTES = 2e9  # a second, into one machine's NVMe or a shared file system
CHECKPOINT_BYTES = 14  # a parameter: bf16 weights, fp32 weights and two moments of AdamW


@dataclass(frozen=True)
class Corpus:
    """What a text of so many bytes comes to."""

    num_bytes: float

    @property
    def num_shards(self) -> int:
        return -(-int(self.num_bytes) // SHARD_BYTES)

    @property
    def num_tokens(self) -> float:
        return self.num_bytes / BYTES_PER_TOKEN

    @property
    def moved_bytes(self) -> float:
        """Read and written from archive to blocks: the archive twice, what is between once each way, blocks once."""
        archive, documents = self.num_bytes * ARCHIVE_SHARE, self.num_bytes * PARQUET_SHARE
        return 2 * archive + 2 * documents + 3 * 4 * self.num_tokens

    def row(self) -> list[str]:
        shards = self.num_shards
        manifests = SHARDED_STAGES * (shards + 1) + 2
        listed = SHARDED_STAGES * shards * ENTRY_BYTES
        return [
            size(self.num_bytes),
            count(self.num_tokens),
            f"{shards:,}",
            f"{manifests:,}",
            size(manifests * MANIFEST_BYTES + listed),
            f"{2 * SHARDED_STAGES * shards:,}",  # a plan: each manifest read, each file's size asked
            f"{SHARDED_STAGES * shards * 7:,}",  # a build: find, lock, staging, file, manifest, rename, and read by the next
            str(SHARDED_STAGES * min(24, shards) + 5),
            size(self.moved_bytes),
            hours(self.num_bytes / DOCUMENTS_BYTES),
            hours(self.num_bytes / TOKENS_BYTES),
        ]


def hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f}"


def checkpoint_row(name: str, num_parameters: float) -> list[str]:
    num_bytes = num_parameters * CHECKPOINT_BYTES
    return [
        name,
        size(2 * num_parameters),
        size(num_bytes),
        duration(num_bytes / WRITE_BYTES),
        duration(num_bytes / WRITE_BYTES / 8),
    ]


def tables() -> str:
    """The tables of docs/scale.md."""
    corpora = ["text", "tokens", "shards a stage", "manifests", "bytes of manifests", "requests to plan", "requests to build"]
    corpora += ["scheduler tasks", "bytes moved", "hours to read", "core hours to tokenize"]
    models = ["parameters", "weights", "checkpoint", "written by 1 node", "by 8 nodes"]
    rows = [Corpus(num_bytes).row() for num_bytes in (30e9, 1e12, 100e12)]
    sizes = [("1.5 B", 1.54e9), ("8 B", 8.0e9), ("70 B", 70.6e9)]
    return "\n\n".join([table(corpora, rows), table(models, [checkpoint_row(*one) for one in sizes])])


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
