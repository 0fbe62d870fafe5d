"""The ledger: an append-only table of records, one durable commit each."""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedpipe_api.base import UserError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS record (
    seq  INTEGER PRIMARY KEY AUTOINCREMENT,
    job  TEXT NOT NULL,
    key  TEXT NOT NULL,
    at   REAL NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (job, key)
) STRICT;
"""


class Duplicate(Exception):
    """A record with this job and key is already in the ledger."""


@dataclass(frozen=True)
class Entry:
    """One record: `key` is unique within the job, `at` is seconds since the epoch, `body` is JSON."""

    job: str
    key: str
    at: float
    body: str


class Ledger:
    """A SQLite file in WAL mode with full synchronisation: what `append` returned from survives a power cut.

    Not safe for concurrent use: the engine calls it from one thread.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            # Only one process may own a store: a second operator would hand out rounds of its own.
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.OperationalError as error:
            self._db.close()
            raise UserError(f"{path}: another process uses this store; stop it first ({error})") from None
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise UserError(f"{path}: not a FedPipe ledger ({error}); move it away") from None

    def append(self, entry: Entry) -> None:
        """Commit one record durably; raises Duplicate when its key is taken."""
        try:
            self._db.execute(
                "INSERT INTO record (job, key, at, body) VALUES (?, ?, ?, ?)",
                (entry.job, entry.key, entry.at, entry.body),
            )
        except sqlite3.IntegrityError as error:
            raise Duplicate(f"{entry.job} {entry.key}") from error

    def replay(self) -> Iterator[Entry]:
        """Yield every record in the order of its commit."""
        rows = self._db.execute("SELECT job, key, at, body FROM record ORDER BY seq")
        for job, key, at, body in rows:
            yield Entry(job, key, at, body)

    def forget(self, job: str) -> None:
        """Remove every record of a job."""
        self._db.execute("DELETE FROM record WHERE job = ?", (job,))

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._db.close()
