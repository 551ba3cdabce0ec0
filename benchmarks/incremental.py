"""Changes a corpus a little, builds it again in the same store, and prints how much was rebuilt for how much was changed.

Reads   ARCHIVE                a .jsonl.tar.bz2, or a .jsonl; one ``{"text": ...}`` a line
Writes  DIR                    a store, and the changed corpora beside it; removed and made anew by every run
Prints  a table, and as the last line one JSON object

`python -m benchmarks.incremental ARCHIVE --store DIR --tokenizer DIR --workers 2`. Each change is made to the corpus as it was:
  append    1% of its number of documents, behind the last
  insert    ten documents in the middle
  delete    ten documents in a row, a third of the way in
  change    one document, two thirds of the way in
Rebuilt bytes are those of a stage's new shards, and of its own files where it lists new ones; changed bytes are those of the
texts that came or went. The archive is always read whole, so it is told apart: only what comes after it is incremental.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.same_ids import read_texts
from tasks.corpus.archive import ArchiveSpec, build_archive
from tasks.corpus.blocks import BlocksSpec, build_blocks
from tasks.corpus.documents import DocumentsSpec, build_documents
from tasks.corpus.tokenizer import TokenizerSpec, build_tokenizer
from tasks.corpus.tokens import TokensSpec, build_tokens
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore
from tasks.store.origin import environment

STAGES = ("documents", "tokens", "blocks")
FEW = 10  # documents inserted, and deleted


@dataclass(frozen=True)
class Road:
    """What builds a corpus from archive to blocks."""

    store: ArtifactStore
    machine: Machine
    tokenizer: str
    documents: DocumentsSpec

    def build(self, archive_path: Path) -> dict[str, tuple[Artifact, float]]:
        """Every stage's artifact, and its seconds."""
        built: dict[str, tuple[Artifact, float]] = {}

        def add(name: str, build: Callable[[], Artifact]) -> Artifact:
            start = time.perf_counter()
            artifact = build()
            built[name] = (artifact, time.perf_counter() - start)
            return artifact

        store, machine = self.store, self.machine
        archive = add("archive", lambda: build_archive(store, machine, ArchiveSpec(url=str(archive_path))))
        tokenizer = add("tokenizer", lambda: build_tokenizer(store, machine, TokenizerSpec(source=self.tokenizer)))
        documents = add("documents", lambda: build_documents(store, machine, self.documents, archive=archive))
        tokens = add("tokens", lambda: build_tokens(store, machine, TokensSpec(), documents=documents, tokenizer=tokenizer))
        add("blocks", lambda: build_blocks(store, machine, BlocksSpec(), tokens=tokens))
        return built


@dataclass(frozen=True)
class Change:
    """A corpus with a change, and how many bytes of text came or went."""

    texts: list[str]
    num_bytes: int


def main() -> None:
    told = read_told()
    shutil.rmtree(told.store, ignore_errors=True)
    told.store.mkdir(parents=True)
    spec = DocumentsSpec(shard_bytes=told.shard_bytes) if told.shard_bytes else DocumentsSpec()
    road = Road(ArtifactStore(told.store / "store"), Machine(num_workers=told.workers), str(told.tokenizer), spec)
    texts = read_corpus(told.archive)
    print("building the corpus ...", file=sys.stderr)
    base = road.build(told.archive.absolute())
    print(f"{len(texts):,} documents, {size(texts) / 1e6:.1f} MB; built")
    for name, (artifact, seconds) in base.items():
        print(f"  {name:10} {len(artifact.manifest.shards):4} shards, {artifact.num_bytes:12,} bytes, {seconds:.2f} s")
    variants = {name: measure(road, base, name, change) for name, change in changes(texts).items()}
    line = {
        "benchmark": "incremental",
        "num_documents": len(texts),
        "text_bytes": size(texts),
        "num_workers": told.workers,
        "base": {name: {"seconds": round(seconds, 3), "bytes": found.num_bytes} for name, (found, seconds) in base.items()},
        "num_shards": len(base["documents"][0].manifest.shards),
        "changes": variants,
        "num_cores": os.cpu_count(),
        "versions": environment()["packages"],
    }
    print(json.dumps(line), flush=True)


def read_told() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--store", type=Path, required=True, help="a folder that this run may remove and make anew")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a tokenizer.json")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--shard-bytes", type=int, help="documents.shard_bytes; without it the default")
    return parser.parse_args()


def read_corpus(path: Path) -> list[str]:
    if path.name.endswith(".jsonl"):
        return [json.loads(line)["text"] for line in path.read_bytes().splitlines()]
    return list(read_texts(path))


def changes(texts: Sequence[str]) -> dict[str, Change]:
    """The four changed corpora. New documents are those of the corpus itself, each with a prefix that makes it new."""
    few = [f"新{number} {text}" for number, text in enumerate(texts[:FEW])]
    more = [f"增{number} {text}" for number, text in enumerate(texts[: len(texts) // 100])]
    half, third, two_thirds = len(texts) // 2, len(texts) // 3, len(texts) * 2 // 3
    gone, changed = texts[third : third + FEW], f"改 {texts[two_thirds]}"
    return {
        "append": Change([*texts, *more], size(more)),
        "insert": Change([*texts[:half], *few, *texts[half:]], size(few)),
        "delete": Change([*texts[:third], *texts[third + FEW :]], size(gone)),
        "change": Change([*texts[:two_thirds], changed, *texts[two_thirds + 1 :]], size([changed])),
    }


def size(texts: Sequence[str]) -> int:
    """Bytes of the texts in UTF-8."""
    return sum(len(text.encode()) for text in texts)


def measure(road: Road, base: dict[str, tuple[Artifact, float]], name: str, change: Change) -> dict[str, Any]:
    """Build the changed corpus, print a line a stage, and return the figures."""
    path = road.store.root.parent / f"{name}.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in change.texts)
    built = road.build(path)
    path.unlink()
    print(f"\n{name}: {change.num_bytes:,} bytes changed; archive {built['archive'][1]:.2f} s")
    stages = {}
    for stage in STAGES:
        artifact, seconds = built[stage]
        stages[stage] = {**rebuilt(base[stage][0], artifact, change.num_bytes), "seconds": round(seconds, 3)}
        print(
            f"  {stage:10} {stages[stage]['num_rebuilt']:4} of {stages[stage]['num_shards']:4} shards rebuilt, "
            f"{stages[stage]['rebuilt_bytes']:12,} bytes, {stages[stage]['rebuilt_over_changed']:10.1f} x the changed bytes, "
            f"{stages[stage]['rebuilt_share']:6.1%} of the stage, {seconds:.2f} s"
        )
    return {"changed_bytes": change.num_bytes, "archive_seconds": round(built["archive"][1], 3), **stages}


def rebuilt(before: Artifact, after: Artifact, changed_bytes: int) -> dict[str, Any]:
    """What of ``after`` had to be written, since ``before`` lists no such shard."""
    known = {entry.key for entry in before.shards()}
    new = [entry for entry in after.shards() if entry.key not in known]
    own_bytes = 0 if after.key == before.key else sum(entry.num_bytes for entry in after.manifest.files)
    num_bytes = sum(entry.num_bytes for entry in new) + own_bytes
    return {
        "num_shards": len(after.manifest.shards),
        "num_rebuilt": len(new),
        "rebuilt_bytes": num_bytes,
        "rebuilt_over_changed": round(num_bytes / changed_bytes, 2),
        "rebuilt_share": round(num_bytes / after.num_bytes, 4),
    }


if __name__ == "__main__":
    main()
