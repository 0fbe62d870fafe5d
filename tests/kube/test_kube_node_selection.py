# SPDX-License-Identifier: Apache-2.0
"""Which nodes a job may use, which of them get its places, and why not the others."""

from typing import Any

import pytest

from kube.looks import fleet, look, state_of
from kube.objects import NOW, capacity, job, node, pod


def tainted(body: Any, key: str, effect: str = "NoSchedule", value: str = "") -> Any:
    """A Node with a taint."""
    return body | {"spec": body["spec"] | {"taints": [{"key": key, "effect": effect, "value": value}]}}


@pytest.mark.parametrize(
    ("the_node", "report", "held", "why"),
    [
        (node("x", ready=False), capacity("x"), {}, "the Node is not ready"),
        (node("x", cordoned=True), capacity("x"), {}, "the Node is cordoned"),
        (
            tainted(node("x"), "dedicated"),
            capacity("x"),
            {},
            "the Node has the taint dedicated:NoSchedule, which spec.podTemplate does not tolerate",
        ),
        (node("x"), capacity("x", unschedulable=True), {}, "spec.unschedulable of its FedPipeNode is true"),
        (node("x"), capacity("x", at=NOW - 1000), {}, "its probe has gone silent"),
        (node("x"), capacity("x", ready=False), {}, "DriverMismatch: the driver was updated"),
        (node("x"), {"metadata": {"name": "x"}}, {}, "its probe has not reported yet"),
        (node("x"), capacity("x", gpus=1), {"x": "support/other"}, "its GPU is used by job support/other"),
    ],
)
def test_why_a_node_is_left_out(the_node: Any, report: Any, held: Any, why: str) -> None:
    one = job()
    found = look(one, fleet("a", "b", held=held, bodies=[the_node], reports=[report]), [], state_of(one))
    assert found.choice
    assert found.choice.nodes == ("a", "b")
    assert found.choice.excluded == {"x": why}
    assert f"2 of 3 nodes can be used; 1: {why} (x)" in found.choice.explain()


@pytest.mark.parametrize(
    ("toleration", "kept_away"),
    [
        ({"key": "dedicated", "operator": "Exists"}, False),
        ({"operator": "Exists"}, False),
        ({"key": "dedicated", "value": "edge"}, False),
        ({"key": "dedicated", "operator": "Equal", "value": "edge", "effect": "NoSchedule"}, False),
        ({"key": "dedicated", "value": "else"}, True),
        ({"key": "dedicated", "operator": "Exists", "effect": "NoExecute"}, True),
        ({"key": "other", "operator": "Exists"}, True),
    ],
)
def test_a_taint_keeps_agents_away_as_the_scheduler_would(toleration: Any, kept_away: bool) -> None:
    one = job(podTemplate={"spec": {"tolerations": [toleration]}})
    machines = fleet("a", "b", bodies=[tainted(node("x"), "dedicated", value="edge")])
    found = look(one, machines, [], state_of(one)).choice
    assert found
    assert ("x" in found.excluded) is kept_away
    at_work = state_of(one, ("a", "x"), ("a", "x"))
    kept = look(one, machines, [pod("a"), pod("x")], at_work).choice
    assert kept
    assert "x" in kept.nodes, "a taint that comes later takes nobody from work; NoExecute evicts the Pod"


@pytest.mark.parametrize(
    "body",
    [
        tainted(node("x", nvidia_com_gpu="1"), "nvidia.com/gpu"),
        tainted(node("x"), "dedicated", "PreferNoSchedule"),
    ],
)
def test_taints_that_keep_no_agent_away(body: Any) -> None:
    one = job()
    found = look(one, fleet("a", bodies=[body], reports=[capacity("x", gpus=1)]), [], state_of(one)).choice
    assert found
    assert "x" in found.nodes


def test_other_labels_and_the_maximum_are_counted_but_not_listed() -> None:
    one = job()
    four = fleet("a", "b", "c", "d", bodies=[node("z", site="lab")])
    found = look(one, four, [], state_of(one))
    assert found.choice
    assert found.choice.nodes == ("a", "b", "c")
    assert found.choice.excluded == {}
    text = "3 of 5 nodes can be used; 1: labels do not match spec.nodes.selector; 1: spec.nodes.max is 3"
    assert found.choice.explain() == text


def test_strong_nodes_come_first_and_nodes_at_work_stay() -> None:
    one = job()
    reports = [capacity("c", memory=64 << 30), capacity("d", gpus=1)]
    four = fleet("a", "b", "c", "d", reports=reports)
    fresh = look(one, four, [], state_of(one)).choice
    assert fresh
    assert fresh.nodes == ("a", "c", "d")
    working = state_of(one, ("a", "b"), ("a", "b"), plan=("a", "b"))
    kept = look(one, four, [pod("a"), pod("b")], working).choice
    assert kept
    assert kept.nodes == ("a", "b", "d")


@pytest.mark.parametrize(("waited", "nodes"), [(30, ("a", "b", "c")), (90, ("a", "b", "d"))])
def test_a_node_whose_pod_cannot_be_scheduled_makes_room_for_a_free_one(
    waited: int, nodes: tuple[str, ...]
) -> None:
    one = job()  # spec.nodes.max is 3
    full = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no memory"}]
    pods = [pod("a"), pod("b"), pod("c", phase="Pending", created=NOW - waited, conditions=full)]
    state = state_of(one, ("a", "b", "c"), ("a", "b"))
    found = look(one, fleet("a", "b", "c", "d"), pods, state).choice
    assert found
    assert found.nodes == nodes
    alone = look(one, fleet("a", "b", "c"), pods, state).choice
    assert alone
    assert alone.nodes == ("a", "b", "c"), "nobody else wants its place"
