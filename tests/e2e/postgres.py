"""A real PostgreSQL on loopback with a folder of its own, as a user of no rights, and gone with the tests that started it."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.store.s3 import free_ports

START_SECONDS = 60
PASSWORD = "planted-b83e06d1"
DATABASE = "prefect"


def postgres_binaries() -> Path | None:
    """The folder of initdb and postgres: Debian keeps them off the PATH, the newest release's are taken."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parents[1].name))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


@dataclass(frozen=True)
class Postgres:
    """A server that runs."""

    binaries: Path
    port: int

    @property
    def url(self) -> str:
        """As Prefect takes it."""
        return f"postgresql+asyncpg://seqmill:{PASSWORD}@127.0.0.1:{self.port}/{DATABASE}"

    def tell(self, program: str, *arguments: str) -> str:
        """What one of PostgreSQL's own programs prints."""
        return _run(self.binaries / program, *self._where, *arguments)

    def query(self, statement: str) -> list[str]:
        """The rows that a statement gives, their columns apart by |."""
        return self.tell("psql", "--dbname", DATABASE, "--tuples-only", "--no-align", "--command", statement).splitlines()

    def dump(self, *tables: str) -> str:
        """All that the database holds, or what some tables do."""
        return self.tell("pg_dump", "--dbname", DATABASE, "--data-only", *(f"--table={table}" for table in tables))

    @property
    def _where(self) -> tuple[str, ...]:
        return ("--host=127.0.0.1", f"--port={self.port}", "--username=seqmill")


# It gives up root, which PostgreSQL refuses to run as, and only then asks to end with the tests: a change of user forgets that.
_SERVER = """
import os, sys
from tasks.machine import die_with_parent
parent, user, group, *command = sys.argv[1:]
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(int(group))
    os.setuid(int(user))
os.chdir("/")
die_with_parent(int(parent))
os.execv(command[0], command)
"""


@contextmanager
def postgres(binaries: Path) -> Iterator[Postgres]:
    """A server with one empty database; it ends with the block."""
    user = _user()
    # Below pytest's own folder another user could not look.
    folder = Path(tempfile.mkdtemp(prefix="seqmill-postgres-"))
    os.chown(folder, user.pw_uid, user.pw_gid)
    (port,) = free_ports(1)
    server = Postgres(binaries, port)
    try:
        _make(binaries, folder, user)
        log_path = folder / "log"
        command = [str(binaries / "postgres"), "-D", str(folder / "data"), "-p", str(port), "-c", "listen_addresses=127.0.0.1",
                   "-c", "unix_socket_directories=", "-c", "fsync=off"]  # fmt: skip
        process = _start(command, user, log_path)
        try:
            _wait(server, process, log_path)
            server.tell("createdb", DATABASE)
            yield server
        finally:
            process.send_signal(signal.SIGINT)  # "fast": clients are sent away
            process.wait(START_SECONDS)
    finally:
        shutil.rmtree(folder)


def _user() -> pwd.struct_passwd:
    if os.getuid() != 0:
        return pwd.getpwuid(os.getuid())
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    return names.get("postgres") or names["nobody"]


def _make(binaries: Path, folder: Path, user: pwd.struct_passwd) -> None:
    password = folder / "password"
    password.write_text(PASSWORD)
    os.chown(password, user.pw_uid, user.pw_gid)
    made = _start(
        [str(binaries / "initdb"), "-D", str(folder / "data"), "--username=seqmill", "--auth=scram-sha-256",
         f"--pwfile={password}", "--encoding=UTF8", "--locale=C", "--no-sync"],
        user, folder / "initdb-log",
    )  # fmt: skip
    assert made.wait(START_SECONDS) == 0, (folder / "initdb-log").read_text()


def _start(command: list[str], user: pwd.struct_passwd, log_path: Path) -> subprocess.Popen[bytes]:
    with log_path.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(os.getpid()), str(user.pw_uid), str(user.pw_gid), *command],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def _wait(server: Postgres, process: "subprocess.Popen[bytes]", log_path: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        ready = [str(server.binaries / "pg_isready"), "--host=127.0.0.1", f"--port={server.port}", "--quiet"]
        if subprocess.run(ready, check=False).returncode == 0:
            return
        time.sleep(0.05)
    raise AssertionError(f"PostgreSQL did not start: {log_path.read_text()[-2000:]}")


def _run(program: Path, *arguments: str) -> str:
    environment = {**os.environ, "PGPASSWORD": PASSWORD}
    told = subprocess.run([str(program), *arguments], env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    return told.stdout
