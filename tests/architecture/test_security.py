"""What nobody can make seqmill do: run code from an artifact, write outside the store, tell a secret."""

import ast
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from flows.dag import ending_with, nodes_of
from flows.recipe import load_recipe
from tasks.corpus.archive import ArchiveSpec, build_archive
from tasks.corpus.documents import DocumentsSpec, build_documents
from tasks.errors import CorpusError, RecipeError, RefError
from tasks.machine import Machine
from tasks.store import ArtifactStore

ROOT = Path(__file__).parents[2]
SOURCES = [*ROOT.glob("flows/**/*.py"), *ROOT.glob("tasks/**/*.py")]

# What the machines of one cluster send each other, over Ray or Dask, which send pickles themselves: who reaches those runs code.
CLUSTER = ROOT / "tasks" / "cluster" / "parcel.py"

HOSTILE_NAMES = ["../outside", "/etc/outside", "a/b", "..", ".hidden", "a\\b", "a b", "a\x00b", "$(touch outside)", "~/outside"]


def calls(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every call in a file: what is called, and its keywords as they are spelled; ``**`` where some are passed on."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            found.append((ast.unparse(node.func), {word.arg or "**": ast.unparse(word.value) for word in node.keywords}))
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_no_code_loads_pickles_or_evaluates_text() -> None:
    for path in SOURCES:
        picklers = {"pickle"} if path == CLUSTER else set()
        assert imports(path) & {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"} == picklers, path
        for name, keywords in calls(path):
            assert name not in {"eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load"}, path
            assert keywords.get("shell") != "True", path
            assert name != "torch.load" or keywords.get("weights_only") == "True", path
            assert keywords.get("allow_pickle", "False") == "False", path


def test_models_are_loaded_from_safetensors_and_never_with_code_of_theirs() -> None:
    for path in SOURCES:
        for name, keywords in calls(path):
            assert keywords.get("trust_remote_code", "False") == "False", path
            if re.fullmatch(r"Auto\w+\.from_pretrained", name):  # unsaid, Transformers asks on the terminal whether to run it
                assert keywords.get("trust_remote_code") == "False", path
            if re.fullmatch(r"AutoModel\w*\.from_pretrained", name):
                assert keywords.get("use_safetensors") == "True" or "**" in keywords, path


class Touch:
    """What a pickle does when it is loaded: it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_in_the_place_of_weights_is_refused_and_not_run(tmp_path: Path) -> None:
    from tasks.training.weights import loaded_model

    touched, folder = tmp_path / "touched", tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 8}')
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        (folder / name).write_bytes(pickle.dumps(Touch(touched)))
    with pytest.raises(OSError, match="safetensors"):
        loaded_model({"optimization": {"precision": "fp32"}, "model": {"attention": "eager"}, "adapter": None}, str(folder))
    assert not touched.exists()


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_recipe_is_named_so_that_its_files_stay_in_the_store(name: str) -> None:
    with pytest.raises(RecipeError, match="name"):
        load_recipe("demo", {"name": name})


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_no_stage_kind_or_reference_leads_out_of_the_store(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such stage"):
        ending_with(nodes_of(load_recipe("demo")), [name])
    with pytest.raises(RefError):
        ArtifactStore(tmp_path).resolve(f"{name}/0")
    with pytest.raises(RecipeError):
        load_recipe("demo", {"documents.filter": name})


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_values_of_keyed_fields_write_nothing_outside_the_store(name: str, tmp_path: Path) -> None:
    inside = tmp_path / "deep" / "deeper"
    inside.mkdir(parents=True)
    (inside / "corpus.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    store, machine = ArtifactStore(inside / "store"), Machine()
    archive = build_archive(store, machine, ArchiveSpec(url=str(inside / "corpus.jsonl")))
    with pytest.raises(CorpusError):
        build_documents(store, machine, DocumentsSpec(text_field=name), archive=archive)
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and store.root not in path.parents]
    assert outside == [inside / "corpus.jsonl"]


@pytest.mark.parametrize("url", ["https://user:planted@host/a", "http://planted@host/a", "HTTPS://u:planted@host:1/a?b"])
def test_a_secret_in_an_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(RecipeError, match="SEQMILL_") as raised:
        load_recipe("demo", {"archive": {"url": url}})
    assert "planted" not in str(raised.value)
