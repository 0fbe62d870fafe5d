# SPDX-License-Identifier: Apache-2.0
"""A job whose records are damaged is set aside; the others, and the operator, go on."""

import asyncio
import contextlib
import json
import random
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedpipe_api.base import UserError
from fedpipe_api.job import FedPipeJob
from fedpipe_operator.engine import Engine, Refused
from fedpipe_operator.engine.state import blobs_in_use
from fedpipe_operator.metrics import OperatorMetrics
from fedpipe_operator.store import Blobs, Entry, Ledger
from fedpipe_operator.store.ledger import SCHEMA, _checksum
from standins.agents import model_shape, registration
from standins.local import local, working
from standins.server import UID, job

OTHER = "job-2"


def other_job() -> FedPipeJob:
    found = job(2, 2)
    return found.model_copy(
        update={"metadata": found.metadata.model_copy(update={"uid": OTHER, "name": "other"})}
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a job that ran to its end and one whose agents have registered."""

    async def make() -> None:
        async with local(path, nodes=2, count=2) as served:
            await served.engine.submit(other_job())
            await served.engine.set_eligible_nodes(OTHER, served.nodes)
            await served.engine.register(OTHER, "node-0", registration(model_shape(2)))
            async with working([served.agent(node) for node in served.nodes]):
                await served.finish()

    path = tmp_path_factory.mktemp("store")
    asyncio.run(make())
    return path


def change(directory: Path, key: str, edit: Callable[[str], str | None], checksum: bool = True) -> None:
    """Replace (or remove, with None) a record of the first job; with a checksum that fits or the old one."""
    with closing(sqlite3.connect(directory / "ledger.sqlite", isolation_level=None)) as db:
        at, body, crc = db.execute(
            "SELECT at, body, crc FROM record WHERE job=? AND key=?", (UID, key)
        ).fetchone()
        new = edit(body)
        if new is None:
            db.execute("DELETE FROM record WHERE job=? AND key=?", (UID, key))
            return
        crc = _checksum(UID, key, at, new) if checksum else crc
        db.execute("UPDATE record SET body=?, crc=? WHERE job=? AND key=?", (new, crc, UID, key))


def keys(directory: Path) -> list[str]:
    with closing(sqlite3.connect(directory / "ledger.sqlite")) as db:
        return [key for (key,) in db.execute("SELECT key FROM record WHERE job=? ORDER BY seq", (UID,))]


@contextlib.asynccontextmanager
async def started(directory: Path) -> Any:
    engine = Engine(directory)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def edited(field: str, value: object) -> Callable[[str], str]:
    return lambda body: json.dumps(json.loads(body) | {field: value})


def inner(outer: str, field: str, text: str) -> Callable[[str], str]:
    """Put JSON text in the place of a field of a part of the body."""

    def edit(body: str) -> str:
        document = json.loads(body)
        document[outer][field] = "@"
        return json.dumps(document).replace('"@"', text)

    return edit


DAMAGE: dict[str, tuple[str, Callable[[str], str | None]]] = {
    "unknown kind": ("opened/1", edited("kind", "of-tomorrow")),
    "unknown field": ("opened/1", edited("ofTomorrow", 1)),
    "no json": ("opened/1", lambda body: body[:-1]),
    "key of another": ("opened/2", edited("round", 7)),
    "null deadline": ("opened/1", edited("deadline", None)),
    "null speed": ("registered/2", inner("device", "speed", "null")),
    "infinite speed": ("registered/2", inner("device", "speed", "Infinity")),
    "NaN loss": ("update/1/node-0", inner("manifest", "trainLoss", "NaN")),
    "huge tokens": ("evaluated/0/node-0", inner("evaluation", "tokens", "1" + 400 * "0")),
    "deep": ("submitted", lambda body: body[:-1] + ',"x":' + 5000 * "[" + 5000 * "]" + "}"),
    "no submission": ("submitted", lambda body: None),
    "no plan": ("plan/1", lambda body: None),
    "no opening": ("opened/1", lambda body: None),
    "no closing": ("closed/1", lambda body: None),
    "no aggregate": ("aggregated/1", lambda body: None),
}


@pytest.mark.parametrize("name", DAMAGE)
async def test_a_damaged_record_sets_its_job_aside(store: Path, tmp_path: Path, name: str) -> None:
    directory = tmp_path / "store"
    shutil.copytree(store, directory)
    key, edit = DAMAGE[name]
    key = next(known for known in keys(directory) if known.startswith(key.rsplit("/", 1)[0])) if (
        key not in keys(directory)
    ) else key  # fmt: skip
    blobs = {path.name for path in (directory / "blobs").glob("??/*")}
    change(directory, key, edit)
    async with started(directory) as engine:
        assert set(engine.jobs) == {OTHER}, "the other job runs"
        await engine.register(OTHER, "node-1", registration(model_shape(2)))
        found = engine.quarantined[UID]
        assert found.key
        assert found.reason
        with pytest.raises(Refused) as refused:
            engine.facts(UID, "node-0")
        assert refused.value.reason == "JobQuarantined"
        await engine.submit(job(2, 2))  # what the controller says of a job it sees: nothing is written
        assert UID not in engine.jobs
        assert {path.name for path in (directory / "blobs").glob("??/*")} == blobs
    async with started(directory) as engine:
        assert engine.quarantined[UID] == found
        await engine.delete(UID)
        assert UID not in engine.quarantined
    assert not keys(directory)
    assert not {path.name for path in (directory / "blobs").glob("??/*")}


async def test_any_byte_of_any_record_may_change(store: Path, tmp_path: Path) -> None:
    """Start never fails, and what is damaged is noticed: by its checksum, or by being unreadable."""
    chance = random.Random(12)
    for number in range(60):
        directory = tmp_path / str(number)
        directory.mkdir()
        shutil.copy(store / "ledger.sqlite", directory)
        (directory / "blobs").mkdir()
        checksum = bool(number % 2)
        with closing(sqlite3.connect(directory / "ledger.sqlite", isolation_level=None)) as db:
            seq, key, at, body = chance.choice(
                db.execute(
                    "SELECT seq, key, at, CAST(body AS BLOB) FROM record WHERE job=?", (UID,)
                ).fetchall()
            )
            spoiled = bytearray(body)
            spoiled[chance.randrange(len(spoiled))] ^= chance.randrange(1, 256)
            db.execute("UPDATE record SET body=CAST(? AS TEXT) WHERE seq=?", (bytes(spoiled), seq))
            if checksum:
                text = bytes(spoiled).decode(errors="replace")
                db.execute("UPDATE record SET crc=? WHERE seq=?", (_checksum(UID, key, at, text), seq))
        async with started(directory) as engine:
            assert OTHER in engine.jobs
            assert (UID in engine.jobs) != (UID in engine.quarantined)
            if not checksum:
                assert UID in engine.quarantined


@pytest.mark.parametrize("at", [-1.0, 1e300, float("inf")])
async def test_impossible_times_set_the_job_aside(store: Path, tmp_path: Path, at: float) -> None:
    directory = tmp_path / "store"
    shutil.copytree(store, directory)
    with closing(sqlite3.connect(directory / "ledger.sqlite", isolation_level=None)) as db:
        body = db.execute("SELECT body FROM record WHERE job=? AND key='plan/1'", (UID,)).fetchone()[0]
        crc = _checksum(UID, "plan/1", at, body)
        db.execute("UPDATE record SET at=?, crc=? WHERE job=? AND key='plan/1'", (at, crc, UID))
    async with started(directory) as engine:
        assert set(engine.jobs) == {OTHER}
        assert "time" in engine.quarantined[UID].reason


async def send(engine: Engine, node: str) -> None:
    """Send as an agent that comes and goes, until the job is gone."""
    with contextlib.suppress(Refused):
        while True:
            await engine.mark_lost(UID, node, "gone")
            await engine.register(UID, node, registration(model_shape(2)))


@pytest.mark.parametrize(("agents", "seconds"), [(4, 0.0), (12, 0.0), (12, 0.02)])
async def test_deletion_while_agents_send_leaves_nothing(tmp_path: Path, agents: int, seconds: float) -> None:
    """Ten deletions with agents that send all the time; then every store starts, empty."""
    for number in range(10):
        directory = tmp_path / str(number)
        async with local(directory, nodes=agents, count=50) as served:
            append = served.engine._journal._ledger.append

            def slowly(entry: Entry, append: Callable[[Entry], None] = append) -> None:
                append(entry)
                if seconds:
                    time.sleep(seconds)

            served.engine._journal._ledger.append = slowly  # type: ignore[method-assign]
            state = served.engine.jobs[UID].state
            tasks = [asyncio.create_task(send(served.engine, node)) for node in served.nodes]
            while state.sequence < 2 * number + 4:
                await asyncio.sleep(0.001)
            await served.engine.delete(UID)
            await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert not keys(directory)
        async with started(directory) as engine:
            assert not engine.jobs
            assert not engine.quarantined


async def test_the_store_starts_whatever_is_in_it(store: Path, tmp_path: Path) -> None:
    directory = tmp_path / "store"
    shutil.copytree(store, directory)
    blobs = directory / "blobs"
    shutil.rmtree(blobs / "temp", ignore_errors=True)
    (blobs / "temp" / "temp" / "deep").mkdir(parents=True)
    (blobs / "temp" / "file").write_text("half an update")
    (blobs / "temp" / "link").symlink_to("/nowhere")
    (blobs / "lost+found").mkdir()
    (blobs / "note.txt").write_text("of an administrator")
    free = next(f"{n:02x}" for n in range(256) if not (blobs / f"{n:02x}").exists())
    (blobs / free).write_text("a file where a directory of blobs will be")
    known = next(blobs.glob("??/*"))
    (known.parent / "foreign").write_text("x")
    (known.parent / (known.name[:2] + 62 * "0")).mkdir()
    async with started(directory) as engine:
        assert set(engine.jobs) == {UID, OTHER}
        assert not list(blobs.glob("temp/*"))
        assert (blobs / "note.txt").exists()
        assert (known.parent / "foreign").exists()
        assert not (blobs / free).exists()
        assert blobs_in_use(engine.jobs[UID].state) <= {path.name for path in blobs.glob("??/*")}
        engine.blobs.size()
    shutil.rmtree(blobs / "temp")
    (blobs / "temp").write_text("a file")
    Blobs(blobs).incoming().discard()


def test_a_ledger_of_the_first_version_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(
            "CREATE TABLE record (seq INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, key TEXT NOT NULL,"
            " at REAL NOT NULL, body TEXT NOT NULL, UNIQUE (job, key)) STRICT"
        )
        db.execute("INSERT INTO record (job, key, at, body) VALUES ('a', 'submitted', 1.5, '{\"x\":\"ü\"}')")
    for _ in range(2):
        ledger = Ledger(path)
        assert list(ledger.replay()) == [Entry("a", "submitted", 1.5, '{"x":"ü"}')]
        ledger.close()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA,)


def test_a_ledger_of_a_later_version_is_refused_untouched(tmp_path: Path) -> None:
    """As after `helm rollback`: one line that says what to do, and not a byte is changed."""
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"later version.*run that version again, or restore a backup"):
        Engine(tmp_path)
    assert path.read_bytes() == before


async def test_a_scrape_leaves_out_a_job_without_figures(store: Path, tmp_path: Path) -> None:
    directory = tmp_path / "store"
    shutil.copytree(store, directory)
    async with started(directory) as engine:
        figures = OperatorMetrics(engine, directory, dict, lambda: 0.0, dict)
        engine.jobs[UID].state.submitted_at = 10**400
        for _ in range(2):
            text = (await figures.text()).decode()
            assert 'job="other"' in text
            assert 'job="test"' not in text
            assert "fedpipe_operator_unmeasured_jobs 1.0" in text
        engine.jobs[UID].state.submitted_at = 1.0
        text = (await figures.text()).decode()
        assert 'job="test"' in text
        assert "fedpipe_operator_unmeasured_jobs 0.0" in text
