# SPDX-License-Identifier: Apache-2.0
"""What a job says it has spent is what dp-accounting makes of the raw schedule, whatever happened to the nodes."""

import math

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpipe_api.accounting import NOISE_LIMIT, ORDERS, Steps, epsilon, noise_multiplier, sampling_rate
from fedpipe_api.privacy import Privacy
from fedpipe_api.wire import Blob
from fedpipe_operator.engine.planning import request_of
from fedpipe_operator.engine.privacy import job_epsilon, node_epsilon, overspending
from fedpipe_operator.engine.records import (
    AgentRegistered,
    Offered,
    PlanMade,
    RoundAggregated,
    RoundClosed,
    RoundOpened,
    Submitted,
    UpdateAccepted,
)
from fedpipe_operator.engine.state import JobState, apply, submitted
from fedpipe_operator.planner import plan, with_noise
from standins.agents import make_update, manifest_of, model_shape, registration
from standins.server import job

SHAPE = model_shape(2)
DELTA = 1e-4
PRIVACY = Privacy(epsilon=8.0, delta=DELTA)
SAMPLES = {"a": 200, "b": 900, "c": 3000}


def by_library(events: list[tuple[float, float, int]], accountant=RdpAccountant) -> float:
    counted = accountant(ORDERS) if accountant is RdpAccountant else accountant()
    for noise, rate, steps in events:
        counted.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps))
    return counted.get_epsilon(DELTA)


def started() -> JobState:
    spec = job(1, 4).spec
    selection = spec.adapter.selection.model_copy(update={"mode": "all"})
    adapter = spec.adapter.model_copy(update={"selection": selection})
    spec = spec.model_copy(update={"privacy": PRIVACY, "adapter": adapter})
    state = submitted("uid", Submitted(namespace="n", name="j", generation=1, spec=spec), 0.0)
    apply(state, Offered(sequence=1, nodes=tuple(SAMPLES)), 0.0)
    for node in SAMPLES:
        register(state, node)
    for version in (1, 2):
        replan(state, version)
    return state


def register(state: JobState, node: str) -> None:
    apply(
        state,
        AgentRegistered(
            sequence=2, node=node, device=registration(SHAPE).device, samples=SAMPLES[node],
            evaluation_samples=0, model=SHAPE,
        ),
        1.0,
    )  # fmt: skip


def replan(state: JobState, version: int) -> None:
    from fedpipe_operator.engine.privacy import spent

    made = plan(request_of(state))
    before = {node: spent(state, node) for node in made.nodes}
    rounds = state.spec.rounds.count - state.done
    nodes, left_out = with_noise(made.nodes, PRIVACY, SAMPLES, before, rounds)
    apply(
        state,
        PlanMade(
            version=version, reason="", nodes=nodes, left_out=left_out, selected=made.selected,
            considered=tuple(SAMPLES),
        ),
        2.0,
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_spent_is_that_of_the_raw_schedule_and_within_the_budget(data: st.DataObject) -> None:
    state = started()
    schedule: dict[str, list[tuple[float, float, int]]] = {node: [] for node in SAMPLES}

    def trains(node: str) -> None:
        assert state.plan is not None
        made = state.plan.nodes[node]
        rate = min(1.0, made.micro_batch * made.accumulation / SAMPLES[node])
        schedule[node].append((made.noise_multiplier, rate, made.local_steps))

    for number in range(1, 5):
        if overspending(state):
            replan(state, max(state.plans) + 1)
        if not state.planned:
            break
        assert state.plan is not None
        version, nodes = state.plan.version, state.planned
        apply(state, RoundOpened(round=number, plan=version, participants=nodes, deadline=9e9), 3.0)
        for node in nodes:
            trains(node)
            for _ in range(data.draw(st.integers(0, 2), label="restarts")):
                register(state, node)
                trains(node)
            if data.draw(st.booleans(), label="delivers"):
                body = make_update(SHAPE, state.plan.nodes[node], node, number)
                manifest = manifest_of(body, state.plan.nodes[node])
                apply(state, UpdateAccepted(round=number, node=node, manifest=manifest), 4.0)
                register(state, node)  # it has nothing to train again
        apply(state, RoundClosed(round=number, stragglers={}, bytes_down=0), 5.0)
        apply(
            state,
            RoundAggregated(
                round=number, adapter=Blob(digest="0" * 64, size=1), matrices={}, checks={}, relative_error=0,
                discarded_energy=0, effective_rank=1, seconds=0,
            ),
            6.0,
        )  # fmt: skip
        for node, events in schedule.items():
            assert node_epsilon(state, node) == pytest.approx(by_library(events) if events else 0, abs=1e-6)
        assert job_epsilon(state) == max(node_epsilon(state, node) for node in SAMPLES)


@settings(max_examples=15, deadline=None)
@given(
    st.floats(0.5, 20), st.floats(0.001, 0.5), st.integers(1, 2000), st.lists(st.integers(1, 50), max_size=2)
)
def test_the_least_noise_is_found(target: float, rate: float, steps: int, before: list[int]) -> None:
    spent = tuple(Steps(10.0, rate, count) for count in before)
    noise = noise_multiplier(spent, rate, steps, target, DELTA)
    if noise is None:
        assert epsilon((*spent, Steps(NOISE_LIMIT, rate, steps)), DELTA) > target
        return
    assert epsilon((*spent, Steps(noise, rate, steps)), DELTA) <= target
    if noise > 0.11:
        assert epsilon((*spent, Steps(noise * 0.998, rate, steps)), DELTA) > target


def test_the_bound_is_above_and_near_the_exact_one() -> None:
    for noise, rate, steps in ((1.0, 0.01, 1000), (0.8, 0.05, 100), (2.0, 0.2, 300)):
        mine = epsilon([Steps(noise, rate, steps)], DELTA)
        exact = by_library([(noise, rate, steps)], PLDAccountant)
        assert exact <= mine <= 1.25 * exact


def test_nothing_is_spent_at_first_and_rates_are_at_most_one() -> None:
    assert epsilon([], DELTA) == 0
    assert math.isclose(sampling_rate(16, 64), 0.25)
    assert sampling_rate(16, 8) == 1.0


def test_a_budget_that_cannot_be_met_says_what_would() -> None:
    made = plan(request_of(started())).nodes
    tight = Privacy(epsilon=0.05, delta=DELTA)
    nodes, left_out = with_noise(made, tight, SAMPLES, {}, 1000)
    assert "a" not in nodes
    assert left_out["a"].startswith("spec.privacy.epsilon: 0.05 is too little for 1000 more rounds")
    assert "raise it to at least" in left_out["a"]
    _, left_out = with_noise(made, Privacy(epsilon=8, delta=0.01), SAMPLES, {}, 2)
    assert left_out["a"] == "spec.privacy.delta: 0.01 is above 1/200, of its rows; lower it"
