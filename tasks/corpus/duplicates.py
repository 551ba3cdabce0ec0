"""Which documents were seen before: exact, in bounded memory however many there are.

A filter of bits answers for most new digests that they are new; a table on disk answers for the rest. New digests enter the
table many at a time and sorted: one by one, at random places, an insertion costs 50 us once the table outgrows its cache.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tasks.errors import StoreError

CACHE_KILOBYTES = 64 << 10  # of the table's pages held in memory
LOOKUP_ROWS = 10_000  # digests a query; SQLite takes at most 32,766 variables
WAITING_DIGESTS = 500_000  # new ones held in memory until they are inserted: about 50 MB
FILTER_BITS = 1 << 30  # 128 MB; two bits a digest: of 13 million documents it sends 1 new one in 1,700 to the table


class Seen:
    """The digests met so far. A digest is 32 bytes."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.waiting: set[bytes] = set()
        self.bits = np.zeros(FILTER_BITS // 8, np.uint8)

    def firsts(self, digests: Sequence[bytes]) -> list[bool]:
        """Whether each digest is met for the first time; all of them are remembered."""
        if not digests:
            return []
        asked = [digest for digest, is_known in zip(digests, self._filter(digests), strict=True) if is_known]
        known = self._known(sorted(set(asked) - self.waiting))
        fresh = []
        for digest in digests:
            fresh.append(digest not in known and digest not in self.waiting)
            if fresh[-1]:
                self.waiting.add(digest)
        if len(self.waiting) >= WAITING_DIGESTS:
            self._insert()
        return fresh

    def _filter(self, digests: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Whether each digest may have come in an earlier call; never False for one that did. Enters all of them."""
        # The last 8 bytes: the others decide the split, the shard, and whether a tokenizer is trained on the document.
        words = np.frombuffer(b"".join(digests), "<u4").reshape(-1, 8)[:, 6:] % FILTER_BITS
        places, masks = words >> 3, np.uint8(1) << (words & 7).astype(np.uint8)
        may_be_known: npt.NDArray[np.bool_] = ((self.bits[places] & masks) != 0).all(axis=1)
        np.bitwise_or.at(self.bits, places, masks)
        return may_be_known

    def _known(self, digests: list[bytes]) -> set[bytes]:
        known: set[bytes] = set()
        for start in range(0, len(digests), LOOKUP_ROWS):
            some = digests[start : start + LOOKUP_ROWS]
            query = f"SELECT digest FROM seen WHERE digest IN ({','.join('?' * len(some))})"  # noqa: S608 - marks only
            known.update(row[0] for row in self.connection.execute(query, some))
        return known

    def _insert(self) -> None:
        self.connection.executemany("INSERT INTO seen VALUES (?)", ((digest,) for digest in sorted(self.waiting)))
        self.waiting.clear()


@contextmanager
def open_seen(folder: Path) -> Iterator[Seen]:
    """An empty memory in ``folder``, begun anew whatever an earlier run left there."""
    with open_table(folder / "seen.sqlite", "CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID") as connection:
        yield Seen(connection)


@contextmanager
def open_table(path: Path, *tables: str) -> Iterator[sqlite3.Connection]:
    """A database of empty tables. A crash begins anew, so nothing in it needs to survive one; it is gone afterwards."""
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        for pragma in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE_KILOBYTES}", "locking_mode=EXCLUSIVE"):
            connection.execute(f"PRAGMA {pragma}")
        for table in tables:
            connection.execute(table)
        connection.execute("BEGIN")
        yield connection
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}; free room on that disk and run again") from error
    finally:
        connection.close()
        path.unlink(missing_ok=True)
