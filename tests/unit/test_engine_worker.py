# SPDX-License-Identifier: Apache-2.0
"""The worker process: one call at a time, and none that holds up the others for ever."""

import asyncio
import time

import pytest

from fedpipe_operator.engine import worker
from fedpipe_operator.engine.worker import Worker


async def test_a_call_that_does_not_end_is_ended_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = Worker()
    try:
        assert await found.run("team-a", abs, -1) == 1
        monkeypatch.setattr(worker, "RUN_SECONDS", 0.5)
        endless = asyncio.create_task(found.run("team-a", time.sleep, 3600))
        await asyncio.sleep(0)
        monkeypatch.setattr(worker, "RUN_SECONDS", 60.0)
        behind = asyncio.create_task(found.run("team-a", abs, -2))
        with pytest.raises(TimeoutError, match="sleep took more than"):
            await endless
        assert await behind == 2
    finally:
        found.stop()


async def test_a_namespace_of_many_calls_stands_before_nobody_else() -> None:
    found, order = Worker(), []

    async def call(namespace: str, number: int) -> None:
        await found.run(namespace, time.sleep, 0.05)
        order.append((namespace, number))

    try:
        await found.run("team-a", abs, -1)
        flood = [asyncio.create_task(call("team-a", number)) for number in range(12)]
        await asyncio.sleep(0)
        others = [asyncio.create_task(call("team-b", number)) for number in range(2)]
        await asyncio.gather(*flood, *others)
    finally:
        found.stop()
    assert order.index(("team-b", 0)) <= 1, "after the call that ran already"
    assert order.index(("team-b", 1)) <= 4, "turn by turn"
    assert [number for namespace, number in order if namespace == "team-a"] == list(range(12))
