"""Stages to try a shared store on, and a build in a process of its own: a machine, as far as the store can tell.

`python -m tests.store.shared_build URL ENDPOINT CACHE WORD NUM_BYTES CLAIM_SECONDS` builds the word's letters and prints a
line of JSON: whether they were found, their content, and what this process built.
"""

import os
import sys
from pathlib import Path

import orjson
from pydantic import Field

from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Built, SharedStore, Spec, Work, shard_entry, stage, store_of
from tasks.store.bucket import Patience

QUICK = Patience(connect_seconds=5, read_seconds=30, num_retries=2, retry_seconds=10, first_seconds=0.02)

BUILDS: list[str] = []


def folder_or_bucket(kind: str, root: Path) -> ArtifactStore:
    """A store in the folder ``store``: a plain one, or where ``kind`` is "bucket" one that is used as a bucket."""
    if kind == "folder":
        return ArtifactStore(root / "store")
    return SharedStore(f"file://{root / 'store'}", root / "cache", claim_seconds=0.2, patience=QUICK)


class WordSpec(Spec):
    word: str = Field(description="what the file holds")
    num_bytes: int = Field(0, description="bytes of the second file")


class NoSpec(Spec):
    pass


@stage("word", revision=1)
def build_word(work: Work, spec: WordSpec) -> Built:
    BUILDS.append(spec.word)
    (work.folder / "word.txt").write_text(spec.word)
    if spec.num_bytes:
        (work.folder / "large").mkdir(exist_ok=True)
        (work.folder / "large/bytes").write_bytes((spec.word.encode() * spec.num_bytes)[: spec.num_bytes])
    return Built({"num_characters": len(spec.word)})


@stage("letters-shard", revision=1)
def build_letter(work: Work, spec: WordSpec, word: Artifact) -> Built:
    BUILDS.append(spec.word)
    assert spec.word in word.file("word.txt").read_text()
    (work.folder / "letter").write_text(spec.word)
    return Built()


def build_one(item: tuple[str, Artifact]) -> Artifact:
    letter, word = item
    return build_letter(store_of(word), Machine(), WordSpec(word=letter), word=word)


@stage("letters", revision=1)
def build_letters(work: Work, spec: NoSpec, word: Artifact) -> Built:
    BUILDS.append("letters")
    items = [(letter, word) for letter in word.file("word.txt").read_text()]
    shards = work.machine.map_shards(build_one, items, "letters")
    return Built({"num": len(items)}, shards=tuple(shard_entry(f"train/{i:05}", one) for i, one in enumerate(shards)))


@stage("drawn", revision=1)
def build_drawn(work: Work, spec: WordSpec) -> Built:
    """Other bytes every time, as a model trained on another machine."""
    BUILDS.append("drawn")
    (work.folder / "a").write_bytes(os.urandom(16))
    (work.folder / "b").write_bytes((work.folder / "a").read_bytes())
    return Built()


def spell(store: ArtifactStore, word: str, num_bytes: int = 0) -> Artifact:
    return build_letters(store, Machine(), NoSpec(), word=build_word(store, Machine(), WordSpec(word=word, num_bytes=num_bytes)))


def main(url: str, endpoint: str, cache: str, word: str, num_bytes: str, claim_seconds: str) -> None:
    store = SharedStore(url, Path(cache), endpoint=endpoint or None, claim_seconds=float(claim_seconds), patience=QUICK)
    letters = spell(store, word, int(num_bytes))
    sys.stdout.write(orjson.dumps({"found": letters.found, "content": letters.content, "builds": BUILDS}).decode() + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
