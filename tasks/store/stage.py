"""A stage: a build function with its kind and revision, called through the store.

``@stage("tokens", revision=1)`` over ``build_tokens(work, spec, documents, tokenizer) -> Built`` makes a Stage. Calling
the stage with a store, a machine, a spec and the input artifacts finds the artifact or builds it, under its lock.
"""

import inspect
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Concatenate, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from tasks.errors import StoreError
from tasks.machine import Machine
from tasks.store.artifact import Artifact, ShardEntry
from tasks.store.digest import Digest, digest_json
from tasks.store.store import SCRATCH_NAME, ArtifactStore

log = logging.getLogger(__name__)

# Recorded in every manifest: what may explain a difference between two machines.
RECORDED_PACKAGES = (
    "seqmill", "torch", "transformers", "datasets", "deepspeed", "accelerate", "peft", "tokenizers", "fastokens", "pyarrow",
    "numpy",
)  # fmt: skip


class Spec(BaseModel):
    """The frozen fields of one stage: all that can change the bytes of its artifact, each with a description and unit.

    A field made with ``unkeyed`` says where bytes are or how often a run reports, never what the bytes are, and stays
    out of the identity.
    None means absent, and an absent field leaves the key as it was before the field existed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """The fields that enter the key, as JSON values; an absent one (None) leaves the key as it was before the field was."""
        unkeyed_names = {
            name
            for name, info in type(self).model_fields.items()
            if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("unkeyed")
        }
        return {
            name: value.identity() if isinstance(value := getattr(self, name), Spec) else dumped
            for name, dumped in self.model_dump(mode="json", exclude=unkeyed_names).items()
            if dumped is not None
        }


def unkeyed(default: Any = ..., *, description: str, ge: float | None = None, le: float | None = None) -> Any:
    """A spec field that says where bytes are (a URL, a hub's name) or how often a run reports; it never enters a key.

    ge, le: its bounds, as pydantic's Field takes them.
    """
    return Field(default, ge=ge, le=le, description=description, json_schema_extra={"unkeyed": True})


S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class Work:
    """Where and with what a build works."""

    store: ArtifactStore
    machine: Machine
    folder: Path  # staging: what lies here when the build returns becomes the artifact's files
    source: str | None  # what identify_source said, for a stage that has one

    @property
    def scratch(self) -> Path:
        """A folder for what the build needs while it runs; it survives a crash and is removed by the commit."""
        path = self.folder / SCRATCH_NAME
        path.mkdir(exist_ok=True)
        return path


@dataclass(frozen=True)
class Built:
    """What a build returns: counts for the manifest, and the shards that the artifact lists."""

    stats: dict[str, Any] = field(default_factory=dict)
    shards: tuple[ShardEntry, ...] = ()
    produced_by: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, Digest] = field(default_factory=dict)  # of files read through already, by name


# Says what identifies bytes from outside the store (a digest, a server's validator); None where all comes from inputs.
IdentifySource = Callable[[Any, ArtifactStore, Machine], str | None]


class Stage(Generic[S]):
    """A node of the pipeline: build, kind and revision. Made by ``@stage``."""

    def __init__(
        self,
        build: Callable[Concatenate[Work, S, ...], Built],
        kind: str,
        revision: int,
        identify_source: IdentifySource | None,
    ) -> None:
        self.build = build
        self.kind = kind
        self.revision = revision
        self.identify_source = identify_source
        self.input_names = tuple(inspect.signature(build).parameters)[2:]
        self.__doc__ = build.__doc__
        self.__name__ = build.__name__
        self.__module__ = build.__module__

    def identity(self, spec: S, inputs: Mapping[str, Digest], source: str | None = None) -> dict[str, Any]:
        """What decides the artifact's content: kind, revision, spec, and its inputs by content (or a source's identity)."""
        unknown = set(inputs) - set(self.input_names)
        assert not unknown, f"{self.kind} has no input {unknown}"
        every_input: dict[str, str] = {**inputs, **({"source": source} if source else {})}
        return {"kind": self.kind, "revision": self.revision, "spec": spec.identity(), "inputs": every_input}

    def source(self, spec: S, store: ArtifactStore, machine: Machine) -> str | None:
        """What identifies the bytes that the stage takes from outside the store; may ask a server."""
        return self.identify_source(spec, store, machine) if self.identify_source else None

    def __call__(self, store: ArtifactStore, machine: Machine, spec: S, /, **inputs: Artifact) -> Artifact:
        """Find the artifact in the store, or build it under its lock. Safe to call from many processes at once."""
        source = self.source(spec, store, machine)
        identity = self.identity(spec, {name: artifact.content for name, artifact in inputs.items()}, source)
        key = digest_json(identity)
        if found := store.find(self.kind, key):
            log.debug("%s/%s: found", self.kind, key[:12])
            return found
        with store.lock(self.kind, key), _told(f"{self.kind}/{key[:12]}", store.root / ".staging" / self.kind / key):
            if found := store.find(self.kind, key):  # built by another process while this one waited
                return found
            if damaged := store.load(self.kind, key):
                store.set_aside(self.kind, key, store.damage(damaged) or "changed while it was read")
            elif (store.root / self.kind / key).exists():
                store.set_aside(self.kind, key, "no readable manifest")
            work = Work(store, machine, store.staging(self.kind, key), source)
            return self._build(work, spec, identity, inputs)

    def _build(self, work: Work, spec: S, identity: dict[str, Any], inputs: Mapping[str, Artifact]) -> Artifact:
        key = digest_json(identity)
        wall, cpu = time.perf_counter(), time.process_time()
        built = self.build(work, spec, **inputs)
        produced_by = {
            **environment(),
            "seconds": round(time.perf_counter() - wall, 3),
            "cpu_seconds": round(time.process_time() - cpu, 3),
            "inputs": {name: artifact.ref for name, artifact in inputs.items()},
            "unkeyed": {k: v for k, v in spec.model_dump(mode="json").items() if k not in identity["spec"] and v is not None},
            **built.produced_by,
        }
        artifact = work.store.commit(identity, built.shards, built.stats, produced_by, built.digests)
        level = logging.DEBUG if self.kind.endswith("-shard") else logging.INFO
        log.log(level, "%s/%s: built, %d bytes, %.1f s", self.kind, key[:12], artifact.num_bytes, produced_by["seconds"])
        return artifact


@contextmanager
def _told(ref: str, folder: Path) -> Iterator[None]:
    """Turns what the file system refuses while ``ref`` is built in ``folder`` into a StoreError that says where."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise StoreError(f"{ref}: {where}: {error.strerror or error}; mend that and run again") from error


def stage(
    kind: str, *, revision: int, identify_source: IdentifySource | None = None
) -> Callable[[Callable[Concatenate[Work, S, ...], Built]], Stage[S]]:
    """Make a build function a stage.

    ``revision`` rises when the same spec and inputs must now give other bytes. What ``identify_source`` says enters the
    identity as the input "source".
    """

    def decorate(build: Callable[Concatenate[Work, S, ...], Built]) -> Stage[S]:
        return Stage(build, kind, revision, identify_source)

    return decorate


def shard_entry(name: str, artifact: Artifact) -> ShardEntry:
    """The line by which an artifact lists a shard."""
    return ShardEntry(
        name=name,
        kind=artifact.kind,
        key=artifact.key,
        content=artifact.content,
        num_bytes=artifact.num_bytes,
        stats=artifact.stats,
    )


def environment() -> dict[str, Any]:
    """The machine and the package versions that produced an artifact."""
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": {name: found for name in RECORDED_PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
