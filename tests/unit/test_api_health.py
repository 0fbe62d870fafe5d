# SPDX-License-Identifier: Apache-2.0
"""What tools that follow kstatus, and Argo CD with the documented check, say of a job in every phase."""

import re
from pathlib import Path
from typing import Any

import pytest
from lupa import LuaRuntime

from fedpipe_api.conditions import Reason
from fedpipe_api.job import FedPipeJob
from fedpipe_api.status import FedPipeJobStatus
from fedpipe_operator.engine.decide import Wait, decide
from fedpipe_operator.engine.quarantine import Quarantine
from fedpipe_operator.engine.records import AgentLost, Finished
from fedpipe_operator.engine.status import status
from fedpipe_operator.kube.job_status import invalid_status, quarantined_status
from kube.objects import job
from standins.world import World, ready

CHART = Path(__file__).parents[2] / "charts/fedpipe/README.md"


def kstatus(document: dict[str, Any]) -> str:
    """Return the status by the rules of sigs.k8s.io/cli-utils for kinds that it does not know."""
    found = document.get("status", {})
    conditions = {c["type"]: c["status"] for c in found.get("conditions", [])}
    if found.get("observedGeneration") != document["metadata"]["generation"]:
        return "InProgress"
    if conditions.get("Reconciling") == "True":
        return "InProgress"
    if conditions.get("Stalled") == "True":
        return "Failed"
    return "Current" if conditions.get("Ready") == "True" else "InProgress"


def argo(document: dict[str, Any]) -> str:
    """Return the health by the script of the chart's README, run by Lua."""
    lines = re.search(r"FedPipeJob: \|\n((?: {4}.*\n)+)", CHART.read_text())
    assert lines
    lua = LuaRuntime()
    lua.globals().obj = lua.table_from(document, recursive=True)
    return str(lua.execute(lines[1]).status)


def shown(world: World, wait: Wait | None = None) -> FedPipeJobStatus:
    action = decide(world.state, world.now)
    return status(world.state, wait or (action if isinstance(action, Wait) else None), {})


def lost(world: World, node: str) -> None:
    sequence = world.state.sequence + 1
    world.record(AgentLost(sequence=sequence, node=node, reason="gone", failed=False))


def starting() -> FedPipeJobStatus:
    return shown(World(3, 2))


def training() -> FedPipeJobStatus:
    return shown(ready())


def too_few_nodes() -> FedPipeJobStatus:
    return shown(World(1, 2))


def agents_that_cannot_start() -> FedPipeJobStatus:
    world = World(3, 2)
    for node in world.nodes[:2]:
        lost(world, node)
    return shown(world)


def no_quorum() -> FedPipeJobStatus:
    world = ready()
    for node in world.nodes[:2]:
        lost(world, node)
    return shown(world)


def no_room() -> FedPipeJobStatus:
    return shown(ready(), Wait(Reason.STORE_FULL, "no room"))


def suspended() -> FedPipeJobStatus:
    world = ready()
    world.suspend(True)
    return shown(world)


def ended(phase: str, reason: Reason) -> FedPipeJobStatus:
    world = ready()
    world.record(Finished(phase=phase, reason=reason, message="why"))
    return shown(world)


def succeeded() -> FedPipeJobStatus:
    return ended("Succeeded", Reason.ROUNDS_COMPLETED)


def failed() -> FedPipeJobStatus:
    return ended("Failed", Reason.DEADLINE_EXCEEDED)


def invalid() -> FedPipeJobStatus:
    return invalid_status("spec.rounds.count: too small", 1, training(), 0.0)


def quarantined() -> FedPipeJobStatus:
    found = Quarantine("default", "test", "opened/1", "cannot be read")
    return quarantined_status(found, job(), training(), 0.0)


@pytest.mark.parametrize(
    ("state", "in_kstatus", "in_argo"),
    [
        (starting, "InProgress", "Progressing"),
        (training, "InProgress", "Progressing"),
        (too_few_nodes, "Failed", "Degraded"),
        (agents_that_cannot_start, "Failed", "Degraded"),
        (no_quorum, "Failed", "Degraded"),
        (no_room, "Failed", "Degraded"),
        (invalid, "Failed", "Degraded"),
        (quarantined, "Failed", "Degraded"),
        (suspended, "InProgress", "Suspended"),
        (succeeded, "Current", "Healthy"),
        (failed, "Failed", "Degraded"),
    ],
)
def test_tools_see_how_a_job_is(state: Any, in_kstatus: str, in_argo: str) -> None:
    found = state()
    generation = found.observed_generation
    document = FedPipeJob.model_validate(job().model_copy(update={"status": found}).to_dict()).to_dict() | {
        "metadata": {"name": "test", "generation": generation}
    }
    assert kstatus(document) == in_kstatus
    assert argo(document) == in_argo
    conditions = {c.type: c for c in found.conditions}
    assert {c.observed_generation for c in found.conditions} == {generation}
    ends = [kind for kind in ("Complete", "Failed") if conditions[kind].status == "True"]
    assert ends == {succeeded: ["Complete"], failed: ["Failed"]}.get(state, [])
    assert conditions["Ready"].reason
    stands_still = in_kstatus != "InProgress" or state is suspended
    assert not (stands_still and found.eta), "a job that stands still has no time left to show"
    behind = document | {"metadata": {"name": "test", "generation": (generation or 0) + 1}}
    assert kstatus(behind) == "InProgress"
    assert argo(behind) == "Progressing"


def test_a_job_that_is_not_seen_yet_is_on_its_way() -> None:
    document = {"metadata": {"name": "test", "generation": 1}}
    assert kstatus(document) == "InProgress"
    assert argo(document) == "Progressing"
