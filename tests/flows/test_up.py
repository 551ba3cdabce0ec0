"""What `seqmill up` refuses, and the profile that it enters."""

import socket
import tomllib
from pathlib import Path

import pytest

from flows.settings import Settings
from flows.up import _speaking_to, address, bring_up, profiles_path, take_down
from tasks.errors import SettingsError


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILES_PATH", "PREFECT_SERVER_API_AUTH_STRING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("flows.up.export_settings", lambda settings: None)


def test_a_port_that_is_taken_is_the_users_mistake(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"port {port} of 127.0.0.1: Address already in use; .*--port"):
            bring_up(Settings(store=tmp_path), "127.0.0.1", port)


@pytest.mark.parametrize("password", [None, ""])
def test_an_address_that_others_can_reach_is_refused_without_authentication(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, password: str | None
) -> None:
    if password is not None:
        monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", password)
    with pytest.raises(SettingsError, match="PREFECT_SERVER_API_AUTH_STRING"):
        bring_up(Settings(store=tmp_path), "0.0.0.0", 4200)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:42/api"),
        ("0.0.0.0", "http://127.0.0.1:42/api"),
        ("::", "http://[::1]:42/api"),
        ("fd00::1", "http://[fd00::1]:42/api"),
    ],
)
def test_a_server_is_reached_at_an_address_of_this_machine(host: str, url: str) -> None:
    assert address(host, 42) == url


def test_another_server_that_the_user_has_chosen_gets_nothing_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://theirs/api")
    assert _speaking_to(Settings(store=tmp_path), "http://127.0.0.1:42/api")["PREFECT_API_URL"] == "http://127.0.0.1:42/api"


def test_down_where_nothing_was_ever_up_ends_nothing(tmp_path: Path) -> None:
    assert take_down(Settings(store=tmp_path / "none")) == []


@pytest.mark.parametrize(
    ("variables", "path"),
    [
        ({"PREFECT_HOME": "/home"}, "/home/profiles.toml"),
        ({"PREFECT_HOME": "/home", "PREFECT_PROFILES_PATH": "/mine.toml"}, "/mine.toml"),
    ],
)
def test_the_users_profiles_are_where_their_prefect_looks(
    variables: dict[str, str], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert profiles_path() == Path(path)


def test_a_file_of_profiles_that_was_not_there_before_is_not_there_afterwards(tmp_path: Path) -> None:
    from flows.registration import enter_profile, leave_profile

    path = tmp_path / "profiles.toml"
    assert enter_profile(path, "http://127.0.0.1:1/api") == "ephemeral"
    leave_profile(path, "ephemeral", "http://127.0.0.1:1/api")
    assert not path.exists()
    assert enter_profile(path, "http://127.0.0.1:1/api") == "ephemeral"
    leave_profile(path, "local", "http://127.0.0.1:1/api")  # the user's choice of another that Prefect brings along
    assert tomllib.loads(path.read_text())["active"] == "local"


def test_the_profile_is_entered_and_left_and_the_users_own_stay(tmp_path: Path) -> None:
    from flows.registration import enter_profile, leave_profile

    path = tmp_path / "profiles.toml"
    path.write_text('active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://mine/api"\n')
    assert enter_profile(path, "http://127.0.0.1:1/api") == "mine"
    assert enter_profile(path, "http://127.0.0.1:2/api") is None
    entered = tomllib.loads(path.read_text())
    assert entered["active"] == "seqmill"
    assert entered["profiles"]["seqmill"] == {"PREFECT_API_URL": "http://127.0.0.1:2/api", "PREFECT_PLUGINS_ENABLED": "true"}
    leave_profile(path, "mine", "http://127.0.0.1:1/api")  # another store's, which went down first
    assert tomllib.loads(path.read_text()) == entered
    leave_profile(path, "mine", "http://127.0.0.1:2/api")
    assert tomllib.loads(path.read_text()) == {"active": "mine", "profiles": {"mine": {"PREFECT_API_URL": "http://mine/api"}}}
