# SPDX-License-Identifier: Apache-2.0
"""Durations, quantities, names as the API writes them, and errors a person can read."""

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedpipe_api.base import explain, format_duration, parse_duration, parse_quantity
from fedpipe_api.job import FedPipeJob, Rounds, Until
from fedpipe_api.node import Capacity, Fleet

UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}
SIZES = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


@given(st.lists(st.tuples(st.integers(0, 9999), st.sampled_from(list(UNITS))), min_size=1, max_size=4))
def test_duration_is_the_sum_of_its_parts(parts: list[tuple[int, str]]) -> None:
    text = "".join(f"{count}{unit}" for count, unit in parts)
    assert math.isclose(
        parse_duration(text), sum(count * UNITS[unit] for count, unit in parts) / 1000, rel_tol=1e-12
    )


@given(st.integers(0, 10**10))
def test_duration_round_trips_to_the_millisecond(milliseconds: int) -> None:
    text = format_duration(milliseconds / 1000)
    assert round(parse_duration(text) * 1000) == milliseconds
    assert format_duration(parse_duration(text)) == text


@given(st.integers(1, 10**10))
def test_duration_fills_the_larger_units_first(milliseconds: int) -> None:
    parts = re.findall(r"([0-9]+)(ms|s|m|h)", format_duration(milliseconds / 1000))
    units = [unit for _, unit in parts]
    assert units == [unit for unit in ("h", "m", "s", "ms") if unit in units]
    limits = {"ms": 1000, "s": 60, "m": 60, "h": math.inf}
    assert all(0 < int(count) < limits[unit] for count, unit in parts)


@pytest.mark.parametrize(
    "text", ["", "5", "m", "-5m", "5 m", "5m ", "5m\n", "1.m", ".5s", "5d", "1h 30m", "1s" * 17]
)
def test_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration; write it like 90s, 20m or 1h30m"):
        parse_duration(text)


def test_duration_may_be_seconds_in_python_but_not_in_a_manifest() -> None:
    assert Rounds(count=1, deadline=90).deadline == 90
    assert Rounds(count=1).deadline == 1200
    assert Rounds.model_validate({"count": 1, "deadline": "90s"}).deadline == 90
    with pytest.raises(ValidationError, match="is not a duration"):
        Rounds.model_validate({"count": 1, "deadline": 90})
    with pytest.raises(ValidationError, match="is not a duration"):
        Rounds.model_validate_json('{"count": 1, "deadline": 90}')


@given(st.integers(0, 2**62), st.sampled_from(list(SIZES)))
@example(9_922_605_536_776_076, "Ti")
def test_quantity_is_exact(count: int, unit: str) -> None:
    assert parse_quantity(f"{count}{unit}") == count * SIZES[unit]


@given(st.decimals(0, 10_000, places=3), st.sampled_from(list(SIZES)))
def test_fractional_quantity_is_cut_to_bytes(count: object, unit: str) -> None:
    assert parse_quantity(f"{count}{unit}") == int(count * SIZES[unit])


@given(st.integers(0, 2**63))
def test_quantity_may_be_bytes(count: int) -> None:
    assert parse_quantity(count) == parse_quantity(str(count)) == count


@pytest.mark.parametrize("value", ["", "Mi", "-1", "1 Gi", "1gi", "1KB", "1e3", "1Gi\n", True, None, 1.5, -1])
def test_no_quantity(value: object) -> None:
    with pytest.raises(ValueError, match="600Mi"):
        parse_quantity(value)


def test_capacity_reads_quantities() -> None:
    capacity = Capacity.model_validate({"memory": "600Mi", "linkRate": "1M"})
    assert (capacity.memory, capacity.link_rate) == (600 * 2**20, 10**6)
    assert Capacity.model_validate(capacity.to_dict()) == capacity
    with pytest.raises(ValidationError) as caught:
        Capacity(memory=0)
    assert explain(caught.value) == "memory: must be at least 64Mi; write it like 600Mi or 16Gi"


def test_documents_are_camel_case_and_python_is_not() -> None:
    assert Rounds(count=1, local_steps=3) == Rounds.model_validate({"count": 1, "localSteps": 3})
    with pytest.raises(ValidationError, match="local_steps"):
        Rounds.model_validate({"count": 1, "local_steps": 3})


def test_models_are_frozen() -> None:
    rounds = Rounds(count=1)
    with pytest.raises(ValidationError):
        rounds.count = 2


def test_non_finite_numbers_are_refused() -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(ValidationError):
            Until(reaches=value)


def fault(document: dict[str, object]) -> str:
    with pytest.raises(ValidationError) as caught:
        FedPipeJob.model_validate(document)
    return explain(caught.value, "job.yaml")


def test_explain_names_file_and_field() -> None:
    spec = {
        "model": {"huggingFace": {"repo": "a/b"}, "task": "causal-lm"},
        "data": {"volume": {"hostPath": {"path": "/d"}}, "train": "t.jsonl"},
        "rounds": {"count": 1},
    }
    job = {"metadata": {"name": "a"}, "spec": spec}
    assert fault({"metadata": {"name": "a"}}) == "job.yaml.spec: required, but not given"
    assert (
        fault(job | {"spec": spec | {"round": 1}})
        == "job.yaml.spec.round: unknown field; check its spelling or remove it"
    )
    assert (
        fault(job | {"spec": spec | {"rounds": {"count": 1, "minUpdates": 5}, "nodes": {"max": 4}}})
        == "job.yaml.spec.rounds.minUpdates: 5 updates are required but nodes.max is 4. "
        "Lower minUpdates or raise nodes.max."
    )
    assert fault(job | {"spec": spec | {"adapter": {"ranks": {"min": 8, "max": 4}}}}).endswith(
        "spec.adapter.ranks: min must not be above max"
    )


def test_fleet_names_are_unique() -> None:
    with pytest.raises(ValidationError, match="edge-a is given twice"):
        Fleet.model_validate({"nodes": [{"name": "edge-a"}, {"name": "edge-a"}]})
