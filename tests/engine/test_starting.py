# SPDX-License-Identifier: Apache-2.0
"""What an agent says before it registers is shown, and counts for nothing else."""

from pathlib import Path

import pytest

from fedpipe_api.wire import STARTING, AssignmentKind, Progress
from fedpipe_operator.engine.status import status
from standins.agents import model_shape, registration
from standins.local import local
from standins.server import UID


def starting(state: str) -> Progress:
    return Progress(kind=AssignmentKind.PROFILE, round=0, state=state)


@pytest.mark.parametrize("state", STARTING)
async def test_a_node_that_starts_is_shown_at_it_and_is_not_live(state: str, tmp_path: Path) -> None:
    async with local(tmp_path) as site:
        job = site.engine.jobs[UID]
        assert await site.engine.progress(UID, "node-0", starting(state))
        heard = {node: live.progress for node, live in job.live.items() if live.progress}
        found = {node.name: node.state for node in status(job.state, None, heard).node_table}
        assert found == {"node-0": state, "node-1": "starting", "node-2": "starting"}
        assert not job.state.live


async def test_a_lost_node_is_not_back_before_its_new_agent_registers(tmp_path: Path) -> None:
    async with local(tmp_path) as site:
        job = site.engine.jobs[UID]
        await site.engine.register(UID, "node-0", registration(model_shape()))
        await site.engine.mark_lost(UID, "node-0", "killed", failed=False)
        assert await site.engine.progress(UID, "node-0", starting("importing"))
        assert job.state.lost == {"node-0": "killed"}
        await site.engine.register(UID, "node-0", registration(model_shape()))
        assert not job.state.lost
