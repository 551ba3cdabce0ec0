import os
from pathlib import Path

import pytest

from flows.settings import Settings, export_settings, free_bytes, load_settings, prefect_environment
from tasks.errors import SettingsError


def test_what_is_given_wins_over_the_environment_which_wins_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQMILL_STORE", "/from/environment")
    monkeypatch.setenv("SEQMILL_NUM_WORKERS", "3")
    settings = load_settings(store=Path("/given"), num_ranks=None)
    assert (settings.store, settings.num_workers, settings.num_ranks) == (Path("/given"), 3, None)


def test_a_wrong_setting_is_the_users_mistake_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQMILL_NUM_WORKERS", "none")
    with pytest.raises(SettingsError, match=r"num_workers.*'none'") as raised:
        load_settings()
    assert raised.value.exit_code == 2


def test_a_deepspeed_preset_is_found_by_name_and_a_file_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("{}")
    path = Settings(deepspeed="zero2").deepspeed_path
    assert path is not None
    assert path.name == "zero2.json"
    assert Settings(deepspeed=str(tmp_path / "mine.json")).deepspeed_path == tmp_path / "mine.json"
    with pytest.raises(SettingsError, match=r"presets are .*zero3_offload"):
        _ = Settings(deepspeed="zero9").deepspeed_path


def test_a_preset_is_picked_where_deepspeed_is_auto() -> None:
    assert Settings(deepspeed="auto").machine().training.picks_preset
    assert not Settings(deepspeed="zero2").machine().training.picks_preset


def test_free_bytes_are_those_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(free_bytes(tmp_path), rel=0.1)


@pytest.mark.parametrize("store", ["file", "file/below"])
def test_a_store_that_is_a_file_is_the_users_mistake(tmp_path: Path, store: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"store: .*file is a file; name a folder with --store"):
        load_settings(store=tmp_path / store)


def test_a_rendezvous_secret_comes_from_the_environment_and_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQMILL_RENDEZVOUS_SECRET", "planted-4")
    settings = load_settings(nodes="2", rendezvous="host0")
    nodes = settings.machine().training.nodes
    assert nodes
    assert nodes.secret == "planted-4"
    exported: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", exported)
    export_settings(settings)
    assert exported["SEQMILL_NODES"] == "2"
    assert "SEQMILL_RENDEZVOUS_SECRET" not in exported  # else a mask would take the place of what is there
    assert "planted-4" not in f"{settings!r} {settings.machine()!r} {settings.model_dump_json()}"


def test_tokens_come_from_the_environment_and_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-1")
    monkeypatch.setenv("SEQMILL_TOKENS", '{"host": "planted-2"}')
    settings = load_settings()
    assert settings.machine().tokens == {"huggingface.co": "planted-1", "host": "planted-2"}
    assert "planted" not in f"{settings!r} {settings.machine()!r} {settings.model_dump_json()}"
    monkeypatch.setenv("SEQMILL_TOKENS", "planted-3")
    with pytest.raises(SettingsError, match="tokens") as raised:
        load_settings()
    assert "planted" not in str(raised.value)


def test_monitors_are_named_in_one_word_and_a_stranger_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQMILL_MONITORS", "jsonl, tensorboard")
    assert load_settings().monitor_names == ("jsonl", "tensorboard")
    assert load_settings().machine().training.monitors == ("jsonl", "tensorboard")
    with pytest.raises(SettingsError, match="no monitor 'wandb'"):
        load_settings(monitors="wandb").machine()


def test_exported_paths_mean_the_same_in_another_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text("{}")
    exported: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", exported)
    export_settings(Settings(store="runs/store", deepspeed="mine.json", hostfile=Path("hosts")))
    expected = {"STORE": "runs/store", "DEEPSPEED": "mine.json", "HOSTFILE": "hosts"}
    assert {name: exported[f"SEQMILL_{name}"] for name in expected} == {
        name: str(tmp_path / path) for name, path in expected.items()
    }


def test_a_page_of_another_origin_may_not_speak_to_the_server(tmp_path: Path) -> None:
    origins = prefect_environment(Settings(store=tmp_path), "http://127.0.0.1:42/api", False)[
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"
    ]
    assert origins == "http://127.0.0.1:42,http://localhost:42"


def test_a_cluster_is_named_and_not_called_before_it_is_used() -> None:
    assert Settings().machine().cluster is None
    machine = Settings(runner="dask", runner_address="tcp://nowhere:1").machine()
    assert machine.cluster is not None
    assert machine.cluster is Settings(runner="dask", runner_address="tcp://nowhere:1").machine().cluster
    with pytest.raises(SettingsError, match=r"runner.*'spark'"):
        load_settings(runner="spark")
