# SPDX-License-Identifier: Apache-2.0
"""Conditions behave as Kubernetes clients expect of metav1.Condition."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from fedpipe_api.conditions import ADVICE, Condition, Reason, set_condition
from fedpipe_api.status import Metric, Phase

START = datetime(2026, 1, 1, tzinfo=UTC)

CONDITIONS = st.builds(
    Condition,
    type=st.sampled_from(["Ready", "Planned", "Complete"]),
    status=st.sampled_from(["True", "False", "Unknown"]),
    reason=st.sampled_from([reason.value for reason in Reason]),
    message=st.sampled_from(["", "a", "b"]),
    lastTransitionTime=st.integers(0, 1000).map(lambda seconds: START + timedelta(seconds=seconds)),
    observedGeneration=st.none() | st.integers(0, 5),
)


def fold(steps: list[Condition]) -> tuple[Condition, ...]:
    conditions: tuple[Condition, ...] = ()
    for step in steps:
        conditions = set_condition(conditions, step)
    return conditions


@given(st.lists(CONDITIONS, max_size=20))
def test_one_condition_per_type_in_order_of_first_sight(steps: list[Condition]) -> None:
    assert [condition.type for condition in fold(steps)] == list(dict.fromkeys(step.type for step in steps))


@given(st.lists(CONDITIONS, max_size=20))
def test_each_says_the_latest(steps: list[Condition]) -> None:
    latest = {step.type: step for step in steps}
    for condition in fold(steps):
        step = latest[condition.type]
        assert condition.model_copy(update={"last_transition_time": step.last_transition_time}) == step


@given(st.lists(CONDITIONS, max_size=20))
def test_transition_time_is_that_of_the_last_change_of_status(steps: list[Condition]) -> None:
    for condition in fold(steps):
        history = [step for step in steps if step.type == condition.type]
        since = history[-1]
        for step in reversed(history):
            if step.status != condition.status:
                break
            since = step
        assert condition.last_transition_time == since.last_transition_time


@given(st.lists(CONDITIONS, max_size=10), CONDITIONS)
def test_setting_twice_is_setting_once(steps: list[Condition], new: Condition) -> None:
    once = set_condition(fold(steps), new)
    later = new.model_copy(update={"last_transition_time": new.last_transition_time + timedelta(hours=1)})
    assert set_condition(once, later) == once


def test_every_reason_is_a_word_with_advice() -> None:
    for reason in Reason:
        Condition(type="Ready", status="True", reason=reason, last_transition_time=START)
        assert ADVICE[reason].meaning.endswith(".")
        assert not ADVICE[reason].action or ADVICE[reason].action.endswith(".")


def test_terminal_phases() -> None:
    assert {phase for phase in Phase if phase.terminal} == {Phase.SUCCEEDED, Phase.FAILED}


@given(st.floats(-1e12, 1e12))
def test_metric_keeps_four_significant_digits(value: float) -> None:
    metric = Metric(name="loss", value=value, best=value, best_round=1)
    assert abs(metric.value - value) <= abs(value) * 5.01e-4
    assert float(f"{metric.value:.4g}") == metric.value
    assert Metric.model_validate(metric.to_dict()) == metric
