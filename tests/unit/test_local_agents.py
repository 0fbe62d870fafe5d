# SPDX-License-Identifier: Apache-2.0
import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedpipe_api.node import FleetNode
from fedpipe_operator.coordinator import Tokens
from fedpipe_operator.local import agents
from fedpipe_operator.local.manifest import Member


def test_a_fleet_s_nodes_have_a_gpu_only_where_the_environment_names_it(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert agents.environment(offline=True)["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert agents.environment(offline=True)["CUDA_VISIBLE_DEVICES"] == "1"


def test_the_last_line_is_the_agent_s_own():
    assert (
        agents.last_line("loading\n\nfedpipe-agent: a.jsonl:1: no field 'text'\n \n")
        == "a.jsonl:1: no field 'text'"
    )
    assert agents.last_line("") == ""


@pytest.mark.parametrize(
    ("counted", "killed", "says"), [(1, True, "memory"), (0, False, "killed by SIGKILL")]
)
def test_an_agent_that_the_kernel_kills_for_memory_is_lost_for_that(
    tmp_path, monkeypatch, counted, killed, says
):
    """A shell in the agent's place; the kernel's counter is a file, because no test can fill the machine."""
    counters = tmp_path / "vmstat"
    counters.write_text("pgfault 3\noom_kill 4\n")
    monkeypatch.setattr(agents, "VMSTAT", counters)
    script = f'printf "pgfault 3\\noom_kill {4 + counted}\\n" > {counters}; kill -KILL $$'
    monkeypatch.setattr(agents, "agent_command", lambda: ["/bin/sh", "-c", script])
    lost = []

    async def mark_lost(uid, node, reason, *, failed, killed):
        lost.append((node, reason, failed, killed))

    async def run():
        job = SimpleNamespace(state=SimpleNamespace(rounds={}))
        engine = SimpleNamespace(jobs={"u": job}, mark_lost=mark_lost)
        members = (Member(FleetNode(name="edge-a", memory="1Gi"), Path("data")),)
        found = agents.Agents(
            engine, uid="u", members=members, model="m", directory=tmp_path, tokens=Tokens(), url="http://x"
        )
        while not lost:
            await asyncio.sleep(0.01)
        await found.end(0)

    asyncio.run(run())
    ((node, reason, failed, was_killed), *_) = lost
    assert (node, failed, was_killed) == ("edge-a", False, killed)
    assert says in reason


def test_a_kernel_without_the_counter_kills_nothing_for_memory(tmp_path, monkeypatch):
    for text in (None, "pgfault 3\n", "not a counter at all\n"):
        path = tmp_path / "vmstat"
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(agents, "VMSTAT", path)
        assert agents.oom_kills() == 0
