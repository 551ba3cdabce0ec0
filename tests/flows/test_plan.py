from pathlib import Path

import pytest

from flows.checks import check_ranks, check_space, num_parameters
from flows.dag import ending_with, nodes_of
from flows.plan import differences, plan
from flows.recipe import load_recipe
from flows.settings import free_bytes
from tasks.errors import DiskSpaceError, SettingsError
from tasks.machine import Machine, TrainingSettings
from tasks.store import ArtifactStore

TEXT = '{"text": "山高月小，水落石出。"}\n' * 40 + '{"text": "大江东去。"}\n' * 40


@pytest.fixture
def here(tmp_path: Path, minimal: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "corpus.jsonl").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return minimal


def rows(recipe: Path, store: ArtifactStore, overrides: dict[str, object] | None = None) -> list[tuple[str, str, str]]:
    nodes = ending_with(nodes_of(load_recipe(str(recipe), overrides)), ["blocks"])
    return [(step.node.name, step.status, step.reason) for step in plan(nodes, store, Machine())]


def build(recipe: Path, store: ArtifactStore) -> None:
    artifacts = {}
    for node in ending_with(nodes_of(load_recipe(str(recipe))), ["blocks"]):
        inputs = {name: artifacts[source] for name, source in node.inputs.items()}
        artifacts[node.name] = node.stage(store, Machine(), node.spec, **inputs)


def test_of_an_empty_store_only_the_first_key_can_be_known(here: Path, tmp_path: Path) -> None:
    assert rows(here, ArtifactStore(tmp_path / "store")) == [
        ("archive", "build", "no archive in the store"),
        ("documents", "unknown", "archive not built yet"),
        ("tokenizer", "unknown", "documents not built yet"),
        ("tokens", "unknown", "documents, tokenizer not built yet"),
        ("blocks", "unknown", "tokens not built yet"),
    ]
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".digests"]


def test_what_is_built_is_found_and_a_change_is_named(here: Path, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    build(here, store)
    assert {status for _, status, _ in rows(here, store)} == {"found"}
    assert rows(here, store, {"blocks.block_size": 8})[-1] == ("blocks", "build", "spec.block_size 16 -> 8")


def test_a_damaged_artifact_is_planned_to_be_built_with_what_is_wrong(here: Path, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    build(here, store)
    store.resolve("tokenizer").file("tokenizer.json").unlink()
    name, status, reason = rows(here, store)[2]
    assert (name, status) == ("tokenizer", "build")
    assert reason.startswith("damaged: tokenizer.json is missing")


def test_a_source_that_is_not_there_makes_the_plan_unknown_not_wrong(here: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").unlink()
    assert rows(here, ArtifactStore(tmp_path / "store"))[0][1] == "unknown"


def test_differences_are_named_by_field() -> None:
    before = {"kind": "a", "revision": 1, "spec": {"x": 1, "y": {"z": 2}}, "inputs": {"b": "0123456789abcdef01234567"}}
    after = {"kind": "a", "revision": 2, "spec": {"x": 1, "y": {"z": 3}}, "inputs": {"b": "f123456789abcdef01234567"}}
    assert list(differences(before, after)) == [
        "inputs.b 0123456789ab… -> f123456789ab…",
        "revision 1 -> 2",
        "spec.y.z 2 -> 3",
    ]


def test_too_little_disk_is_said_before_anything_starts(here: Path, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    huge = tmp_path / "huge.jsonl"
    with huge.open("wb") as sparse:
        sparse.truncate(2 * free_bytes(tmp_path))  # a hole: it takes no room itself
    recipe = load_recipe(str(here), {"archive.url": str(huge), "archive.sha256": "0" * 64})
    steps = plan(nodes_of(recipe), store, Machine())
    with pytest.raises(DiskSpaceError, match=r"GB free, the plan needs about .* name another store with --store") as raised:
        check_space(recipe, steps, store, Machine())
    assert raised.value.exit_code == 1


def test_the_parameters_of_qwen2_5_are_counted_from_its_config() -> None:
    # 1,543,714,304 as published, biases and norms included.
    assert num_parameters(load_recipe("seq-monkey-qwen2.5-1.5b")) == pytest.approx(1_543_714_304, rel=0.001)


def test_ranks_that_do_not_divide_the_global_batch_are_said_before_anything_starts(here: Path) -> None:
    nodes = nodes_of(load_recipe(str(here)))
    check_ranks(nodes, Machine(training=TrainingSettings(num_ranks=2)))
    with pytest.raises(SettingsError, match="3 ranks do not divide the recipe's global_batch_size 2"):
        check_ranks(nodes, Machine(training=TrainingSettings(num_ranks=3)))
