# SPDX-License-Identifier: Apache-2.0
"""A node's policy through the agent and through a whole job: nothing is opened, and the others go on."""

import asyncio
import os
import sys
from pathlib import Path

import pytest
import yaml

from agent_fixtures import Coordinator, registered, save_tiny_model, write_rows
from engine.test_agent_train import STOP, arguments, plan, shape_of, train_assignment
from fedpipe_agent import cli
from fedpipe_api.privacy import Privacy
from fedpipe_api.status import Phase
from fedpipe_operator.engine.status import status
from standins.local import local, working
from standins.server import UID


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model("bert", tmp_path_factory.mktemp("bert"))


def write_policy(directory: Path, **spec: object) -> Path:
    path = directory / "policy.yaml"
    document = {"apiVersion": "fedpipe.io/v1alpha1", "kind": "FedPipePolicy", "spec": spec}
    path.write_text(yaml.safe_dump(document))
    return path


def test_an_agent_that_may_not_train_opens_no_data(model, tmp_path, capsys):
    policy = write_policy(tmp_path, privacy={"maxEpsilon": 8, "maxDelta": 1e-5})
    # There is no train file: to look for one would be another error.
    with Coordinator(registered()) as coordinator:
        assert cli.main([*arguments(coordinator, model, tmp_path), "--policy", str(policy)]) == 2
    why = f"PolicyForbids: {policy}: spec.privacy: the job has no spec.privacy, which is needed here"
    assert capsys.readouterr().err.splitlines()[-1] == f"fedpipe-agent: {why}"
    assert not coordinator.registrations
    assert [(p.state, p.message) for p in coordinator.progress] == [("failed", why)]


def test_rounds_end_where_the_nodes_budget_does_whatever_the_coordinator_says(model, tmp_path, capsys):
    """The coordinator asks for the same round again and again, of new agents, as if nothing were spent."""
    ledger = tmp_path / "budget.jsonl"
    ledger.touch()
    policy = write_policy(tmp_path, budget={"epsilon": 2.0, "delta": 1e-3, "file": str(ledger)})
    ranks = {matrix.name: 2 for matrix in shape_of(model).matrices[:2]}
    noisy = plan(ranks, noise_multiplier=2.0)
    write_rows(tmp_path / "train.jsonl", 40)
    facts = registered().model_copy(update={"privacy": Privacy(epsilon=1.9, delta=1e-3)})
    statuses, updates = [], 0
    while 2 not in statuses:
        with Coordinator(facts) as coordinator:
            coordinator.assignments = [train_assignment(1, ranks, plan=noisy), STOP]
            statuses.append(cli.main([*arguments(coordinator, model, tmp_path), "--policy", str(policy)]))
        updates += len(coordinator.updates)
        assert len(ledger.read_text().splitlines()) == updates
    assert statuses[:-1] == [0] * updates
    assert updates >= 1
    assert not coordinator.updates
    assert coordinator.progress[-1].message is not None
    assert coordinator.progress[-1].message.startswith(f"PolicyForbids: {ledger}: epsilon ")
    assert "of at most 2" in capsys.readouterr().err


async def test_a_node_that_forbids_is_left_out_and_the_others_go_on(model, tmp_path):
    policy = write_policy(tmp_path, jobs={"names": ["another-*"]})
    rounds = {"count": 1, "localSteps": 2, "minUpdates": 2, "deadline": "5m"}
    async with local(tmp_path / "store", nodes=2, rounds=rounds) as here:
        node = "node-2"
        here.nodes.append(node)
        await here.engine.set_eligible_nodes(UID, here.nodes)
        (tmp_path / "token").write_text(f"token-{node}")
        agent = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fedpipe_agent.cli", "train", "--coordinator", here.address),
            *("--model", str(model), "--data", str(tmp_path), "--token-file", str(tmp_path / "token")),
            *("--policy", str(policy)),
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        _, errors = await agent.communicate()
        assert agent.returncode == 2, errors
        async with working([here.agent(other) for other in here.nodes[:2]]):
            await here.finish()
        shown = status(here.engine.jobs[UID].state, None, {})
    assert shown.phase is Phase.SUCCEEDED
    (left,) = [entry for entry in shown.node_table if entry.name == node]
    assert left.state == "left out"
    assert left.message is not None
    assert left.message.startswith(f"PolicyForbids: {policy}: spec.jobs.names: job ")
    assert "Traceback" not in errors.decode()
