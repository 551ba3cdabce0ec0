"""Check finished artifacts: every byte by its digest, every list of shards, every count by the ledger. Changes nothing."""

import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tasks.corpus import ledger, recount
from tasks.machine import Advance, Machine
from tasks.report.numbers import size
from tasks.store import Artifact, ArtifactStore, Digest, ShardEntry, digest_json
from tasks.store.artifact import MANIFEST_NAME, content_of

MOST_TOLD = 3  # problems of one artifact: a line is read, a screen is not


@dataclass(frozen=True)
class Problem:
    """What is wrong with one artifact, and what to do."""

    ref: str
    path: Path
    problem: str
    remedy: str

    def row(self) -> dict[str, str]:
        return {"ref": self.ref, "path": str(self.path), "problem": self.problem, "remedy": self.remedy}

    def line(self) -> str:
        return f"{self.ref[: self.ref.index('/') + 13]}: {self.problem}; {self.remedy}"


@dataclass(frozen=True)
class Verified:
    """What was checked. missing_inputs: those that the store no longer holds, so that no sum could be compared with theirs."""

    num_artifacts: int
    num_bytes: int
    seconds: float
    missing_inputs: int
    problems: tuple[Problem, ...]

    def row(self) -> dict[str, Any]:
        return {**vars(self), "problems": [problem.row() for problem in self.problems]}

    def summary(self) -> str:
        """All in one line."""
        state = f"{len(self.problems)} damaged" if self.problems else "none damaged"
        gone = f"; {self.missing_inputs} inputs are no longer in the store" if self.missing_inputs else ""
        return f"{self.num_artifacts} artifacts, {state}, {size(self.num_bytes)} in {self.seconds:.1f} s{gone}"


class Index:
    """Every folder of the store that should be an artifact, with its manifest where that can be read."""

    def __init__(self, store: ArtifactStore) -> None:
        refs = store.refs()
        folders = [store.root / kind / key for kind, key in refs]
        self.store = store
        self.artifacts = dict(zip(folders, store.load_all(refs, is_anew=True), strict=True))
        self.by_content = {artifact.content: artifact for artifact in self.artifacts.values() if artifact}

    def inputs(self, artifact: Artifact) -> dict[str, Artifact | None]:
        """The artifacts that one was made from: those that it names, or others of the same content; None where they are gone."""
        named = artifact.manifest.produced_by.get("inputs", {})
        contents = {name: text for name, text in artifact.manifest.identity.get("inputs", {}).items() if name != "source"}
        found = {name: self.artifacts.get(self.store.root / named.get(name, "")) for name in contents}
        return {
            name: given if given and given.content == contents[name] else self.by_content.get(Digest(contents[name]))
            for name, given in found.items()
        }

    def lineage(self, start: Artifact) -> Iterator[Path]:
        """The folders of an artifact, its shards, and all that these were made from, down to the archive."""
        waiting, seen = [self.store.root / start.ref], set()
        while waiting:
            path = waiting.pop()
            if path in seen:
                continue
            seen.add(path)
            yield path
            if artifact := self.artifacts.get(path):
                shards = (self.store.root / entry.kind / entry.key for entry in artifact.shards())
                waiting += [path for path in shards if path in self.artifacts]
                waiting += [self.store.root / given.ref for given in self.inputs(artifact).values() if given]


def verify(store: ArtifactStore, refs: Iterable[str], machine: Machine) -> Verified:
    """Check the artifacts that ``refs`` name with all that they stand on; every artifact of the store where none is named."""
    start = time.perf_counter()
    index = Index(store)
    named = [index.lineage(store.resolve(ref)) for ref in refs]
    paths = sorted({path for lineage in named for path in lineage}) if named else list(index.artifacts)
    artifacts = [artifact for path in paths if (artifact := index.artifacts[path])]
    num_bytes = sum(entry.num_bytes for artifact in artifacts for entry in artifact.manifest.files)
    # Threads: hashing and Arrow let go of Python's lock, and a bar is told of every read.
    with machine.progress("verify", num_bytes, "B") as advance, ThreadPoolExecutor(machine.num_workers) as pool:
        found = list(pool.map(partial(check, index, advance), paths))
    return Verified(
        num_artifacts=len(paths),
        num_bytes=num_bytes,
        seconds=round(time.perf_counter() - start, 3),
        missing_inputs=sum(given is None for artifact in artifacts for given in index.inputs(artifact).values()),
        problems=tuple(problem for problem in found if problem),
    )


def check(index: Index, advance: Advance, path: Path) -> Problem | None:
    """What is wrong with the artifact in a folder; None where all is well."""
    artifact = index.artifacts[path]
    if artifact is None:
        problems = [f"{MANIFEST_NAME} is missing, cannot be read, or is that of another artifact"]
    else:
        problems = list(wrong_manifest(artifact)) or [
            *wrong_files(index.store, artifact, advance),
            *wrong_shards(artifact, index),
        ]
        if not problems:
            inputs = {name: given for name, given in index.inputs(artifact).items() if given}
            problems = [*ledger.problems(artifact, inputs), *recount.problems(artifact)]
    ref = f"{path.parent.name}/{path.name}"
    if problems:
        place = index.store.place(path.parent.name, Digest(path.name))
        return Problem(ref, path, _told(problems), f"delete {place} and run its recipe again")
    strays = [str(stray) for stray in stray_files(artifact)] if artifact else []
    return Problem(ref, path, f"{_told(strays)} not in its manifest", "delete what is not") if strays else None


def wrong_manifest(artifact: Artifact) -> Iterator[str]:
    """Where a manifest contradicts itself."""
    manifest = artifact.manifest
    if manifest.key != digest_json(manifest.identity):
        yield "its manifest's key is not the digest of its identity"
    if manifest.content != content_of(manifest.files, manifest.shards):
        yield "its manifest's content is not the digest of its files and shards"


def wrong_files(store: ArtifactStore, artifact: Artifact, advance: Advance) -> Iterator[str]:
    """Where a file is not the one in the manifest, by its size and then by its digest."""
    for entry in artifact.manifest.files:
        try:
            if problem := store.file_problem(artifact, entry, advance):
                yield problem
        except OSError as error:
            yield f"{entry.name} cannot be read ({error.strerror})"


def wrong_shards(artifact: Artifact, index: Index) -> Iterator[str]:
    """Where the list of shards is not what the store holds. What is wrong inside a shard, the shard's own check says."""
    for entry in artifact.shards():
        shard = index.artifacts.get(index.store.root / entry.kind / entry.key)
        if shard is None:
            yield f"{_named(entry)} is missing"
        elif shard.content != entry.content:
            yield f"{_named(entry)} has another content"
        elif (shard.num_bytes, shard.stats) != (entry.num_bytes, entry.stats):
            yield f"{_named(entry)} counts otherwise than the list says"


def stray_files(artifact: Artifact) -> Iterator[Path]:
    """The files in an artifact's folder that no manifest names."""
    listed = {MANIFEST_NAME, *(entry.name for entry in artifact.manifest.files)}
    for base, _, names in os.walk(artifact.folder):
        for name in sorted(names):
            relative = Path(base, name).relative_to(artifact.folder)
            if relative.as_posix() not in listed:
                yield relative


def _named(entry: ShardEntry) -> str:
    return f"shard {entry.name} ({entry.kind}/{entry.key[:12]})"


def _told(problems: list[str]) -> str:
    more = len(problems) - MOST_TOLD
    return ", ".join(problems[:MOST_TOLD]) + (f", and {more} more" if more > 0 else "")
