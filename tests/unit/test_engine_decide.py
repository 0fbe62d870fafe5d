"""Pure decisions of the engine."""

import pytest

from fedpipe_api.job import Precision, Selection
from fedpipe_api.wire import NodePlan
from fedpipe_operator.engine.decide import importance_steps


def plan_of(step_seconds: float) -> NodePlan:
    return NodePlan(
        precision=Precision.FP32,
        micro_batch=1,
        accumulation=1,
        ranks={"m": 2},
        local_steps=1,
        predicted_bytes=1,
        predicted_step_seconds=step_seconds,
        predicted_round_seconds=step_seconds,
        limited_by="ranks",
    )


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [
        ({"a": 1.0}, {"a": 10}),
        ({"a": 1.0, "b": 1.0, "c": 4.0}, {"a": 10, "b": 10, "c": 3}),
        ({"fast": 0.1, "middle": 0.2, "slow": 100.0}, {"fast": 10, "middle": 10, "slow": 1}),
        ({"a": 0.0, "b": 0.0}, {"a": 10, "b": 10}),
    ],
)
def test_slow_nodes_score_matrices_in_the_time_of_the_median_one(seconds, steps):
    plans = {node: plan_of(each) for node, each in seconds.items()}
    selection = Selection(mode="importance", warmup_steps=10)
    assert {node: importance_steps(selection, plans, node) for node in plans} == steps


@pytest.mark.parametrize("mode", ["all", "random"])
def test_nothing_is_scored_where_importance_does_not_select(mode):
    assert importance_steps(Selection(mode=mode), {"a": plan_of(1.0)}, "a") == 0
