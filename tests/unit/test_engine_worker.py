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
        assert await found.run(abs, -1) == 1
        monkeypatch.setattr(worker, "RUN_SECONDS", 0.5)
        endless = asyncio.create_task(found.run(time.sleep, 3600))
        await asyncio.sleep(0)
        monkeypatch.setattr(worker, "RUN_SECONDS", 60.0)
        behind = asyncio.create_task(found.run(abs, -2))
        with pytest.raises(TimeoutError, match="sleep took more than"):
            await endless
        assert await behind == 2
    finally:
        found.stop()
