"""A stage: a build function with its kind and revision, called through the store.

``@stage("tokens", revision=1)`` over ``build_tokens(work, spec, documents, tokenizer) -> Built`` makes a Stage. Calling
the stage with a store, a machine, a spec and the input artifacts finds the artifact or builds it, under its lock.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from tasks.errors import StoreError
from tasks.machine import Machine
from tasks.store.artifact import Artifact, ShardEntry
from tasks.store.digest import Digest, digest_json
from tasks.store.origin import Usage, environment
from tasks.store.reason import reason_for
from tasks.store.records import Records, record_of
from tasks.store.store import SCRATCH_NAME, ArtifactStore

log = logging.getLogger(__name__)


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
    then: Callable[[], None] = lambda: None  # called once the artifact is in the store: what it was made with may go


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
        given = list(inspect.signature(build).parameters.values())[2:]
        self.input_names = tuple(one.name for one in given if one.kind is not one.VAR_KEYWORD)
        self.takes_any = any(one.kind is one.VAR_KEYWORD for one in given)  # inputs of whatever names, as a report does
        self.__doc__ = build.__doc__
        self.__name__ = build.__name__
        self.__module__ = build.__module__

    def identity(self, spec: S, inputs: Mapping[str, Digest], source: str | None = None) -> dict[str, Any]:
        """What decides the artifact's content: kind, revision, spec, and its inputs by content (or a source's identity)."""
        unknown = set(inputs) - set(self.input_names)
        assert self.takes_any or not unknown, f"{self.kind} has no input {unknown}"
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
            problem = self._set_aside(store, key)
            if restored := store.restore(self.kind, key):
                return restored
            for artifact in inputs.values():
                store.keep(artifact)
            work = Work(store, machine, store.staging(self.kind, key), source)
            return self._build(work, spec, identity, inputs, problem)

    def _set_aside(self, store: ArtifactStore, key: Digest) -> str | None:
        """What is wrong with the artifact that stands in the way, which is moved out of it; None where none does."""
        if damaged := store.load(self.kind, key):
            problem = store.damage(damaged) or "changed while it was read"
        elif (store.root / self.kind / key).exists():
            problem = "no readable manifest"
        else:
            return None
        store.set_aside(self.kind, key, problem)
        return problem

    def _build(
        self, work: Work, spec: S, identity: dict[str, Any], inputs: Mapping[str, Artifact], problem: str | None
    ) -> Artifact:
        key, is_shard = digest_json(identity), self.kind.endswith("-shard")
        # A shard is built because its artifact is: to look for the nearest of a million would cost more than to build it.
        told = {} if is_shard else self._reason(work, spec, identity, inputs, problem)
        usage = Usage(is_shard)
        built = self.build(work, spec, **inputs)
        produced_by = {
            **environment(),
            **({"recipe": work.machine.recipe} if work.machine.recipe else {}),
            **told,
            **usage.told(work.folder / SCRATCH_NAME),
            **({} if is_shard else usage.shards_built(work.store.root, built.shards)),
            "inputs": {name: artifact.ref for name, artifact in inputs.items()},
            "unkeyed": {k: v for k, v in spec.model_dump(mode="json").items() if k not in identity["spec"] and v is not None},
            **built.produced_by,
        }
        artifact = work.store.commit(identity, built.shards, built.stats, produced_by, built.digests)
        built.then()
        level = logging.DEBUG if is_shard else logging.INFO
        log.log(level, "%s/%s: built, %d bytes, %.1f s", self.kind, key[:12], artifact.num_bytes, produced_by["seconds"])
        return artifact

    def _reason(
        self, work: Work, spec: S, identity: dict[str, Any], inputs: Mapping[str, Artifact], problem: str | None
    ) -> dict[str, Any]:
        """Why the artifact is built, as its manifest keeps it."""
        if problem:
            return {"reason": f"damaged: {problem}", "nearest": None}
        records = {name: record_of(artifact.manifest) for name, artifact in inputs.items()}
        url, recipe = getattr(spec, "url", None), work.machine.recipe
        work.store.learn()
        return reason_for(identity, records, Records(work.store.root), recipe=recipe, url=url).told()


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
