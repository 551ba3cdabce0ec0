"""The command line of the benchmarks that build an artifact of a finished run once more, in a store of its own."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, Spec, Stage

S = TypeVar("S", bound=Spec)


@dataclass(frozen=True)
class Rebuild:
    """An artifact of a run, its inputs, and an empty store."""

    artifact: Artifact
    inputs: dict[str, Artifact]
    store: ArtifactStore

    def build(self, stage: Stage[S], spec: type[S]) -> Artifact:
        """The artifact once more, from the same spec and inputs."""
        return stage(self.store, Machine(), spec.model_validate_json(json.dumps(self.artifact.spec)), **self.inputs)


@contextmanager
def read_rebuild(description: str | None, kind: str) -> Iterator[Rebuild]:
    """Parse the command line; the empty store is gone afterwards."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("store", type=Path, help="the store of a finished run, for instance of `make demo`")
    parser.add_argument("ref", nargs="?", default=kind, help="which of its artifacts; without it the newest")
    told = parser.parse_args()
    store = ArtifactStore(told.store)
    artifact = store.resolve(told.ref)
    inputs = {name: store.resolve(ref) for name, ref in artifact.manifest.produced_by["inputs"].items()}
    with TemporaryDirectory() as folder:
        yield Rebuild(artifact, inputs, ArtifactStore(Path(folder)))
