# SPDX-License-Identifier: Apache-2.0
"""Whatever somebody writes into Nodes, FedPipeNodes and Pods: the operator reads it or leaves that one out."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedpipe_api.names import child_name
from fedpipe_operator.kube.fields import Unreadable
from fedpipe_operator.kube.inventory import Inventory
from fedpipe_operator.kube.node_selection import choose
from fedpipe_operator.kube.reconcile import reconcile
from fedpipe_operator.kube.views import capacity_view, node_view, pod_view
from kube.looks import state_of
from kube.objects import NOW, UID, capacity, job, node, pod, stamp, waiting

HUGE = 10**400
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(HUGE)
    | st.just(-HUGE)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["0000-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59", "2027-01-01", "\ud800", "x" * 400]
    )
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)

FULL_NODE = node("edge-1", nvidia_com_gpu="1") | {"spec": {"unschedulable": False}}
FULL_CAPACITY = capacity("edge-1", gpus=2)
FULL_CAPACITY["status"]["linkRate"] = 1000
FULL_POD = pod(
    "edge-1",
    phase="Failed",
    reason="Evicted",
    message="low on memory",
    conditions=[{"type": "PodScheduled", "status": "True", "lastTransitionTime": stamp(NOW)}],
    containerStatuses=waiting("CrashLoopBackOff", lastState={"terminated": {"message": "no such file"}}),
    initContainerStatuses=[{"name": "first", "state": {"terminated": {"finishedAt": stamp(NOW)}}}],
)
FULL_POD["metadata"]["deletionTimestamp"] = stamp(NOW)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a document."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    found = []
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += places(value, (*path, key))
    return found


@st.composite
def damaged(draw: st.DrawFn, document: Any) -> Any:
    """Return the document with arbitrary JSON in place of one to three of its values, or without them."""
    document = deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(places(document)))
        place = document
        for key in path:
            place = place[key]
        if draw(st.booleans()):
            place[last] = draw(ANYTHING)
        else:
            del place[last]
        if not places(document):
            break
    return document


def replaced(document: Any, path: str, value: Any) -> Any:
    """Return the document with one value replaced."""
    document = deepcopy(document)
    *parents, last = path.split(".")
    place = document
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    place[last] = value
    return document


def read(view: Callable[[Any], Any], body: Any) -> Any:
    """Return the view, or why there is none."""
    try:
        return view(body)
    except Unreadable as error:
        return str(error)


@settings(max_examples=400, deadline=None)
@given(damaged(FULL_NODE))
def test_a_node_is_read_or_named_as_unreadable(body: Any) -> None:
    view = read(node_view, body)
    if isinstance(view, str):
        assert "must be" in view
    else:
        assert view.name
        assert all(isinstance(text, str) for pair in view.labels.items() for text in pair)


@settings(max_examples=400, deadline=None)
@given(damaged(FULL_CAPACITY))
@example(replaced(FULL_CAPACITY, "status.observedAt", "0000-01-01T00:00:00Z"))
@example(replaced(FULL_CAPACITY, "status.cpu.totalMemory", HUGE))
@example(replaced(FULL_CAPACITY, "status.linkRate", 1e300))
def test_a_fedpipenode_is_read_or_named_as_unreadable(body: Any) -> None:
    view = read(capacity_view, body)
    if isinstance(view, str):
        assert "must be" in view
    else:
        assert 0 <= view.memory < 2**63
        assert view.link_rate is None or 0 < view.link_rate < 2**63
        assert view.stale(NOW) in (True, False)
        assert view.fault is None or view.fault.isprintable()


@settings(max_examples=400, deadline=None)
@given(damaged(FULL_POD))
@example(replaced(FULL_POD, "metadata.creationTimestamp", "0000-01-01T00:00:00Z"))
def test_a_pod_is_read_or_named_as_unreadable(body: Any) -> None:
    view = read(pod_view, body)
    if isinstance(view, str):
        assert "must be" in view
    else:
        assert view is None or (view.name and len(view.node) <= 253)
        assert view is None or view.trouble is None or view.trouble.isprintable()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.just("node"), damaged(FULL_NODE))
        | st.tuples(st.just("capacity"), damaged(FULL_CAPACITY))
        | st.tuples(st.just("pod"), damaged(FULL_POD)),
        min_size=1,
        max_size=4,
    )
)
def test_nothing_that_is_seen_stops_the_others(seen: list[tuple[str, Any]]) -> None:
    """Beside any objects, another node is offered, and every job is reconciled."""
    inventory = Inventory(lambda: None, lambda uid: None, lambda: NOW)
    for kind, body in [
        *seen,
        ("node", node("edge-2")),
        ("capacity", capacity("edge-2")),
        ("pod", pod("edge-2")),
    ]:
        getattr(inventory, f"see_{kind}")(body)
    fleet = inventory.fleet_for(UID, {})
    pods = {view.node: view for view in inventory.agents_of("support", UID)}
    assert "edge-2" in pods
    choice = choose(job().spec, None, pods, fleet, NOW)
    assert "edge-2" in choice.nodes
    assert choice.explain()
    state = state_of(job(), ("edge-1", "edge-2"), ("edge-2",))
    reconcile(job(), fleet, inventory.agents_of("support", UID), state, seen={}, template="t1", now=NOW)


def test_a_fedpipenode_of_the_year_0_is_left_out_named_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    inventory = Inventory(lambda: None, lambda uid: None, lambda: NOW)
    inventory.see_node(node("edge-1"))
    bad = replaced(capacity("edge-1"), "status.observedAt", "0000-01-01T00:00:00Z")
    inventory.see_capacity(bad)
    inventory.see_capacity(bad)
    assert caplog.text.count("FedPipeNode edge-1 cannot be read and is left out: status.observedAt") == 1
    assert inventory.unreadable()["FedPipeNode"] == 1
    choice = choose(job().spec, None, {}, inventory.fleet_for(UID, {}), NOW)
    assert "its FedPipeNode cannot be read: status.observedAt: must be a date" in choice.excluded["edge-1"]
    inventory.see_capacity(capacity("edge-1"))
    assert inventory.unreadable()["FedPipeNode"] == 0
    assert choose(job().spec, None, {}, inventory.fleet_for(UID, {}), NOW).nodes == ("edge-1",)


def test_an_agent_at_work_outlives_a_report_that_cannot_be_read() -> None:
    inventory = Inventory(lambda: None, lambda uid: None, lambda: NOW)
    inventory.see_node(node("edge-1"))
    inventory.see_capacity(capacity("edge-1", gpus=1))
    state = state_of(job(), ("edge-1",), ("edge-1",))
    inventory.see_capacity(replaced(capacity("edge-1", gpus=1), "status.devices", HUGE))
    fleet = inventory.fleet_for(UID, {})
    assert choose(job().spec, state, {}, fleet, NOW).nodes == ("edge-1",)
    assert fleet.capacities["edge-1"].devices == 1, "its GPU is still held"


def test_a_pod_that_becomes_unreadable_is_as_good_as_gone() -> None:
    woken: list[str] = []
    inventory = Inventory(lambda: None, woken.append, lambda: NOW)
    inventory.see_pod(pod("edge-1"))
    inventory.see_pod(replaced(pod("edge-1"), "metadata.annotations.note", 1))
    assert inventory.pod("support", child_name("tickets", "edge-1")) is None
    assert woken == [UID, UID]
    assert inventory.unreadable() == {"Node": 0, "FedPipeNode": 0, "Pod": 1}
    inventory.lose_pod("support", child_name("tickets", "edge-1"), "any")
    assert inventory.unreadable()["Pod"] == 0
