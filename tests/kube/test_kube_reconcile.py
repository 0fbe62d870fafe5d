# SPDX-License-Identifier: Apache-2.0
"""reconcile: what is done for a job, as a table, and that it comes to rest from anywhere."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_operator.engine.records import (
    AgentLost,
    Finished,
    Offered,
    RoundOpened,
    SpecChanged,
)
from fedpipe_operator.engine.state import apply
from kube.looks import fleet, look, state_of
from kube.objects import NOW, capacity, job, node, pod, stamp, waiting


def test_a_new_or_edited_job_goes_to_the_engine() -> None:
    one = job()
    assert look(one, fleet("a", "b"), [], None).submit
    edited = job(rounds={"count": 9, "minUpdates": 2})
    state = state_of(one)
    meta = edited.metadata.model_copy(update={"generation": state.generation + 1})
    assert look(edited.model_copy(update={"metadata": meta}), fleet("a", "b"), [], state).submit
    assert not look(one, fleet("a", "b"), [], state_of(one)).submit


def test_nodes_are_offered_then_pods_are_created() -> None:
    one = job()
    first = look(one, fleet("a", "b"), [], state_of(one))
    assert first.eligible
    assert first.eligible.nodes == ("a", "b")
    assert first.create == ()
    second = look(one, fleet("a", "b"), [], state_of(one, ("a", "b")))
    assert second.eligible is None
    assert second.create == ("a", "b")
    assert look(one, fleet("a", "b"), [pod("a"), pod("b")], state_of(one, ("a", "b"), ("a", "b"))).settled


def test_too_few_nodes_get_no_pods_and_hold_no_gpu() -> None:
    one = job()
    alone = fleet("a", reports=[capacity("a", gpus=1)])
    found = look(one, alone, [], state_of(one, ("a",)))
    assert found.create == ()
    assert found.hold == frozenset()


def test_a_left_out_node_frees_its_place_and_loses_its_pod() -> None:
    one = job()
    state = state_of(one, ("a", "b", "c"), ("a", "b", "c"), plan=("a", "b"), left_out=("c",))
    found = look(one, fleet("a", "b", "c", "d"), [pod("a"), pod("b"), pod("c")], state)
    assert found.eligible
    assert found.eligible.nodes == ("a", "b", "c", "d")
    assert [(r.pod.node, r.reason) for r in found.remove] == [("c", "needs 2 GiB")]


def test_a_silent_probe_or_a_cordon_takes_nobody_from_work() -> None:
    one = job()
    state = state_of(one, ("a", "b"), ("a", "b"), plan=("a", "b"))
    troubled = fleet("b", bodies=[node("a", cordoned=True)], reports=[capacity("b", at=NOW - 9999)])
    assert look(one, troubled, [pod("a"), pod("b")], state).settled


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            pod("a", phase="Pending", containerStatuses=waiting("ImagePullBackOff", "no such image x:1")),
            "its image cannot be pulled: no such image x:1",
        ),
        (
            pod("a", phase="Failed", reason="Evicted", message="low on memory"),
            "its Pod failed (Evicted): low on memory",
        ),
        (
            pod(
                "a",
                containerStatuses=waiting(
                    "CrashLoopBackOff", lastState={"terminated": {"message": "INFO\nno /data/train.jsonl"}}
                ),
            ),
            "its container keeps failing: no /data/train.jsonl",
        ),
        (
            pod(
                "a",
                containerStatuses=waiting(
                    "CrashLoopBackOff", lastState={"terminated": {"reason": "OOMKilled", "exitCode": 137}}
                ),
            ),
            "its container keeps failing: it was killed because it used more memory than it may (OOMKilled)",
        ),
        (
            pod(
                "a",
                phase="Pending",
                conditions=[
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                     "message": "0/3 nodes are available: insufficient nvidia.com/gpu"}
                ],
            ),
            "its Pod cannot be scheduled: 0/3 nodes are available: insufficient nvidia.com/gpu",
        ),
        (pod("a", phase="Pending", created=NOW - 200), "its Pod has not started after 120 s"),
    ],
)  # fmt: skip
def test_a_pod_that_cannot_run_is_reported_to_the_engine(body: Any, reason: str) -> None:
    one = job()
    found = look(one, fleet("a", "b"), [body, pod("b")], state_of(one, ("a", "b"), ("b",)))
    assert list(found.lost) == ["a"]
    assert found.lost["a"].startswith(reason)


def test_a_sidecar_may_fail_as_it_likes() -> None:
    one = job()
    sidecar = [entry | {"name": "sidecar"} for entry in waiting("CrashLoopBackOff")]
    state = state_of(one, ("a", "b"), ("a", "b"), plan=("a", "b"))
    assert look(one, fleet("a", "b"), [pod("a", containerStatuses=sidecar), pod("b")], state).settled


def test_a_node_that_vanishes_is_lost_and_its_pod_is_removed_by_force() -> None:
    one = job()
    state = state_of(one, ("a", "b"), ("a", "b"), plan=("a", "b"))
    found = look(one, fleet("b"), [pod("a"), pod("b")], state)
    assert found.lost == {"a": "the Node is gone"}
    assert [(r.pod.node, r.force) for r in found.remove] == [("a", True)]
    assert found.eligible
    assert found.eligible.nodes == ("b",)


def test_a_missing_pod_is_lost_but_not_before_it_may_have_been_seen() -> None:
    one = job()
    two = ("a", "b")
    late = state_of(one, two, two, plan=two)
    found = look(one, fleet(*two), [pod("b")], late)
    assert found.lost == {"a": "its Pod is gone"}
    assert found.create == ("a",)
    assert look(one, fleet(*two), [pod("b")], state_of(one, two, two, plan=two, at=NOW - 5)).lost == {}


def test_a_pod_that_ended_is_replaced_after_a_pause() -> None:
    one = job()
    state = state_of(one, ("a", "b"), ("b",))

    def ended(seconds: float) -> Any:
        terminated = [
            {"name": "agent", "state": {"terminated": {"finishedAt": stamp(NOW - seconds), "exitCode": 0}}}
        ]
        return pod("a", phase="Succeeded", containerStatuses=terminated)

    early = look(one, fleet("a", "b"), [ended(3), pod("b")], state)
    assert early.remove == ()
    assert early.again == 7
    late = look(one, fleet("a", "b"), [ended(30), pod("b")], state)
    assert [r.pod.node for r in late.remove] == ["a"]
    assert late.create == ()


def test_a_hung_agent_is_replaced_after_minutes() -> None:
    one = job()
    state = state_of(one, ("a", "b"), ("a", "b"), plan=("a", "b"))
    apply(state, AgentLost(sequence=9, node="a", reason="no sign of life for 60 s"), NOW)
    pods = [pod("a", created=NOW - 4000), pod("b")]
    assert look(one, fleet("a", "b"), pods, state, seen={"a": NOW - 70}).remove == ()
    hung = look(one, fleet("a", "b"), pods, state, seen={"a": NOW - 400})
    assert [r.pod.node for r in hung.remove] == ["a"]


def test_a_changed_template_waits_for_the_end_of_the_nodes_work() -> None:
    one = job()
    state = state_of(one, ("a", "b"), ("a", "b"), plan=("a", "b"))
    apply(state, RoundOpened(round=1, plan=2, participants=("a", "b"), deadline=NOW + 900), NOW - 60)
    pods = [pod("a"), pod("b", template="t0")]
    busy = look(one, fleet("a", "b"), pods, state)
    assert busy.remove == ()
    assert busy.again is not None
    state.rounds[1].opened_at = NOW - 2
    fresh = look(one, fleet("a", "b"), pods, state)
    assert [(r.pod.node, r.reason) for r in fresh.remove] == [("b", "its template changed")]


def test_suspension_removes_pods_and_gives_gpus_back() -> None:
    one = job()
    state = state_of(one, ("a", "b"), ("a", "b"))
    resting = job(suspend=True)
    apply(state, SpecChanged(generation=2, spec=resting.spec), NOW)
    found = look(resting, fleet("a", "b"), [pod("a"), pod("b", deleting=True)], state)
    assert [r.pod.node for r in found.remove] == ["a"]
    assert found.hold == frozenset()
    assert found.create == ()


def test_the_end_lets_agents_leave_and_keeps_what_they_logged() -> None:
    one = job(ttlSecondsAfterFinished=100)
    state = state_of(one, ("a", "b"), ("a", "b"))
    apply(state, Finished(phase="Succeeded", reason="RoundsCompleted", message=""), NOW)
    pods = [pod("a"), pod("b", phase="Succeeded")]
    at_once = look(one, fleet("a", "b"), pods, state, now=NOW + 1)
    assert at_once.settled
    assert at_once.again == 29
    later = look(one, fleet("a", "b"), pods, state, now=NOW + 40)
    assert [r.pod.node for r in later.remove] == ["a"]
    assert later.again == 60
    assert look(one, fleet("a", "b"), pods[1:], state, now=NOW + 100).delete_job


NAMES = ("a", "b", "c", "d")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_from_any_cluster_it_comes_to_rest_with_one_pod_for_each_wanted_node(data: st.DataObject) -> None:
    """Perform the actions on a pretended cluster until nothing is left to do."""
    one = job()
    pick = st.sets(st.sampled_from(NAMES))
    offered = tuple(sorted(data.draw(pick)))
    live = tuple(sorted(data.draw(pick) & set(offered)))
    state = state_of(one, offered, live, plan=live or None)
    phases = st.sampled_from(["Pending", "Running", "Succeeded", "Failed"])
    templates = st.sampled_from(["t0", "t1"])
    bodies = {
        n: pod(n, phase=data.draw(phases), template=data.draw(templates), created=NOW - 10)
        for n in data.draw(pick)
    }
    the_fleet = fleet(*data.draw(pick), bodies=[node(n, ready=False) for n in data.draw(pick)])
    now = NOW
    for _ in range(30):
        found = look(one, the_fleet, bodies.values(), state, now=now)
        assert not {n for n in found.create if n in bodies}, "a second Pod for a node"
        for name, reason in found.lost.items():
            apply(state, AgentLost(sequence=state.sequence + 1, node=name, reason=reason), now)
        if found.eligible:
            record = Offered(
                sequence=state.sequence + 1,
                nodes=found.eligible.nodes,
                excluded=dict(found.eligible.excluded),
            )
            apply(state, record, now)
        for removal in found.remove:
            del bodies[removal.pod.node]
        for name in () if found.eligible or found.lost else found.create:
            bodies[name] = pod(name, created=now)
        if found.settled and found.again is None:
            break
        now += found.again or 0
    else:
        raise AssertionError("it does not come to rest")
    enough = len(state.offered) >= one.spec.nodes.min or state.plan is not None
    assert set(bodies) == (set(state.desired) if enough else set())
    assert set(state.offered) <= set(the_fleet.nodes)
    assert len(state.offered) <= one.spec.nodes.max
