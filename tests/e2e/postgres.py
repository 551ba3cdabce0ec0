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


@dataclass
class Postgres:
    """A server that can be stopped and started again, over one folder."""

    binaries: Path
    folder: Path
    user: pwd.struct_passwd
    port: int
    process: "subprocess.Popen[bytes] | None" = None

    def make(self) -> None:
        """Write the folder's first content."""
        password = self.folder / "password"
        password.write_text(PASSWORD)
        os.chown(password, self.user.pw_uid, self.user.pw_gid)
        made = self._run_as_user("initdb", "--username=seqmill", "--auth=scram-sha-256", f"--pwfile={password}",
                                 "--encoding=UTF8", "--locale=C", "--no-sync")  # fmt: skip
        assert made.wait(START_SECONDS) == 0, self.log_path.read_text()

    def start(self) -> None:
        options = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
        self.process = self._run_as_user("postgres", "-p", str(self.port), *(word for one in options for word in ("-c", one)))
        ready = [str(self.binaries / "pg_isready"), "--host=127.0.0.1", f"--port={self.port}", "--quiet"]
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            if subprocess.run(ready, check=False).returncode == 0:
                return
            time.sleep(0.05)
        raise AssertionError(f"PostgreSQL did not start: {self.log_path.read_text()[-2000:]}")

    def stop(self) -> None:
        """Send the clients away, and end."""
        assert self.process
        self.process.send_signal(signal.SIGINT)
        self.process.wait(START_SECONDS)

    @property
    def log_path(self) -> Path:
        return self.folder / "log"

    def _run_as_user(self, program: str, *arguments: str) -> "subprocess.Popen[bytes]":
        who = [str(os.getpid()), str(self.user.pw_uid), str(self.user.pw_gid)]
        command = [str(self.binaries / program), "-D", str(self.folder / "data"), *arguments]
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", _SERVER, *who, *command],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

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
    try:
        os.chown(folder, user.pw_uid, user.pw_gid)
        server = Postgres(binaries, folder, user, *free_ports(1))
        server.make()
        server.start()
        try:
            server.tell("createdb", DATABASE)
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def _user() -> pwd.struct_passwd:
    if os.getuid() != 0:
        return pwd.getpwuid(os.getuid())
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    return names.get("postgres") or names["nobody"]


def _run(program: Path, *arguments: str) -> str:
    environment = {**os.environ, "PGPASSWORD": PASSWORD}
    told = subprocess.run([str(program), *arguments], env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    return told.stdout
