"""The database of Prefect's server: how it is named, what is refused, and who gets to know its password."""

import socket
from collections.abc import Iterator

import pytest

from flows.database import check_database, without_database
from tasks.errors import SettingsError


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("name", ["PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"])
def test_a_database_is_named_without_its_password(name: str, listening: int) -> None:
    url = f"postgresql+asyncpg://prefect:secret@127.0.0.1:{listening}/runs?ssl=require"
    assert check_database({name: url}) == f"PostgreSQL runs at 127.0.0.1:{listening}"


@pytest.mark.parametrize("environment", [{}, {"PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////data/prefect.db"}])
def test_sqlite_is_what_a_server_has_of_its_own(environment: dict[str, str]) -> None:
    assert check_database(environment) == "SQLite"


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg2", "mysql"])
def test_a_driver_that_prefect_does_not_know_is_refused_without_the_password(scheme: str) -> None:
    with pytest.raises(SettingsError, match=r"begins with .*postgresql\+asyncpg://USER") as raised:
        check_database({"PREFECT_API_DATABASE_CONNECTION_URL": f"{scheme}://prefect:secret@127.0.0.1/runs"})
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("rest", ["prefect@/runs?host=/run/postgresql", "prefect@%2Frun%2Fpostgresql/runs"])
def test_a_socket_of_this_machine_is_left_to_the_server(rest: str) -> None:
    assert check_database({"PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{rest}"}) == "PostgreSQL runs"


def test_a_database_may_be_named_in_parts() -> None:
    assert check_database({"PREFECT_SERVER_DATABASE_DRIVER": "postgresql+asyncpg"}) == "PostgreSQL"


def test_a_password_that_cuts_the_address_is_told_without_it() -> None:
    with pytest.raises(SettingsError, match="of the password as %23") as raised:
        check_database({"PREFECT_API_DATABASE_CONNECTION_URL": "postgresql+asyncpg://prefect:secret#1@127.0.0.1/runs"})
    assert "secret" not in str(raised.value)


def test_a_database_that_does_not_answer_is_told_before_the_server_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(SettingsError, match=f"PostgreSQL runs at 127.0.0.1:{port}: .*start it, or mend PREFECT_API_DATABASE"):
        check_database({"PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://prefect:secret@127.0.0.1:{port}/runs"})


def test_a_worker_is_not_told_of_the_database() -> None:
    of_server = {"PREFECT_API_DATABASE_CONNECTION_URL": "x", "PREFECT_SERVER_DATABASE_PASSWORD": "x"}
    environment = {**of_server, "PREFECT_API_URL": "kept", "HOME": "kept"}
    assert without_database(environment) == {"PREFECT_API_URL": "kept", "HOME": "kept"}
