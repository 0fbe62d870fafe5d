# SPDX-License-Identifier: Apache-2.0
"""A full volume: agents hear of it and try again, status says it, and the job goes on once there is room."""

import asyncio
import errno
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fedpipe_api.conditions import Reason
from fedpipe_operator.engine import background as module
from fedpipe_operator.engine import driver, silence
from fedpipe_operator.engine.background import LASTING, Background
from fedpipe_operator.engine.status import status
from fedpipe_operator.store import Blobs, Entry, Ledger, is_full
from standins.agents import model_shape, registration
from standins.local import Local, local, working
from standins.server import UID


class Volume:
    """Stands in for a volume: while it is full, neither ledger nor blobs can write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        append, incoming = Ledger.append, Blobs.incoming

        def appended(ledger: Ledger, entry: Entry) -> None:
            if self.full:
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error
            append(ledger, entry)

        def received(blobs: Blobs) -> Any:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return incoming(blobs)

        monkeypatch.setattr(Ledger, "append", appended)
        monkeypatch.setattr(Blobs, "incoming", received)


def test_sqlite_says_that_it_is_full(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger._db.execute("PRAGMA max_page_count = 10")
    with pytest.raises(sqlite3.OperationalError) as full:
        ledger.append(Entry("a", "large", 1.0, 400_000 * "x"))
    assert is_full(full.value)
    assert not is_full(sqlite3.OperationalError("no such table"))
    ledger._db.execute("PRAGMA max_page_count = 10000")
    ledger.append(Entry("a", "again", 1.0, "x"))


async def eventually(holds: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.02)


def reasons(served: Local) -> set[str]:
    job = served.engine.jobs[UID]
    return {condition.reason for condition in status(job.state, job.wait, {}).conditions}


async def test_a_full_volume_is_said_and_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "PAUSE_SECONDS", 0.5)
    monkeypatch.setattr(driver, "RETRY_SECONDS", 0.2)
    volume = Volume(monkeypatch)
    async with local(tmp_path, nodes=2, count=60) as served:
        engine = served.engine
        agents = [served.agent(node) for node in served.nodes]
        async with working(agents):
            await eventually(lambda: engine.jobs[UID].state.done >= 2)
            volume.full = True
            await eventually(lambda: engine.jobs[UID].full is not None)
            done = engine.jobs[UID].state.done
            assert Reason.STORE_FULL in reasons(served)
            await asyncio.sleep(1.5)
            assert Reason.STORE_FULL in reasons(served), "and it stays said"
            assert engine.jobs[UID].state.done == done
            assert not engine.background.dead()
            volume.full = False
            await eventually(lambda: engine.jobs[UID].state.done >= done + 2)
            assert Reason.STORE_FULL not in reasons(served)


async def test_the_watch_for_silent_agents_survives_a_full_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silence, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(silence, "PAUSE_SECONDS", 0.05)
    volume = Volume(monkeypatch)
    async with local(tmp_path, nodes=2, count=2) as served:
        for node in served.nodes:
            await served.engine.register(UID, node, registration(model_shape(2)))
        volume.full = True
        await eventually(lambda: Reason.STORE_FULL in reasons(served))
        volume.full = False
        await eventually(lambda: set(served.engine.jobs[UID].state.lost) == set(served.nodes))
        await eventually(lambda: Reason.STORE_FULL not in reasons(served))


async def test_an_agent_is_answered_507(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = Volume(monkeypatch)
    async with local(tmp_path, nodes=2, count=2) as served, aiohttp.ClientSession() as client:
        volume.full = True
        answer = await client.post(
            f"{served.address}/v1/agents",
            data=registration(model_shape(2)).to_json(),
            headers={"Authorization": "Bearer token-node-0"},
        )
        assert answer.status == 507
        assert int(answer.headers["Retry-After"]) > 0
        assert (await answer.json())["reason"] == "StoreFull"
        assert Reason.STORE_FULL in reasons(served)


async def test_background_work_is_started_again_counted_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.01)
    background, runs, well = Background(), 0, asyncio.Event()

    async def work() -> None:
        nonlocal runs
        runs += 1
        if not well.is_set():
            raise sqlite3.OperationalError("database or disk is full")
        await asyncio.Event().wait()

    background.start("work", work)
    await eventually(lambda: background.dead() == ["work"])
    assert background.failures["work"] >= LASTING
    well.set()
    monkeypatch.setattr(module, "STEADY_SECONDS", 0.05)
    await eventually(lambda: not background.dead())
    known = runs
    await background.stop()
    assert runs == known
