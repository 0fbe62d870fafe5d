# SPDX-License-Identifier: Apache-2.0
"""Pydantic and the API server give the same verdict on every spec, and name the same field."""

import re
from copy import deepcopy
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft4Validator
from pydantic import ValidationError

from contract.changes import ALLOWED_CHANGES, FORBIDDEN_CHANGES, FULL
from contract.manifests import UNSET, VALID, Case, job
from contract.refused import INVALID
from fedpipe_api.base import explain
from fedpipe_api.job import FedPipeJob
from kube.controlplane import REPOSITORY, ControlPlane

JOBS = "/apis/fedpipe.io/v1alpha1/namespaces/default/fedpipejobs"
STRICT = "fieldValidation=Strict"

SCHEMA = yaml.safe_load((REPOSITORY / "crds" / "fedpipe.io_fedpipejobs.yaml").read_text())["spec"][
    "versions"
][0]["schema"]["openAPIV3Schema"]


def names(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def blame(message: str) -> str:
    """Return the API server's message with map keys written as pydantic writes them."""
    return re.sub(r"\[([a-z]+)\]", r".\1", message)


@names(VALID)
def test_model_accepts(case: Case) -> None:
    FedPipeJob.model_validate(job(case.changes))


@names(INVALID)
def test_model_refuses_and_names_the_field(case: Case) -> None:
    with pytest.raises(ValidationError) as caught:
        FedPipeJob.model_validate(job(case.changes))
    line = explain(caught.value)
    assert "\n" not in line.removesuffix("'5m\\n'")
    assert case.field in line
    assert case.text in line


@names(VALID)
def test_schema_accepts(case: Case) -> None:
    assert not list(Draft4Validator(SCHEMA).iter_errors(job(case.changes)))


@names([case for case in INVALID if case.rule == "schema" and case.text != "unknown field"])
def test_schema_refuses(case: Case) -> None:
    assert list(Draft4Validator(SCHEMA).iter_errors(job(case.changes)))


def test_only_the_api_server_demands_a_volume_for_the_data() -> None:
    document = job({"spec.data.volume": UNSET})
    [error] = Draft4Validator(SCHEMA).iter_errors(document)
    assert error.message == "'volume' is a required property"
    assert FedPipeJob.model_validate(document).spec.data.volume is None


@names([case for case in INVALID if case.rule == "cel"])
def test_cel_alone_refuses(case: Case) -> None:
    """The table's cases for CEL would pass the schema, so that they do test the rules."""
    assert not list(Draft4Validator(SCHEMA).iter_errors(job(case.changes)))


@names(VALID)
def test_api_server_accepts(case: Case, control_plane: ControlPlane) -> None:
    status, answer = control_plane.request("POST", f"{JOBS}?dryRun=All&{STRICT}", job(case.changes))
    assert status == 201, answer["message"]


@names(INVALID)
def test_api_server_refuses_and_names_the_field(case: Case, control_plane: ControlPlane) -> None:
    status, answer = control_plane.request("POST", f"{JOBS}?dryRun=All&{STRICT}", job(case.changes))
    assert status in (400, 422), answer
    assert case.field in blame(answer["message"])
    if case.rule == "cel":
        assert case.text in answer["message"]


@pytest.fixture(scope="module")
def existing(control_plane: ControlPlane) -> Any:
    """The job whose changes are tried by dry runs."""
    document = job({"metadata.name": "existing"}, FULL)
    status, answer = control_plane.request("POST", f"{JOBS}?{STRICT}", document)
    assert status == 201, answer
    yield document
    control_plane.request("DELETE", f"{JOBS}/existing")


def change(control_plane: ControlPlane, existing: dict[str, Any], case: Case) -> tuple[int, Any]:
    _, current = control_plane.request("GET", f"{JOBS}/existing")
    document = job(case.changes, existing)
    document["metadata"]["resourceVersion"] = current["metadata"]["resourceVersion"]
    return control_plane.request("PUT", f"{JOBS}/existing?dryRun=All&{STRICT}", document)


@names(ALLOWED_CHANGES)
def test_api_server_allows_change(case: Case, control_plane: ControlPlane, existing: dict[str, Any]) -> None:
    status, answer = change(control_plane, existing, case)
    assert status == 200, answer["message"]


@names(FORBIDDEN_CHANGES)
def test_api_server_forbids_change(case: Case, control_plane: ControlPlane, existing: dict[str, Any]) -> None:
    status, answer = change(control_plane, existing, case)
    assert status == 422, answer
    causes = {cause["field"]: cause["message"] for cause in answer["details"]["causes"]}
    assert case.text in causes[case.field]


def test_an_ended_job_cannot_get_more_rounds(control_plane: ControlPlane, existing: dict[str, Any]) -> None:
    more = Case("more rounds", {"spec.rounds.count": existing["spec"]["rounds"]["count"] + 1})
    for phase, wanted in {"Succeeded": 422, "Failed": 422, "Training": 200}.items():
        body, merge = {"status": {"phase": phase}}, "application/merge-patch+json"
        assert control_plane.request("PATCH", f"{JOBS}/existing/status", body, merge)[0] == 200
        status, answer = change(control_plane, existing, more)
        assert status == wanted
        if wanted == 422:
            assert "spec.rounds.count: " in answer["message"]
            assert "the job has ended" in answer["message"]


def test_api_server_fills_in_the_models_defaults(control_plane: ControlPlane) -> None:
    status, answer = control_plane.request("POST", f"{JOBS}?dryRun=All&{STRICT}", job({}))
    assert status == 201
    by_server = FedPipeJob.model_validate(answer)
    assert by_server.spec == FedPipeJob.model_validate(job({})).spec
    assert answer["spec"]["rounds"]["deadline"] == "20m"
    assert answer["spec"]["nodes"] == {"min": 1, "max": 100}
    assert "output" not in answer["spec"]


def sometimes(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.just(UNSET), values)


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "spec.model.task": st.sampled_from(["sequence-classification", "causal-lm"]),
        "spec.model.labels": st.lists(st.sampled_from(["a", "b", "c"]), max_size=4),
        "spec.model.hostPath": st.just({"path": "/m"}),
        "spec.data.train": st.text("a./", min_size=0, max_size=6),
        "spec.data.evaluation": st.text("a./", min_size=0, max_size=6),
        "spec.data.volume": st.sampled_from([{}, {"hostPath": {"path": "d"}}]),
        "spec.nodes.min": st.integers(0, 120),
        "spec.nodes.max": st.integers(0, 120),
        "spec.rounds.minUpdates": st.integers(0, 120),
        "spec.rounds.localSteps": st.integers(0, 3),
        "spec.rounds.localEpochs": st.sampled_from([0, 0.5, 2]),
        "spec.rounds.deadline": st.from_regex(r"\A([0-9]{1,4}(\.[0-9])?(ms|s|m|h|d)?){1,2}\Z"),
        "spec.rounds.until": st.fixed_dictionaries(
            {},
            optional={
                "metric": st.sampled_from(["accuracy", "loss", "bleu"]),
                "reaches": st.floats(allow_nan=False, allow_infinity=False),
                "patience": st.integers(0, 3),
            },
        ),
        "spec.adapter.ranks.min": st.integers(0, 20),
        "spec.adapter.ranks.max": st.integers(0, 20),
        "spec.adapter.selection.mode": st.sampled_from(["list", "all", "some"]),
        "spec.adapter.selection.matrices": st.lists(st.text("ab", max_size=2), max_size=2),
        "spec.output": st.fixed_dictionaries(
            {},
            optional={
                "url": st.sampled_from(["s3://bucket/a", "gs://bucket", "az://account"])
                | st.from_regex(r"\A(s3|gs|az|file)://[a-z0-9./@:%]{0,12}\Z"),
                "secretName": st.just("writer"),
            },
        ),
        "spec.nodes.selector": st.fixed_dictionaries(
            {},
            optional={
                "matchLabels": st.dictionaries(
                    st.text("a", min_size=1), st.sampled_from(["", "b" * 63, "b" * 64])
                ),
                "matchExpressions": st.lists(
                    st.fixed_dictionaries(
                        {"key": st.just("a"), "operator": st.sampled_from(["In", "Exists", "Is"])},
                        optional={"values": st.lists(st.just("b"), max_size=1)},
                    ),
                    max_size=2,
                ),
            },
        ),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_verdicts_agree_on_any_spec(control_plane: ControlPlane, changes: dict[str, Any]) -> None:
    document = job(changes)
    status, answer = control_plane.request("POST", f"{JOBS}?dryRun=All&{STRICT}", document)
    try:
        FedPipeJob.model_validate(deepcopy(document))
        verdict = "accepted"
    except ValidationError as error:
        verdict = explain(error)
    assert (status == 201) == (verdict == "accepted"), (verdict, answer.get("message"))
