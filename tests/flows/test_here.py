"""`seqmill settings`, and how `ls` and `gc` tell that there is nothing."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.settings import Settings
from tasks.machine import Machine
from tasks.store import ArtifactStore
from tests.store.test_stage import WordSpec, build_word


def test_every_setting_is_listed_with_what_it_is_and_no_secret_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQMILL_RUNNER", "dask")
    monkeypatch.setenv("SEQMILL_RENDEZVOUS_SECRET", "hush-hush")
    monkeypatch.setenv("SEQMILL_NUM_RANK", "4")
    result = CliRunner().invoke(app, ["settings", "--store", str(tmp_path), "--json"], catch_exceptions=False)
    rows = {row["variable"]: row for row in json.loads(result.stdout)}
    assert len(rows) == len(Settings.model_fields)
    assert all(row["description"] for row in rows.values())
    assert (rows["SEQMILL_RUNNER"]["value"], rows["SEQMILL_RUNNER"]["is_set"]) == ("dask", True)
    assert (rows["SEQMILL_NUM_RANKS"]["value"], rows["SEQMILL_NUM_RANKS"]["is_set"]) == (None, False)
    told = CliRunner().invoke(app, ["settings", "--store", str(tmp_path)], catch_exceptions=False)
    assert "no setting has the name SEQMILL_NUM_RANK:" in " ".join(told.output.split())
    assert "hush-hush" not in result.output + told.output


def test_what_a_wrong_value_points_to_lists_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQMILL_RUNNER", "dusk")
    result = CliRunner().invoke(app, ["settings"])
    assert "input should be 'pool', 'ray' or 'dask', found 'dusk'; see seqmill settings" in str(result.exception)


def test_ls_of_a_kind_that_is_not_there_says_which_are(tmp_path: Path) -> None:
    empty = CliRunner().invoke(app, ["ls", "--store", str(tmp_path)], catch_exceptions=False)
    assert (empty.exit_code, empty.stdout.strip()) == (0, f"{tmp_path}: no artifact in the store")
    build_word(ArtifactStore(tmp_path), Machine(), WordSpec(word="a"))
    other = CliRunner().invoke(app, ["ls", "pretrain", "--store", str(tmp_path)], catch_exceptions=False)
    assert (other.exit_code, other.stdout.strip()) == (0, f"{tmp_path}: no pretrain in the store; it has word")
    listed = CliRunner().invoke(app, ["ls", "pretrain", "--store", str(tmp_path), "--json"], catch_exceptions=False)
    assert json.loads(listed.stdout) == []


def test_the_help_names_the_variable_of_the_store() -> None:
    help_of_run = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "120"}, catch_exceptions=False)
    assert "SEQMILL_STORE" in help_of_run.stdout


@pytest.mark.parametrize("command", [["deploy", "--pools"], ["worker", "cpu"]])
def test_what_needs_a_server_that_stays_starts_none(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.server.prefect_api_url", lambda: None)
    result = CliRunner().invoke(app, [*command, "--store", str(tmp_path)])
    assert str(result.exception).startswith("PREFECT_API_URL: not set, and no server of this store is up; name the server")
    assert not (tmp_path / ".prefect" / "server.log").exists()
