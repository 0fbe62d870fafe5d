# SPDX-License-Identifier: Apache-2.0
"""What the world outside an engine knows of a job, and whether a store agrees with it."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from fedpipe_api.job import FedPipeJob
from fedpipe_operator.engine.quarantine import fold
from fedpipe_operator.engine.state import JobState
from fedpipe_operator.store import Entry
from standins.server import UID


class Broken(Exception):
    """A rule was broken; the message says which."""


def digest_of(state: JobState) -> str:
    """Return a digest of all that a state holds."""
    # A default of 0 is read back as 0.0, which is the same number.
    text = re.sub(rb"\b(\d+)\.0\b", rb"\1", to_json(state))
    return hashlib.sha256(text).hexdigest()[:16]


@dataclass
class Witness:
    """Written to a file as it happens, so that it outlives the process that is killed.

    `records` are those that the engine has applied: [key, digest of the state after it]. `answered` and
    `damaged` are by (node, round).
    """

    path: Path
    spec: FedPipeJob | None = None
    records: list[tuple[str, str]] = field(default_factory=list)
    answered: dict[tuple[str, int], str] = field(default_factory=dict)
    damaged: set[tuple[str, int]] = field(default_factory=set)
    forgetting: bool = False
    broken: str | None = None
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Take up what was said before."""
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                self._hear(*json.loads(line))
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(self, kind: str, value: Any = None) -> None:
        """Note one thing."""
        os.write(self._file, json.dumps([kind, value]).encode() + b"\n")
        self._hear(kind, value)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _hear(self, kind: str, value: Any) -> None:
        match kind:
            case "spec":
                self.spec = FedPipeJob.model_validate(value)
            case "record":
                self.records.append(tuple(value))
            case "answered":
                node, number, digest = value
                self.answered[node, number] = digest
            case "damaged":
                self.damaged.add(tuple(value))
            case "forgetting":
                self.forgetting = value
            case "forgot":
                self.records, self.forgetting = [], False
                self.answered.clear()
                self.damaged.clear()
            case "rewound":
                del self.records[value:]
            case "broken":
                self.broken = value
            case "done":
                self.done[value] += 1
            case _:
                raise ValueError(kind)

    def compare(self, entries: Sequence[Entry]) -> None:
        """Check what a ledger holds after a restart, and take up the one record that may be new; raises Broken."""
        if any(entry.job != UID for entry in entries):
            raise Broken("the ledger has a record of another job")
        keys, known = [entry.key for entry in entries], [key for key, _ in self.records]
        if self.forgetting:
            if not keys:
                self.say("forgot")
                return
            self.say("forgetting", False)
        # One record may have been durable before the engine could say so, and no more: one waits for another.
        if keys[: len(known)] != known or len(keys) > len(known) + 1:
            raise Broken(f"the ledger has {keys[-3:]}, {len(keys)} in all; it had {known[-3:]}, {len(known)}")
        state: JobState | None = None
        for number, entry in enumerate(entries):
            state = fold(state, UID, entry)
            found = digest_of(state)
            if number == len(known):
                self.say("record", [entry.key, found])
            elif found != self.records[number][1]:
                raise Broken(f"the state after {entry.key} differs")
        self._compare_updates([json.loads(entry.body) for entry in entries])

    def _compare_updates(self, records: list[dict[str, Any]]) -> None:
        counts, digests = Counter[tuple[str, int]](), {}
        rounds = Counter(record["round"] for record in records if record["kind"] == "aggregated")
        for record in records:
            if record["kind"] in ("update", "dropped"):
                place = record["node"], record["round"]
                counts[place] += 1 if record["kind"] == "update" else -1
                if record["kind"] == "update":
                    digests[place] = record["manifest"]["digest"]
                elif place not in self.damaged:
                    raise Broken(f"the update of {place} was dropped, though nothing was wrong with it")
        if set(counts.values()) - {0, 1} or set(rounds.values()) - {1}:
            raise Broken("an update or a round counts twice")
        for place, digest in self.answered.items():
            if digests.get(place) != digest or not (counts[place] or place in self.damaged):
                raise Broken(f"the accepted update of {place} is lost, or another")


def copy_store(source: Path, target: Path) -> None:
    """Copy a store that nobody writes to now as a power cut would leave it."""
    target.mkdir()
    for path in source.glob("ledger.sqlite*"):
        if not path.name.endswith("-shm"):
            shutil.copy(path, target)
    for path in source.glob("blobs/??/*"):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile, since no record names it any more
            shutil.copy(path, place)


LATER = 99
"""A ledger schema that no version has yet."""


def set_version(path: Path, version: int) -> int:
    """Set the schema version of a ledger that nobody uses; return the one before."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        before = int(db.execute("PRAGMA user_version").fetchone()[0])
        db.execute(f"PRAGMA user_version = {version}")
    return before


def make_old(path: Path) -> None:
    """Turn a ledger that nobody uses into one of schema 0, in one transaction."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(
            """
            BEGIN EXCLUSIVE;
            CREATE TABLE old (
                seq  INTEGER PRIMARY KEY AUTOINCREMENT,
                job  TEXT NOT NULL,
                key  TEXT NOT NULL,
                at   REAL NOT NULL,
                body TEXT NOT NULL,
                UNIQUE (job, key)
            ) STRICT;
            INSERT INTO old SELECT seq, job, key, at, body FROM record ORDER BY seq;
            DROP TABLE record;
            ALTER TABLE old RENAME TO record;
            PRAGMA user_version = 0;
            COMMIT;
            """
        )
