# SPDX-License-Identifier: Apache-2.0
"""The ledger: an append-only table of records, one durable commit each."""

import sqlite3
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedpipe_api.base import UserError

SCHEMA = 2
"""Version of the tables and of the records in them: when either changes, raise it and add to `_STEPS`."""

# Steps from each version to the next. Version 0 had no checksums; the table's name stays, so that an operator
# of version 0 sees the jobs (and cannot write, for want of a checksum) instead of an empty store.
_STEPS = (
    """
    CREATE TABLE IF NOT EXISTS record (
        seq  INTEGER PRIMARY KEY AUTOINCREMENT,
        job  TEXT NOT NULL,
        key  TEXT NOT NULL,
        at   REAL NOT NULL,
        body TEXT NOT NULL,
        UNIQUE (job, key)
    ) STRICT;
    CREATE TABLE checked (
        seq   INTEGER PRIMARY KEY AUTOINCREMENT,
        job   TEXT NOT NULL,
        key   TEXT NOT NULL,
        at    REAL NOT NULL,
        body  TEXT NOT NULL,
        crc   INTEGER NOT NULL,
        UNIQUE (job, key)
    ) STRICT;
    INSERT INTO checked SELECT seq, job, key, at, body, checksum(job, key, at, body) FROM record ORDER BY seq;
    DROP TABLE record;
    ALTER TABLE checked RENAME TO record;
    """,
    # Records of version 2 may have fields that version 1 does not know: of agents killed for memory.
    "",
)
assert len(_STEPS) == SCHEMA

# As bytes: text that is no UTF-8 any more must be the trouble of one record, not of the whole query.
_SELECT = "SELECT CAST(job AS BLOB), CAST(key AS BLOB), at, CAST(body AS BLOB), crc FROM record ORDER BY seq"
_SUBMITTED = """
SELECT CAST(job AS BLOB), CAST(max(CASE key WHEN 'submitted' THEN body ELSE '' END) AS BLOB)
FROM record GROUP BY job
"""


class Duplicate(Exception):
    """A record with this job and key is already in the ledger."""


@dataclass(frozen=True)
class Entry:
    """One record: `key` is unique within the job, `at` is seconds since the epoch, `body` is JSON.

    `intact` says whether what was read is what was written.
    """

    job: str
    key: str
    at: float
    body: str
    intact: bool = True


class Ledger:
    """A SQLite file in WAL mode with full synchronisation: what `append` returned from survives a power cut.

    Not safe for concurrent use: the engine calls it from one thread.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except sqlite3.OperationalError as error:
            raise UserError(f"{path}: cannot be opened ({error}); check the volume") from None
        try:
            # Only one process may own a store: a second operator would hand out rounds of its own.
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._migrate()
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
        except UserError:
            self._db.close()
            raise
        except sqlite3.OperationalError as error:
            self._db.close()
            if error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                text = f"{path}: another process uses this store; stop it first ({error})"
            else:
                text = f"{path}: cannot be opened ({error}); check the volume"
            raise UserError(text) from None
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise UserError(
                f"{path}: not a FedPipe ledger ({error}); restore a backup or move it away"
            ) from None

    def _migrate(self) -> None:
        # Before anything is written, so that a ledger of a later version stays as it is, to the byte.
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA:
            raise UserError(
                f"{self._path}: written by a later version of FedPipe (ledger schema {version}, this one "
                f"knows {SCHEMA}); run that version again, or restore a backup made before the upgrade"
            )
        self._db.create_function("checksum", 4, _checksum, deterministic=True)
        for number, step in enumerate(_STEPS[version:], version + 1):
            # executescript ends an open transaction first, so it must begin its own.
            try:
                self._db.executescript(f"BEGIN EXCLUSIVE;{step}PRAGMA user_version = {number};COMMIT;")
            except sqlite3.Error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def append(self, entry: Entry) -> None:
        """Commit one record durably; raises Duplicate when its key is taken."""
        crc = _checksum(entry.job, entry.key, entry.at, entry.body)
        try:
            self._db.execute(
                "INSERT INTO record (job, key, at, body, crc) VALUES (?, ?, ?, ?, ?)",
                (entry.job, entry.key, entry.at, entry.body, crc),
            )
        except sqlite3.IntegrityError as error:
            raise Duplicate(f"{entry.job} {entry.key}") from error

    def replay(self) -> Iterator[Entry]:
        """Yield every record in the order of its commit, whatever is in it."""
        try:
            for job, key, at, body, crc in self._db.execute(_SELECT):
                names = job.decode(errors="replace"), key.decode(errors="replace")
                text = body.decode(errors="replace")
                yield Entry(*names, at, text, intact=crc == _checksum(*names, at, text))
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from None

    def submitted(self) -> list[tuple[str, str]]:
        """Return the uid of every job and the record of its submission, empty where there is none."""
        try:
            rows = self._db.execute(_SUBMITTED).fetchall()
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from None
        return [(job.decode(errors="replace"), body.decode(errors="replace")) for job, body in rows]

    def _damaged(self, error: sqlite3.DatabaseError) -> UserError:
        return UserError(f"{self._path}: damaged ({error}); restore a backup")

    def forget(self, job: str) -> None:
        """Remove every record of a job."""
        self._db.execute("DELETE FROM record WHERE job = ?", (job,))

    def copy(self, path: Path) -> None:
        """Write a consistent copy of the whole ledger to a new file."""
        copied = sqlite3.connect(path, isolation_level=None)
        try:
            self._db.backup(copied)
            copied.execute("PRAGMA journal_mode = DELETE")
        finally:
            copied.close()

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._db.close()


def _checksum(job: str, key: str, at: float, body: str) -> int:
    return zlib.crc32(f"{job}\0{key}\0{at!r}\0{body}".encode())
