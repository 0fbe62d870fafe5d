# SPDX-License-Identifier: Apache-2.0
"""Record-level privacy through the agent and through a whole job: what leaves, what is refused, how it ends."""

import pytest

from agent_fixtures import Coordinator, registered, save_tiny_model, write_rows
from engine.test_agent_train import STOP, arguments, plan, shape_of, train_assignment
from fedpipe_agent import cli
from fedpipe_api.privacy import Privacy
from fedpipe_api.status import Phase
from fedpipe_api.wire import Assignment, AssignmentKind
from fedpipe_operator.engine.status import status
from standins.local import local, working
from standins.server import UID

PRIVATE = Privacy(epsilon=8.0, delta=1e-3)
SPEC = {
    "privacy": {"epsilon": 8.0, "delta": 1e-5},
    "adapter": {"ranks": {"min": 2, "max": 4}, "selection": {"mode": "all"}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def facts():
    return registered().model_copy(update={"privacy": PRIVATE})


def test_only_noisy_weights_and_the_number_of_rows_leave(model, tmp_path, facts):
    ranks = {matrix.name: 2 for matrix in shape_of(model).matrices[:4]}
    noisy = plan(ranks, noise_multiplier=2.0)
    write_rows(tmp_path / "train.jsonl", 40)
    with Coordinator(facts) as coordinator:
        coordinator.assignments = [
            Assignment(kind=AssignmentKind.PROFILE, plan=noisy, profile_steps=2, importance=True),
            train_assignment(1, ranks, plan=noisy, evaluate=True),
            # A restart makes the round again: with other noise.
            train_assignment(1, ranks, plan=noisy, evaluate=True),
            Assignment(kind=AssignmentKind.EVALUATE, round=1, plan=noisy),
            STOP,
        ]
        assert cli.main(arguments(coordinator, model, tmp_path)) == 0
    (registration,) = coordinator.registrations
    assert (registration.samples, registration.evaluation_samples) == (40, 0)
    assert "int8" not in {precision.name for precision in registration.model.precisions}
    assert not coordinator.evaluations
    assert not coordinator.profiles[0].scores
    first, second = (manifest for manifest, _ in coordinator.updates)
    assert (first.train_loss, first.tokens) == (None, 0)
    assert first.digest != second.digest
    assert {(p.loss, p.tokens_per_second) for p in coordinator.progress} == {(None, None)}


@pytest.mark.parametrize(
    ("multiplier", "text"),
    [
        (None, "the plan has no noise"),
        (0.2, "the plan has too little noise"),
        (1e-160, "the plan has too little noise"),
    ],
)
def test_a_plan_with_too_little_noise_is_refused(model, tmp_path, facts, capsys, multiplier, text):
    ranks = {shape_of(model).matrices[0].name: 2}
    write_rows(tmp_path / "train.jsonl", 40)
    with Coordinator(facts) as coordinator:
        coordinator.assignments = [
            train_assignment(1, ranks, plan=plan(ranks, noise_multiplier=multiplier)),
            STOP,
        ]
        assert cli.main(arguments(coordinator, model, tmp_path)) == 1
    assert not coordinator.updates
    assert text in capsys.readouterr().err


def test_a_delta_above_one_row_is_refused(model, tmp_path, facts, capsys):
    write_rows(tmp_path / "train.jsonl", 40)
    wide = facts.model_copy(update={"privacy": Privacy(epsilon=8.0, delta=0.1)})
    with Coordinator(wide) as coordinator:
        assert cli.main(arguments(coordinator, model, tmp_path)) == 2
    assert "spec.privacy.delta: 0.1 is above 1/40, of the node's rows; lower it" in capsys.readouterr().err


async def test_a_job_spends_at_most_its_budget(tmp_path):
    async with local(tmp_path, nodes=2, count=3, **SPEC) as here:
        async with working([here.agent(node) for node in here.nodes]):
            await here.finish()
        state = here.engine.jobs[UID].state
        shown = status(state, None, {})
    assert shown.phase is Phase.SUCCEEDED
    assert shown.round == 3
    assert 7.5 < shown.epsilon <= 8.0
    assert shown.epsilon == max(node.epsilon for node in shown.node_table)


async def test_a_job_whose_budget_is_too_small_says_what_would_do(tmp_path):
    small = SPEC | {"privacy": {"epsilon": 0.001, "delta": 1e-9}}
    async with local(tmp_path, nodes=2, count=3, **small) as here:
        async with working([here.agent(node) for node in here.nodes]):
            await here.finish()
        finished = here.engine.jobs[UID].state.finished
    assert (finished.phase, finished.reason) == (Phase.FAILED, "PrivacyBudgetSpent")
    assert "spec.privacy.epsilon: 0.001 is too little for 3 more rounds of 2 steps" in finished.message
