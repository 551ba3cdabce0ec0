"""Prefect's database, as the environment of the server names it: SQLite in the store, or PostgreSQL.

Only the server needs it. Workers and runs speak to the server, and get neither the address nor the password.
"""

import socket
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from tasks.errors import SettingsError

URL_NAMES = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
PREFIXES = ("PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_", "PREFECT_SQLALCHEMY_")
POSTGRESQL, SQLITE = "postgresql+asyncpg", "sqlite+aiosqlite"
PORT = 5432
REACH_SECONDS = 5.0


def database_url(environment: Mapping[str, str]) -> str | None:
    """The database that is named by its address; None where the server keeps its own in its home."""
    return next((environment[name] for name in URL_NAMES if environment.get(name)), None)


def without_database(environment: Mapping[str, str]) -> dict[str, str]:
    """What a worker is given of an environment."""
    return {name: value for name, value in environment.items() if not name.startswith(PREFIXES)}


def check_database(environment: Mapping[str, str]) -> str:
    """How a person names the database, without the password. Raises SettingsError where it cannot be used or reached."""
    url = database_url(environment)
    if url is None:
        driver = next((environment[f"{prefix}DRIVER"] for prefix in PREFIXES if environment.get(f"{prefix}DRIVER")), SQLITE)
        return "PostgreSQL" if driver == POSTGRESQL else "SQLite"
    name = _name_of(environment)
    scheme, _, rest = url.partition("://")
    if scheme == SQLITE:
        return "SQLite"
    if scheme != POSTGRESQL:
        raise SettingsError(f"{name}: begins with {scheme[:30]!r}; a server takes {POSTGRESQL}://USER:PASSWORD@HOST:PORT/NAME")
    try:
        parts = urlsplit(f"//{rest}")
        host, port = unquote(parts.hostname or ""), parts.port or PORT
    except ValueError:
        raise SettingsError(f"{name}: no address with a port can be read; spell # or / of the password as %23, %2F") from None
    told = f"PostgreSQL {parts.path.lstrip('/')}"
    if not host or host.startswith("/"):  # a socket of this machine, or as the query says
        return told
    try:
        socket.create_connection((host, port), REACH_SECONDS).close()
    except OSError as error:
        raise SettingsError(f"{told} at {host}:{port}: {error.strerror or error}; start it, or mend {name}") from None
    return f"{told} at {host}:{port}"


def _name_of(environment: Mapping[str, str]) -> str:
    return next(name for name in URL_NAMES if environment.get(name))
