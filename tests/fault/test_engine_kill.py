# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of the coordinator at random moments: nothing accepted is lost, nothing counts twice, the bytes are the same."""

import asyncio
import os
import random
import shutil
import socket
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

import standins.server
from fedpipe_operator.engine.records import ADAPTER
from standins.agents import StandIn
from standins.forked import Forked
from standins.local import local, working
from standins.server import UID

NODES, ROUNDS, KILLS = 4, 60, 30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(directory: Path, port: int, log: Path) -> Forked:
    arguments = [str(directory), str(port), str(NODES), str(ROUNDS)]
    return Forked(standins.server.program, arguments, log, os.environ, Path.cwd())


async def run(directory: Path, seed: int | None) -> tuple[str, list[StandIn], int]:
    """Run a job; with a seed, kill the server at random moments. Returns its last line, the agents and the kills."""
    port, chance = free_port(), random.Random(seed)
    agents = [
        StandIn(f"node-{i}", f"token-node-{i}", lambda: f"http://127.0.0.1:{port}") for i in range(NODES)
    ]
    kills = 0
    async with working(agents), asyncio.timeout(150):
        while True:
            log = directory.with_suffix(".log")
            server = serve(directory, port, log)
            if seed is not None and kills < KILLS:
                # From before it listens to some rounds later.
                try:
                    await asyncio.to_thread(server.wait, 1.2 * chance.random())
                except subprocess.TimeoutExpired:
                    server.kill()
                    await asyncio.to_thread(server.wait)
                    kills += 1
                    continue
            assert await asyncio.to_thread(server.wait) == 0, log.read_text()
            return log.read_text().splitlines()[-1], agents, kills


def ledger(directory: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(directory / "ledger.sqlite")) as db:
        return list(db.execute("SELECT key, body FROM record ORDER BY seq"))


@pytest.mark.slow
async def test_thirty_kills_change_nothing(tmp_path: Path) -> None:
    undisturbed, _, _ = await run(tmp_path / "a", None)
    disturbed, agents, kills = await run(tmp_path / "b", seed=7)
    assert undisturbed.startswith("Succeeded ")
    assert disturbed == undisturbed, "the same accepted updates give the same bytes"
    assert kills >= KILLS // 2, f"only {kills} kills hit a running job: give it more rounds"
    records = ledger(tmp_path / "b")
    keys = [key for key, _ in records]
    assert len(keys) == len(set(keys))
    accepted = {key: ADAPTER.validate_json(body) for key, body in records if key.startswith("update/")}
    assert len(accepted) == NODES * ROUNDS
    for agent in agents:
        for number, digest in agent.answered.items():
            record = accepted[f"update/{number}/{agent.node}"]
            assert record.kind == "update"
            assert record.manifest.digest == digest, "answered with success, so it must count"


async def test_every_prefix_of_the_ledger_leads_to_the_same_adapter(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    async with local(whole, nodes=2, count=2) as served:
        # Every blob is kept, so that the store can be set back to any moment.
        served.engine.blobs.remove = lambda digest: None  # type: ignore[method-assign]
        async with working([served.agent(node) for node in served.nodes]):
            await served.finish()
        state = served.engine.jobs[UID].state
        assert state.adapter
        digest = state.adapter.digest
    with closing(sqlite3.connect(whole / "ledger.sqlite")) as db:
        rows = list(db.execute("SELECT * FROM record ORDER BY seq"))
    assert len(rows) > 12
    for length in range(1, len(rows), 2):
        again = tmp_path / str(length)
        again.mkdir()
        # Blobs may be ahead of the ledger (renamed, then killed before the record), never behind.
        shutil.copytree(whole / "blobs", again / "blobs")
        shutil.copy(whole / "ledger.sqlite", again)
        with closing(sqlite3.connect(again / "ledger.sqlite", isolation_level=None)) as db:
            db.execute("DELETE FROM record WHERE seq > ?", (rows[length - 1][0],))
        async with local(again, nodes=2, count=2) as served:
            async with working([served.agent(node) for node in served.nodes]):
                await served.finish()
            state = served.engine.jobs[UID].state
            assert state.adapter
            assert state.adapter.digest == digest, f"after {rows[length - 1][2]}"
