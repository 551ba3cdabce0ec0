import time
from dataclasses import replace
from pathlib import Path

import pytest

from flows.checks import check_ranks, check_space, num_parameters
from flows.dag import ending_with, nodes_of
from flows.estimate import Given, config_parameters, estimate, num_tokens, whole_seconds
from flows.plan import plan
from flows.recipe import load_recipe
from tasks.errors import DiskSpaceError, SettingsError
from tasks.machine import Machine, TrainingSettings
from tasks.store import ArtifactStore, Digest
from tasks.store.records import Record, Records, record_of

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


def test_of_an_empty_store_everything_is_to_be_built_and_nothing_can_be_estimated(here: Path, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    assert rows(here, store) == [
        ("archive", "build", "no archive in the store"),
        ("documents", "build", "no documents in the store"),
        ("tokenizer", "build", "no tokenizer in the store"),
        ("tokens", "build", "no tokens in the store"),
        ("blocks", "build", "no blocks in the store"),
    ]
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".digests"]
    steps = plan(nodes_of(load_recipe(str(here))), store, Machine())
    assert [step.estimate.num_bytes if step.estimate else None for step in steps] == [len(TEXT.encode()), *[None] * 6]


def test_what_follows_a_change_is_told_by_the_change(here: Path, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    build(here, store)
    assert rows(here, store, {"documents.min_characters": 7})[1:] == [
        ("documents", "build", "spec.min_characters absent -> 7"),
        # What comes out may be what it was, and then these are found.
        ("tokenizer", "unknown", "documents will be built: documents.min_characters absent -> 7"),
        ("tokens", "unknown", "documents will be built, tokenizer may be built: documents.min_characters absent -> 7"),
        ("blocks", "unknown", "tokens may be built: documents.min_characters absent -> 7"),
    ]
    both = rows(here, store, {"documents.min_characters": 7, "blocks.block_size": 8})[-1]
    assert both == (
        "blocks",
        "build",
        "spec.block_size 16 -> 8; tokens may be built: documents.min_characters absent -> 7",
    )


def test_what_an_input_made_anew_changes_is_told_by_what_changed_it(here: Path, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    build(here, store)
    (tmp_path / "corpus.jsonl").write_text(TEXT + TEXT.replace("山", "川"))
    archive, documents, *_ = rows(here, store)
    assert archive[1] == "build"
    assert archive[2].startswith("inputs.source sha256:")
    assert documents[2].startswith("archive will be built: archive.source sha256:")
    nodes = nodes_of(load_recipe(str(here)))
    nodes[0].stage(store, Machine(), nodes[0].spec)
    name, status, reason = rows(here, store)[1]
    assert (name, status) == ("documents", "build")
    assert reason.startswith("inputs.archive ")
    assert " because archive.source sha256:" in reason


def test_an_estimate_is_from_the_nearest_artifact_and_grows_with_what_is_read(here: Path, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    build(here, store)
    before = store.resolve("tokens")
    (tmp_path / "corpus.jsonl").write_text(TEXT * 3)
    steps = {step.node.name: step for step in plan(nodes_of(load_recipe(str(here))), store, Machine())}
    archive, tokens = steps["archive"].estimate, steps["tokens"].estimate
    assert archive is not None
    assert tokens is not None
    assert tokens.nearest == before.ref
    assert archive.num_bytes == 3 * len(TEXT.encode())
    assert tokens.num_tokens == 3 * (num_tokens(record_of(before.manifest)) or 0)
    assert tokens.seconds is not None
    assert tokens.peak_disk_bytes >= tokens.num_bytes > 0
    assert steps["pretrained"].estimate is None


def test_what_reads_nobody_knows_how_much_is_not_estimated_by_what_was_read_before(here: Path, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    build(here, store)
    away = {"archive.url": "http://127.0.0.1:1/corpus.jsonl", "archive.md5": "0" * 32}
    steps = {step.node.name: step for step in plan(nodes_of(load_recipe(str(here), away)), store, Machine())}
    assert steps["documents"].nearest
    assert [steps[name].estimate for name in ("documents", "tokens", "blocks")] == [None] * 3
    counted = load_recipe(str(here), {**away, "documents.max_documents": 40})
    documents = next(step for step in plan(nodes_of(counted), store, Machine()) if step.node.name == "documents")
    assert documents.estimate
    assert documents.estimate.num_bytes == pytest.approx(store.resolve("documents").num_bytes / 2, rel=0.02)


def test_the_seconds_of_a_build_that_found_shards_are_those_of_a_whole_one() -> None:
    told = {"seconds": 2.0, "num_bytes_built": 10}
    record = Record("a", Digest("k"), Digest("c"), {}, "now", {}, told, num_bytes=40, num_shards=4)
    assert whole_seconds(record) == 8.0
    assert whole_seconds(replace(record, produced_by={"seconds": 2.0})) == 2.0
    assert whole_seconds(replace(record, produced_by={**told, "num_bytes_built": 0})) is None


def test_documents_that_are_counted_and_a_tokenizer_of_a_sample_do_not_grow_with_the_corpus(here: Path, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    build(here, store)
    (tmp_path / "corpus.jsonl").write_text(TEXT * 1000)
    most = store.resolve("documents").stats["num_documents"] // 2
    num_bytes = store.resolve("documents").stats["train"]["num_bytes"]
    changes = {"documents.max_documents": most, "tokenizer.train.vocab_size": 270, "tokenizer.train.max_bytes": num_bytes // 4}
    nodes = nodes_of(load_recipe(str(here), changes))
    steps = {step.node.name: step for step in plan(nodes, store, Machine())}
    documents, tokenizer = steps["documents"].estimate, steps["tokenizer"].estimate
    assert documents
    assert tokenizer
    assert documents.num_bytes == pytest.approx(store.resolve("documents").num_bytes / 2, rel=0.02)
    assert tokenizer.num_bytes == pytest.approx(store.resolve("tokenizer").num_bytes * 270 / 300, abs=1)
    seconds = record_of(store.resolve("tokenizer").manifest).produced_by["seconds"]
    assert tokenizer.seconds == pytest.approx(seconds / 4, abs=0.06)


def test_training_is_estimated_by_rows_ids_and_parameters(here: Path) -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 300}
    spec = {"global_batch_size": 2, "model": {"config": {**config, "model_type": "qwen2"}}}
    stats = {"num_steps": 2}
    told = {"seconds": 10.0, "peak_rss_bytes": 100, "scratch_bytes": 50, "host": "there"}
    nearest = Record("pretrained", Digest("k"), Digest("c"), {"spec": spec, "inputs": {}}, "now", stats, told, 1000, 0)
    given = {"blocks": Given(100, 16, 10)}
    changes = {"pretrained.num_steps": 6, "pretrained.global_batch_size": 4, "pretrained.model.config.hidden_size": 64}
    node = next(node for node in nodes_of(load_recipe(str(here), changes)) if node.name == "pretrained")
    times = config_parameters({**config, "hidden_size": 64}) / config_parameters(config)
    found = estimate(node, nearest, given, Records(here.parent / "store"))
    assert found is not None
    assert found.seconds == pytest.approx(10.0 * 6 * times, abs=0.1)
    assert (found.num_bytes, found.peak_rss_bytes) == (round(1000 * times), round(100 * times))
    assert (found.peak_disk_bytes, found.host) == (round(1050 * times), "there")


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


def test_a_file_that_is_not_there_is_named_though_its_digest_is_stated(here: Path, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    build(here, store)
    (name, status, reason), *_ = rows(here, store, {"archive.url": "elsewhere/corpus.jsonl", "archive.sha256": "0" * 64})
    assert (name, status) == ("archive", "unknown")
    assert reason == (
        f"{tmp_path}/elsewhere/corpus.jsonl: no such file; "
        "check the path elsewhere/corpus.jsonl, which is relative to the current directory"
    )
    known = store.resolve("archive").stats["sha256"]
    assert rows(here, store, {"archive.url": "elsewhere/corpus.jsonl", "archive.sha256": known})[0][1] == "found"


def test_what_a_plan_does_not_know_of_the_disk_is_said_with_the_rest(here: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(here), {"archive.url": "http://127.0.0.1:1/corpus.jsonl"})
    store = ArtifactStore(tmp_path / "store")
    began = time.monotonic()
    space = check_space(recipe, plan(nodes_of(recipe), store, Machine()), store)
    assert time.monotonic() - began < 5
    assert space.unknown == ("archive", "documents", "tokens", "blocks")
    assert set(space.needed) == {"tokenizer", "pretrained", "report"}
    assert space.told().startswith("about ")
    assert space.told().endswith(
        "to be written; by rules of thumb, for the store has no run of such a recipe to go by; "
        "without archive, documents, tokens, blocks: how large the source is cannot be known now"
    )
    counted = load_recipe(str(here), {"archive.url": "http://127.0.0.1:1/corpus.jsonl", "documents.max_documents": 9000})
    known = check_space(counted, plan(nodes_of(counted), store, Machine()), store)
    assert known.unknown == ("archive",)
    assert known.needed["documents"] == 9000 * 4000 / 4.5 * 1.2


def test_too_little_disk_is_said_before_anything_starts(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(tmp_path / "store")
    huge = tmp_path / "huge.jsonl"
    with huge.open("wb") as sparse:
        sparse.truncate(1_200_000_000)  # a hole: it takes no room itself, but planning reads it through
    monkeypatch.setattr("flows.checks.free_bytes", lambda folder: 1_100_000_000)
    recipe = load_recipe(str(here), {"archive.url": str(huge), "archive.sha256": "0" * 64})
    steps = plan(nodes_of(recipe), store, Machine())
    with pytest.raises(DiskSpaceError, match=r"GB free, the plan needs about .* name another store with --store") as raised:
        check_space(recipe, steps, store)
    assert raised.value.exit_code == 1


def test_the_parameters_of_qwen2_5_are_counted_from_its_config() -> None:
    # 1,543,714,304 as published, biases and norms included.
    assert num_parameters(load_recipe("seq-monkey-qwen2.5-1.5b")) == pytest.approx(1_543_714_304, rel=0.001)


def test_ranks_that_do_not_divide_the_global_batch_are_said_before_anything_starts(here: Path) -> None:
    nodes = nodes_of(load_recipe(str(here)))
    check_ranks(nodes, Machine(training=TrainingSettings(num_ranks=2)))
    with pytest.raises(SettingsError, match="3 ranks do not divide the recipe's global_batch_size 2"):
        check_ranks(nodes, Machine(training=TrainingSettings(num_ranks=3)))
