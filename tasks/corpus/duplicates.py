"""Which documents were seen before: exact, in bounded memory however many there are."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tasks.errors import StoreError

CACHE_KILOBYTES = 256 << 10  # of SQLite pages held in memory
LOOKUP_ROWS = 10_000  # digests a query; SQLite takes at most 32,766 variables


class Seen:
    """The digests met so far."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def firsts(self, digests: Sequence[bytes]) -> list[bool]:
        """Whether each digest is met for the first time; all of them are remembered."""
        known = self._known(sorted(set(digests)))
        fresh = []
        for digest in digests:
            fresh.append(digest not in known)
            known.add(digest)
        new = sorted(digest for digest, is_first in zip(digests, fresh, strict=True) if is_first)
        self.connection.executemany("INSERT INTO seen VALUES (?)", ((digest,) for digest in new))
        return fresh

    def _known(self, digests: list[bytes]) -> set[bytes]:
        known: set[bytes] = set()
        for start in range(0, len(digests), LOOKUP_ROWS):
            some = digests[start : start + LOOKUP_ROWS]
            query = f"SELECT digest FROM seen WHERE digest IN ({','.join('?' * len(some))})"  # noqa: S608 - marks only
            known.update(row[0] for row in self.connection.execute(query, some))
        return known


@contextmanager
def open_seen(folder: Path) -> Iterator[Seen]:
    """An empty memory in ``folder``, begun anew whatever an earlier run left there."""
    path = folder / "seen.sqlite"
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        # A crash starts over, so nothing here needs to survive one.
        for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE_KILOBYTES}", "locking_mode=EXCLUSIVE"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        connection.execute("BEGIN")
        yield Seen(connection)
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}; free room on that disk and run again") from error
    finally:
        connection.close()
        path.unlink(missing_ok=True)
