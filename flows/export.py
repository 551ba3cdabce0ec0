"""A model of the store as a folder that others can use: Hugging Face's form, with a card that tells where it comes from.

Reads   published | pretrained | finetuned | adapter
Writes  config.json, generation_config.json, *.safetensors, the tokenizer's files, chat_template.jinja, README.md
        of an adapter that is not merged adapter_config.json and adapter_model.safetensors instead of config and weights
"""

import json
import logging
import re
import shutil
import tempfile
from pathlib import Path

import orjson

from flows.card import model_card
from flows.models import base_of, folders_of
from tasks.corpus.chat import load_chat
from tasks.corpus.proof import answer_shapes
from tasks.errors import CorpusError, StoreError, UserError
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore
from tasks.store.digest import fsync_tree
from tasks.training.adapter import MERGE, MERGEABLE, number_format
from tasks.training.finetuned import generation_fields
from tasks.training.launch import run_worker

log = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
MERGED = "merged/"
COMMIT = re.compile(r"[0-9a-f]{40}")  # a digest of files here has 64 digits


def export_model(store: ArtifactStore, machine: Machine, artifact: Artifact, target: Path, merged: bool) -> Path:
    """Write the model into ``target``, which appears whole or not at all.

    Raises UserError where ``target`` holds something, or the adapter cannot be merged.
    """
    target = target.expanduser().resolve()  # what a link leads to can be put in place, a link itself not
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: not an empty folder; name another, or empty it")
    folders_of(store, artifact)  # is it a model, and is its base there
    is_adapter = artifact.has_file(ADAPTER_CONFIG)
    if merged and not is_adapter:
        raise UserError(f"{artifact.short}: no adapter, so there is nothing to merge; leave --merged out")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir(mode=0o755)
        if merged:
            write_merged(store, machine, artifact, folder)
        else:
            copy_files(artifact, folder, "")
        if is_adapter and not merged:
            name_base(store, artifact, folder)
        is_read_alike = reads_alike(artifact, folder)
        (folder / "README.md").write_text(model_card(store, artifact, merged, is_read_alike), encoding="utf-8")
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors writes for its owner alone, and who serves a model may be another
        fsync_tree(folder)
        folder.replace(target)
    return target


def reads_alike(artifact: Artifact, folder: Path) -> bool:
    """Whether Transformers reads the folder's tokenizer as training did; says so where it does not."""
    from tasks.training.rules import is_read_alike

    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json")) or is_read_alike(folder):
        return True
    log.warning(
        "%s: Transformers' AutoTokenizer has rules of its own for this type of model, and gives other ids than tokenizer.json; "
        "load the tokenizer as README.md says", artifact.short,
    )  # fmt: skip
    return False


def copy_files(artifact: Artifact, folder: Path, below: str) -> None:
    """Copy an artifact's files that lie directly below a folder of it."""
    for entry in artifact.manifest.files:
        name = entry.name.removeprefix(below)
        if entry.name.startswith(below) and "/" not in name:
            shutil.copyfile(artifact.file(entry.name), folder / name)


def write_merged(store: ArtifactStore, machine: Machine, adapter: Artifact, folder: Path) -> None:
    """The base with the adapter in its weights, from the artifact where it has that, else merged now."""
    base = base_of(store, adapter)
    if adapter.has_file(f"{MERGED}config.json"):
        copy_files(adapter, folder, MERGED)
    else:
        method = adapter.spec.get("method", "lora")
        if method not in MERGEABLE:
            raise UserError(f"{adapter.short}: an adapter of method {method} cannot be merged; leave --merged out")
        for entry in adapter.manifest.files:
            if "/" not in entry.name and not entry.name.startswith("adapter_"):
                shutil.copyfile(adapter.file(entry.name), folder / entry.name)
        plan = {"base_dir": base.path, "adapter_dir": adapter.path, "output_dir": folder, "dtype": number_format(base.path)}
        path = folder.parent / "merge.json"
        path.write_text(json.dumps(plan, default=str))
        run_worker(MERGE, path, num_ranks=1, settings=machine.training, label="export (merge)")
    # Where an answer ends the examples say; a base that was only pretrained does not know it.
    fields = generation_fields(base.path, end_markers(store, adapter))
    (folder / "generation_config.json").write_bytes(orjson.dumps(fields, option=orjson.OPT_INDENT_2))


def end_markers(store: ArtifactStore, model: Artifact) -> list[int]:
    """The ids that close an answer of the examples that a model was trained on; by its chat template where those are gone."""
    kind, _, key = model.manifest.produced_by["inputs"].get("examples", "").partition("/")
    if key and (examples := store.load(kind, key)):
        return list(examples.stats.get("end_markers", {}).values())
    try:
        chat = load_chat(model.path)
        return list(dict.fromkeys(chat.special[shape.end_marker] for shape in answer_shapes(chat)))
    except CorpusError:  # of no template that closes answers
        return []


def name_base(store: ArtifactStore, adapter: Artifact, folder: Path) -> None:
    """Name the base in adapter_config.json by where it can be loaded from; an artifact names it as the store does."""
    path = folder / ADAPTER_CONFIG
    try:
        fields = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise StoreError(f"{adapter.short}: {ADAPTER_CONFIG} cannot be read ({error}); verify the store") from error
    base = base_of(store, adapter)
    commit = hub_commit(base)
    # Its name on the hub where it came from there, and at which commit; else its folder in the store.
    fields["base_model_name_or_path"] = base.manifest.produced_by["unkeyed"]["weights"] if commit else str(base.path)
    fields["revision"] = commit
    path.write_bytes(orjson.dumps(fields, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))


def hub_commit(base: Artifact) -> str | None:
    """The commit at which a published model was taken from the hub; None where it came from a folder or a file."""
    source = str(base.manifest.identity["inputs"].get("source", "")) if base.kind == "published" else ""
    return source if COMMIT.fullmatch(source) else None
