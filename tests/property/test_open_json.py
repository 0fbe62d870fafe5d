# SPDX-License-Identifier: Apache-2.0
"""Limits of what is stored: whatever is accepted is written as JSON and read again as it was; depth is cut safely."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from contract.changes import FULL
from contract.documents import documents, schema
from contract.manifests import VALID, job
from contract.refused import INVALID
from fedpipe_api.base import Model, UserError, explain
from fedpipe_api.job import FedPipeJob, FedPipeJobStatus
from fedpipe_api.node import FedPipeNode, FedPipeNodeStatus
from fedpipe_api.open_json import BYTES, DEPTH, VALUES, check_open_json
from fedpipe_operator.engine.records import Submitted
from fedpipe_operator.kube.pods import build_agent_pod
from fedpipe_operator.kube.shallow import DEPTH as KEPT
from fedpipe_operator.kube.shallow import decode, shallow
from fedpipe_operator.kube.views import capacity_view, node_view
from kube import objects
from kube.test_kube_pods import SETTINGS
from property.test_cluster_objects import ANYTHING, damaged


def nested(depth: int, kind: type = dict) -> Any:
    """Return a value of so many levels, itself the first."""
    value: Any = 1
    for _ in range(depth - 1):
        value = {"a": value} if kind is dict else [value]
    return value


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(depth_of, inner), default=0) if isinstance(value, dict | list) else 0


TEMPLATES = st.fixed_dictionaries(
    {},
    optional={
        "metadata": st.dictionaries(st.sampled_from(["labels", "annotations", "name"]), ANYTHING, max_size=3),
        "spec": st.dictionaries(
            st.sampled_from(["containers", "volumes", "affinity", "tolerations", "securityContext", "x"]),
            ANYTHING
            | st.lists(
                st.fixed_dictionaries(
                    {"name": st.sampled_from(["agent", "tmp", "x"])}, optional={"env": ANYTHING}
                )
            ),
            max_size=3,
        ),
    },
)


def outcome(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return what a call returns, or the one line that it refuses with."""
    try:
        return call(*arguments, **options)
    except ValidationError as error:
        return explain(error)
    except UserError as error:
        return str(error)


@settings(max_examples=400, deadline=None)
@given(TEMPLATES)
@example({"spec": {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [1]}}}})
@example(
    {
        "spec": {
            "affinity": {
                "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [1]}}
            }
        }
    }
)
@example({"metadata": {"labels": None}})
@example({"spec": {"containers": [{"name": {}}, {"name": "agent", "env": None}]}})
def test_any_pod_template_is_refused_stored_and_read_again_or_named(template: Any) -> None:
    """What the model accepts survives the ledger, and a Pod is built from it or the field is named."""
    accepted = outcome(objects.job, podTemplate=template)
    if isinstance(accepted, str):
        assert accepted.startswith("spec.podTemplate")
        return
    record = Submitted(namespace="support", name="tickets", generation=1, spec=accepted.spec)
    assert Submitted.model_validate_json(record.to_json()).spec == accepted.spec
    node, report = node_view(objects.node("edge-1")), capacity_view(objects.capacity("edge-1"))
    pod = outcome(build_agent_pod, accepted, node, report, SETTINGS)
    if isinstance(pod, str):
        assert pod.startswith("spec.podTemplate")
    else:
        json.dumps(pod, allow_nan=False).encode()


@pytest.mark.parametrize("depth", [DEPTH + 1, 197, 250, 5000])
@pytest.mark.parametrize("kind", [dict, list])
def test_a_template_that_is_too_deep(depth: int, kind: type) -> None:
    with pytest.raises(ValidationError) as caught:
        objects.job(podTemplate={"spec": {"a": nested(depth - 2, kind)}})
    assert explain(caught.value) == f"spec.podTemplate: nested deeper than {DEPTH} levels; a Pod needs fewer"
    assert objects.job(podTemplate={"spec": {"a": nested(DEPTH - 2, kind)}})


@pytest.mark.parametrize(
    ("value", "reported"),
    [
        ("x" * (BYTES + 1), "more than 64 KiB"),
        ({"x" * (BYTES + 1): 1}, "more than 64 KiB"),
        ("ä" * (BYTES // 6 + 1), "more than 64 KiB"),
        ("😀" * (BYTES // 12 + 1), "more than 64 KiB"),
        ("\n" * (BYTES // 2 + 1), "more than 64 KiB"),
        ([0] * (VALUES + 1), "more than 2000 values"),
        ({str(i): i for i in range(VALUES + 1)}, "more than 2000 values"),
        (10**400, "64-bit number"),
        (2**63, "64-bit number"),
        (float("inf"), "64-bit number"),
        (float("nan"), "64-bit number"),
        ("\ud800", "not Unicode"),
        ({"\ud800": 1}, "not Unicode"),
        ({1: 1}, "every key must be a text"),
        (b"x", "neither object"),
    ],
)
def test_what_no_template_holds(value: Any, reported: str) -> None:
    with pytest.raises(ValueError, match=reported):
        check_open_json({"spec": {"a": value}})


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(documents(schema("fedpipejobs")["properties"]["status"]))
def test_a_jobs_status_that_is_accepted_is_read_again(document: Any) -> None:
    read_again(FedPipeJobStatus, document)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(documents(schema("fedpipenodes")["properties"]["status"]))
def test_a_nodes_status_that_is_accepted_is_read_again(document: Any) -> None:
    read_again(FedPipeNodeStatus, document)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([FULL, *[job(case.changes) for case in (*VALID, *INVALID)]]).flatmap(damaged))
def test_a_job_that_is_accepted_is_read_again(document: Any) -> None:
    read_again(FedPipeJob, document)


@settings(max_examples=200, deadline=None)
@given(
    damaged({"apiVersion": "fedpipe.io/v1alpha1", "kind": "FedPipeNode"} | objects.capacity("edge-1", gpus=2))
)
def test_a_node_that_is_accepted_is_read_again(document: Any) -> None:
    read_again(FedPipeNode, document)


def read_again(kind: type[Model], document: Any) -> None:
    """Whatever the model accepts is the same after it was written and read."""
    accepted = outcome(kind.model_validate, document)
    if isinstance(accepted, str):
        return
    again = kind.model_validate_json(accepted.to_json())
    assert again.to_json() == accepted.to_json()
    assert again == accepted


@given(
    st.recursive(
        st.none() | st.integers() | st.text('"\\{}[]a', max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text('"\\{}[]a', max_size=3), inner, max_size=3)
        ),
    )
)
def test_shallow_text_is_kept(value: Any) -> None:
    text = json.dumps(value).encode()
    assert shallow(text) == text or depth_of(value) > KEPT


@pytest.mark.parametrize("depth", [KEPT, KEPT + 1, 900, 100_000])
@pytest.mark.parametrize(("left", "right"), [('{"a":', "}"), ("[1,", "]"), ('[{"]\\"}":', "}]")])
def test_deep_text_is_cut(depth: int, left: str, right: str) -> None:
    text = '{"before": [1], "deep": ' + left * depth + '"x"' + right * depth + ', "after": {"b": 2}}'
    found = decode(shallow(text.encode()))
    assert found["before"] == [1]
    assert found["after"] == {"b": 2}
    assert depth_of(found) <= KEPT
    assert decode(text.encode())["after"] == {"b": 2}
