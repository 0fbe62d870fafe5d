# SPDX-License-Identifier: Apache-2.0
"""Work that must come to its end, even when nobody waits for it any more."""

import asyncio
import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedpipe_api.job import FedPipeJob
from fedpipe_operator.engine import Engine, allowances
from fedpipe_operator.engine.background import uninterrupted
from standins.agents import model_shape, registration
from standins.local import local
from standins.server import UID, job


async def test_a_cancellation_waits_until_the_work_has_ended() -> None:
    ended = False

    async def work() -> None:
        nonlocal ended
        await asyncio.sleep(0.02)
        ended = True

    task = asyncio.create_task(uninterrupted(work()))
    for _ in range(3):
        await asyncio.sleep(0.001)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended


async def test_cancelled_calls_leave_memory_as_the_ledger_is(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine._worker.start = lambda: None  # type: ignore[method-assign]
    await engine.start()

    async def cancelled(call: object) -> None:
        task = asyncio.ensure_future(call)  # type: ignore[arg-type]
        for _ in range(3):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    await cancelled(engine.submit(job(2, 2)))
    await engine.submit(job(2, 2))
    assert engine.jobs[UID].task is not None, "somebody drives it"
    await engine.set_eligible_nodes(UID, ["node-0", "node-1"])
    await cancelled(engine.register(UID, "node-0", registration(model_shape(2))))
    await engine.register(UID, "node-0", registration(model_shape(2)))
    await engine.register(UID, "node-1", registration(model_shape(2)))
    driven = engine.jobs[UID].task
    await cancelled(engine.delete(UID))
    await engine.delete(UID)
    assert UID not in engine.jobs
    assert driven.done(), "nobody drives a job that is gone"
    assert list(engine._journal._ledger.replay()) == []
    await engine.stop()


async def test_only_a_new_generation_changes_the_spec(tmp_path: Path) -> None:
    """Another version of the operator may have other defaults: nobody edited anything then."""
    async with local(tmp_path, nodes=1, count=5) as served:
        state = served.engine.jobs[UID].state
        await served.engine.submit(job(1, 9))
        assert state.spec.rounds.count == 5
        await served.engine.submit(at_generation(3, job(1, 9)))
        assert (state.spec.rounds.count, state.generation) == (9, 3)
        await served.engine.submit(at_generation(2, job(1, 5)))
        assert (state.spec.rounds.count, state.generation) == (9, 3), "an old watch event"


async def test_what_is_edited_in_a_loop_does_not_fill_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(allowances, "time", SimpleNamespace(monotonic=lambda: now))
    async with local(tmp_path, nodes=1, count=5) as served:
        state = served.engine.jobs[UID].state
        taken = [
            await served.engine.submit(at_generation(generation, job(1, 5 + generation)))
            for generation in range(2, 5000)
        ]
        assert sum(taken) == allowances.Edits.BURST
        kept = [entry for entry in served.engine._journal._ledger.replay() if entry.key.startswith("spec/")]
        assert len(kept) == allowances.Edits.BURST
        now += allowances.Edits.SECONDS
        await served.engine.submit(at_generation(5000, job(1, 7)))
        assert (state.generation, state.spec.rounds.count) == (5000, 7), "the newest, once its time has come"


def at_generation(generation: int, changed: FedPipeJob) -> FedPipeJob:
    """Return the job as the API server shows it after that many edits."""
    metadata = changed.metadata.model_copy(update={"generation": generation})
    return changed.model_copy(update={"metadata": metadata})
