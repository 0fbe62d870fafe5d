# SPDX-License-Identifier: Apache-2.0
"""Files of the store that rot or vanish are noticed before they are used; a backup brings the round back."""

import asyncio
import io
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from fedpipe_api.base import UserError
from fedpipe_api.conditions import Reason
from fedpipe_operator.engine import Engine, driver, silence
from fedpipe_operator.engine.status import status
from fedpipe_operator.store.backup import back_up, restore
from standins.local import Local, local, working
from standins.server import UID


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(driver, "RETRY_SECONDS", 0.2)


async def eventually(holds: Callable[[], bool], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def reasons(served: Local) -> set[str]:
    job = served.engine.jobs[UID]
    return {condition.reason for condition in status(job.state, job.wait, {}).conditions}


async def after_rounds(served: Local, count: int) -> None:
    await eventually(lambda: served.engine.jobs[UID].state.done >= count)


@pytest.mark.parametrize("harm", [flip, Path.unlink])
async def test_a_damaged_update_is_sent_again(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    async with local(tmp_path / "a", nodes=2, count=2) as served:
        async with working([served.agent(node) for node in served.nodes]):
            await served.finish()
        expected = served.engine.jobs[UID].state.adapter
    async with local(tmp_path / "b", nodes=2, count=2) as served:
        engine, state = served.engine, served.engine.jobs[UID].state
        adopt, harmed = engine.blobs.adopt, []

        def adopted(temporary: Path, digest: str) -> Path:
            path = adopt(temporary, digest)
            if state.current and state.current.closed is None and not harmed:
                time.sleep(0.02)  # a write within the same tick of the file system's clock cannot be seen
                harm(path)
                harmed.append(path)
            return path

        engine.blobs.adopt = adopted  # type: ignore[method-assign]
        async with working([served.agent(node) for node in served.nodes]):
            await served.finish()
        assert harmed
        assert sum(sum(known.drops.values()) for known in state.rounds.values()) == 1
        assert state.adapter == expected
    again = Engine(tmp_path / "b")
    await again.start()
    assert again.jobs[UID].state == state
    await again.stop()


@pytest.mark.parametrize("harm", [flip, Path.unlink])
async def test_what_nodes_download_is_made_again(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    async with local(tmp_path, nodes=2, count=2) as served:
        async with working([served.agent(node) for node in served.nodes]):
            await served.finish()
        result = served.engine.jobs[UID].state.rounds[2].result
        assert result
        assert result.sent
        path = served.engine.blobs.path(result.sent.digest)
        before = path.read_bytes()
        harm(path)
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer token-node-0"}) as client:
            answer = await client.get(f"{served.address}/v1/blobs/{result.sent.digest}")
            assert answer.status == 200
            assert await answer.read() == before
        assert path.read_bytes() == before


@pytest.mark.parametrize("harm", [flip, Path.unlink])
async def test_a_damaged_global_adapter_is_said_and_never_used(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    async with local(tmp_path, nodes=2, count=4) as served:
        engine, state = served.engine, served.engine.jobs[UID].state
        agents = [served.agent(node) for node in served.nodes]
        async with working(agents):
            await after_rounds(served, 1)
            assert state.adapter
            number, path = state.done, engine.blobs.path(state.adapter.digest)
            saved = path.read_bytes()
            harm(path)
            await eventually(lambda: Reason.STORE_DAMAGED in reasons(served) or bool(state.finished))
            if state.finished:
                pytest.skip("the job ended before the damage")
            assert state.done <= number + 1
            done = state.done
            await asyncio.sleep(0.5)
            assert state.done == done
            assert "restore a backup" in (engine.jobs[UID].damage or "")
            path.write_bytes(saved)
            await served.finish()
        assert Reason.STORE_DAMAGED not in reasons(served)
        assert state.done == 4


async def test_a_backup_of_a_working_store_goes_on_with_its_round(tmp_path: Path) -> None:
    """Taken by the command from the running engine; restored by the command; then the job ends as it would have."""
    taken, file = tmp_path / "taken", tmp_path / "backup.tar"
    command = [sys.executable, "-m", "fedpipe_operator.kube"]
    async with local(taken, nodes=2, count=8) as served:
        agents = [served.agent(node) for node in served.nodes]
        async with working(agents):
            await after_rounds(served, 2)
        made = await asyncio.create_subprocess_exec(*command, "backup", str(file), "--store", str(taken))
        assert await made.wait() == 0
        async with working(agents):
            await served.finish()
        expected = served.engine.jobs[UID].state.adapter
        assert not list((taken / "blobs" / "temp").iterdir())
    back = tmp_path / "back"
    run = partial(subprocess.run, [*command, "restore", str(file), "--store", str(back)], capture_output=True)
    assert (await asyncio.to_thread(run)).returncode == 0
    async with local(back, nodes=2, count=8) as served:
        state = served.engine.jobs[UID].state
        assert 2 <= state.done < 8
        async with working([served.agent(node) for node in served.nodes]):
            await served.finish()
        assert state.adapter == expected
    full = await asyncio.to_thread(run)
    assert full.returncode == 2
    assert "there is a ledger already" in full.stderr.decode()


async def test_a_damaged_backup_restores_nothing(tmp_path: Path) -> None:
    async with local(tmp_path / "store", nodes=2, count=1) as served:
        async with working([served.agent(node) for node in served.nodes]):
            await served.finish()
    whole = io.BytesIO()
    back_up(tmp_path / "store", whole)
    content = whole.getvalue()
    blob = next((tmp_path / "store/blobs").glob("??/*")).read_bytes()
    place = content.index(blob) + len(blob) // 2
    flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    for number, spoiled in enumerate((content[: len(content) // 2], b"no tar", flipped)):
        target = tmp_path / str(number)
        with pytest.raises(UserError, match=r"damaged|cut short|not a backup"):
            restore(io.BytesIO(spoiled), target)
        assert not (target / "ledger.sqlite").exists()
    restore(io.BytesIO(content), tmp_path / "whole")
    assert {p.name for p in (tmp_path / "whole/blobs").glob("??/*")} == {
        p.name for p in (tmp_path / "store/blobs").glob("??/*")
    }


async def test_a_ledger_older_than_its_blobs_says_what_is_missing(tmp_path: Path) -> None:
    store, old = tmp_path / "store", tmp_path / "old"
    async with local(store, nodes=2, count=6) as served:
        async with working([served.agent(node) for node in served.nodes]):
            await after_rounds(served, 1)
            async with served.engine._journal.snapshot() as directory:
                shutil.copy(directory / "ledger.sqlite", tmp_path)
            await served.finish()
    shutil.copytree(store, old)
    for left in old.glob("ledger.sqlite*"):
        left.unlink()
    shutil.copy(tmp_path / "ledger.sqlite", old / "ledger.sqlite")
    async with local(old, nodes=2, count=6) as served:
        async with working([served.agent(node) for node in served.nodes]):
            await eventually(lambda: Reason.STORE_DAMAGED in reasons(served))
        assert served.engine.jobs[UID].state.done < 6
