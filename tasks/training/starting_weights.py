"""Published weights that a training on several nodes starts from, in the bucket that is the nodes' store.

Each node fetches them from there into its cache, as it does any artifact. Once the model is built nothing stands on them:
`seqmill gc` takes them.

Reads   source      a model folder of the node that leads, or a Hugging Face id
Writes  config.json, generation_config.json, *.safetensors, *.safetensors.index.json
"""

import shutil
from pathlib import Path

from tasks.errors import SourceError
from tasks.machine import Machine
from tasks.store import ArtifactStore, Built, SharedStore, Spec, Work, digest_json, stage, unkeyed
from tasks.training.model import ModelSpec, fetch_weights, identify_weights, weight_files


class StartingWeightsSpec(Spec):
    """Which published weights."""

    weights: str = unkeyed(description="a model folder, or a Hugging Face id; keyed by content")
    weights_revision: str = unkeyed("main", description="branch, tag or commit of the Hugging Face id; its commit is keyed")

    @property
    def model(self) -> ModelSpec:
        return ModelSpec(weights=self.weights, weights_revision=self.weights_revision)


def identify_starting_weights(spec: StartingWeightsSpec, store: ArtifactStore, machine: Machine) -> str | None:
    """The digest of the folder's files, or the commit of the Hugging Face id."""
    return identify_weights(spec.model, store, machine)


@stage("starting-weights", revision=1, identify_source=identify_starting_weights)
def build_starting_weights(work: Work, spec: StartingWeightsSpec) -> Built:
    """Copy or fetch what is read of published weights."""
    assert work.source
    folder = fetch_weights(spec.model, work.source, work.machine, work.scratch)
    is_fetched = folder.is_relative_to(work.scratch)
    for path in weight_files(folder):
        target = work.folder / path.name
        if is_fetched:
            path.rename(target)  # a copy would take as much of the disk again
        else:
            shutil.copyfile(path, target)
    return Built()


def starting_folder(work: Work, model: ModelSpec) -> Path:
    """The folder of a model's published weights, which every node of the training finds in its own store.

    Raises SourceError where they changed since ``work`` was given its key.
    """
    assert work.source
    nodes = work.machine.training.nodes
    if not (nodes and nodes.most > 1 and isinstance(work.store, SharedStore)):
        return fetch_weights(model, work.source, work.machine, work.scratch)
    assert model.weights
    is_here = Path(model.weights).expanduser().is_dir()
    # By the commit that the model is keyed by: a branch may have moved.
    spec = StartingWeightsSpec(weights=model.weights, weights_revision=model.weights_revision if is_here else work.source)
    weights = build_starting_weights(work.store, work.machine, spec)
    if is_here and digest_json({entry.name: entry.digest for entry in weights.manifest.files}) != work.source:
        raise SourceError(f"{model.weights}: its files changed while they were read; let nothing write them and run again")
    return weights.path
