# SPDX-License-Identifier: Apache-2.0
"""A node's policy: what it forbids, what it is when it is damaged, and that its privacy ledger only grows."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_fixtures import registered
from fedpipe_agent.train import privacy_ledger, site
from fedpipe_agent.train.data import load as load_data
from fedpipe_agent.train.site import Site
from fedpipe_api.accounting import Steps, epsilon
from fedpipe_api.job import Task
from fedpipe_api.policy import FedPipePolicy, Forbidden, PrivacyBudget, forbidden
from fedpipe_api.privacy import Privacy

STEPS = Steps(4.0, 0.25, 10)
HUB = "google/bert@abc"


def policy(**spec):
    document = {"apiVersion": "fedpipe.io/v1alpha1", "kind": "FedPipePolicy", "spec": spec}
    return FedPipePolicy.model_validate(document)


def why(asked=None, namespace="team-a", model=HUB, task=Task.SEQUENCE_CLASSIFICATION, fields=None, **spec):
    job = registered(task, **({"fields": fields} if fields else {})).model_copy(update=asked or {})
    return forbidden(policy(**spec), job, namespace=namespace, model=model)


LIMITS = {"maxEpsilon": 8, "maxDelta": 1e-5}
BUDGET = {"epsilon": 3, "delta": 1e-5, "file": "/b"}


def private(epsilon=8.0, delta=1e-5):
    return {"privacy": Privacy(epsilon=epsilon, delta=delta)}


@pytest.mark.parametrize(
    ("asked", "spec", "text"),
    [
        ({}, {"privacy": LIMITS}, "spec.privacy: the job has no spec.privacy, which is needed here"),
        ({}, {"budget": BUDGET}, "spec.budget: the job has no spec.privacy, which is needed here"),
        (private(8.1), {"privacy": LIMITS}, "spec.privacy.maxEpsilon: at most 8, but the job's privacy.epsilon is 8.1"),
        (private(1, 1e-4), {"privacy": LIMITS}, "spec.privacy.maxDelta: at most 1e-05, but the job's privacy.delta is 0.0001"),
        ({}, {"jobs": {"namespaces": ["team-b*"]}}, "spec.jobs.namespaces: jobs of team-a may not train here"),
        ({}, {"jobs": {"names": ["mail-*"]}}, "spec.jobs.names: job tickets may not train here"),
        ({}, {"models": ["meta/*"]}, "spec.models: model google/bert@abc may not be trained here"),
        ({}, {"models": ["google/bert@def"]}, "spec.models: model google/bert@abc may not be trained here"),
        ({}, {"data": {"fields": ["text"]}}, "spec.data.fields: field 'label', which the job reads, may not be read"),
        ({"min_updates": 2}, {"minParticipants": 3}, "spec.minParticipants: at least 3, but the job's rounds.minUpdates is 2"),
    ],
)  # fmt: skip
def test_what_asks_for_less_is_forbidden(asked, spec, text):
    assert why(asked, **spec) == text


def test_what_asks_for_as_much_is_allowed():
    assert why() is None
    demanding = {
        "privacy": LIMITS,
        "budget": BUDGET,
        "jobs": {"namespaces": ["team-*"], "names": ["tickets"]},
        "models": ["google/bert"],
        "data": {"fields": ["text", "label"]},
        "minParticipants": 3,
    }
    assert why({**private(), "min_updates": 3}, **demanding) is None


def test_an_agent_without_a_namespace_is_in_none_that_is_allowed():
    assert why(namespace=None, jobs={"namespaces": ["*"]}).endswith("jobs of no namespace may not train here")


def test_a_path_cannot_climb_out_of_what_is_allowed():
    assert why(model="/models/base", models=["/models/*"]) is None
    assert "/etc/base may not" in why(model="/models/../etc/base", models=["/models/*"]).replace(
        "/models/../etc", "/etc"
    )


def test_a_field_that_a_language_model_asks_for_by_name_is_checked():
    allowed = {"fields": ["text", "sample"]}
    assert why(task=Task.CAUSAL_LM, data=allowed) is None
    assert why(task=Task.CAUSAL_LM, fields={"text": "sample.body"}, data=allowed) is None
    assert "'diagnosis'" in why(task=Task.CAUSAL_LM, fields={"completion": "diagnosis"}, data=allowed)


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A node's directory in place of the fixed one; it does not exist yet."""
    monkeypatch.setattr(site, "POLICY", tmp_path / "etc" / "policy.yaml")
    return tmp_path / "etc"


def text_of(**spec):
    return json.dumps({"apiVersion": "fedpipe.io/v1alpha1", "kind": "FedPipePolicy", "spec": spec})


def enter(directory, job=None, more=()):
    return Site(job or registered(), HUB, directory / "token", more)


def test_a_node_without_a_policy_demands_nothing(node):
    assert enter(node).fields is None


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "policy.yaml: No such file or directory"),
        ("", "policy.yaml: 0 YAML documents; give exactly one"),
        ("spec: [", "policy.yaml:1: not YAML"),
        ("a: 1\n" * 20000, "policy.yaml: larger than 65536 bytes"),
        (text_of(privcy=LIMITS), "policy.yaml: spec.privcy: unknown field"),
        (text_of(privacy={"maxEpsilon": float("inf"), "maxDelta": 1e-5}), "policy.yaml: spec.privacy.maxEpsilon"),
        (text_of(privacy={"maxEpsilon": 8}), "policy.yaml: spec.privacy.maxDelta: required, but not given"),
        (text_of(jobs={"names": []}), "policy.yaml: spec.jobs.names: must have at least 1"),
        ('{"apiVersion": "fedpipe.io/v1alpha1", "kind": "Policy", "spec": {}}', "policy.yaml: kind"),
    ],
)  # fmt: skip
def test_a_policy_that_cannot_be_read_forbids_everything(node, content, text):
    node.mkdir()
    if content is not None:
        (node / "policy.yaml").write_text(content)
    with pytest.raises(Forbidden) as raised:
        enter(node)
    assert str(raised.value).startswith("PolicyForbids: ")
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_policy_of_the_arguments_cannot_replace_the_nodes(node, tmp_path):
    node.mkdir()
    (node / "policy.yaml").write_text(text_of(jobs={"names": ["other"]}))
    lax = tmp_path / "lax.yaml"
    lax.write_text(text_of())
    with pytest.raises(Forbidden, match=r"spec\.jobs\.names: job tickets may not train here"):
        enter(node, more=[lax])
    with pytest.raises(Forbidden, match="No such file"):
        Site(registered(), HUB, node / "token", [tmp_path / "missing.yaml"])


def test_the_namespace_is_that_of_the_kubelets_token(node, tmp_path):
    node.mkdir()
    (node / "policy.yaml").write_text(text_of(jobs={"namespaces": ["team-a"]}))
    for namespace, allowed in (("team-a", True), ("team-b", False), (["team-a"], False), (None, False)):
        claims = json.dumps({"kubernetes.io": {"namespace": namespace}}).encode()
        (node / "token").write_text(f"head.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.signature")
        if allowed:
            enter(node)
            continue
        with pytest.raises(Forbidden, match="may not train here"):
            enter(node)


def test_fields_that_may_not_be_read_are_not_there(tmp_path, tokenizer):
    rows = [{"prompt": "cat", "completion": "dog", "messages": [{"role": "user", "content": "x"}]}] * 4
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = registered(Task.CAUSAL_LM)
    # With its messages, which have no answer, the rows could not be learnt.
    found = load_data(
        tmp_path, job.data, job.model, tokenizer, seed=0, longest=None, readable=frozenset({"prompt", "completion"})
    )  # fmt: skip
    assert len(found.train) + len(found.held_out) == 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from agent_fixtures import save_tiny_model
    from fedpipe_agent.train import model as base

    return base.read_tokenizer(base.Source(str(save_tiny_model("llama", tmp_path_factory.mktemp("llama")))))


def ledger(directory: Path, epsilon: float = 3.0) -> PrivacyBudget:
    path = directory / "budget.jsonl"
    path.touch()
    return PrivacyBudget(epsilon=epsilon, delta=1e-5, file=str(path))


def test_a_budget_is_of_all_jobs_together_and_outlives_them(tmp_path):
    budget = ledger(tmp_path)
    charged = 0
    refused = None
    while refused is None:  # each as if by a new agent of a new job
        try:
            privacy_ledger.charge(budget, f"job-{charged}", STEPS)
            charged += 1
        except Forbidden as error:
            refused = str(error)
    assert "budget.jsonl: epsilon " in refused
    assert refused.endswith("would be spent over all jobs, of at most 3")
    assert charged > 1
    spent = STEPS._replace(steps=charged * STEPS.steps)
    assert (
        epsilon([spent], budget.delta) <= 3 < epsilon([spent._replace(steps=spent.steps + 10)], budget.delta)
    )
    lines = Path(budget.file).read_text().splitlines()
    assert [json.loads(line)["job"] for line in lines] == [f"job-{i}" for i in range(charged)]
    privacy_ledger.check(budget)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.01, 0.3, 1.0]), st.integers(1, 40)),
        max_size=12,
    ),
    st.integers(1, 60),
)
def test_whatever_is_asked_and_wherever_it_is_cut_no_more_than_the_budget_is_granted(tmp_path, asked, cut):
    budget = ledger(tmp_path)
    path, granted = Path(budget.file), []
    path.write_bytes(b"")
    for steps in (Steps(*one) for one in asked):
        try:
            privacy_ledger.charge(budget, "job", steps)
        except Forbidden:
            continue
        granted.append(steps)
        # A crash while the next line is written.
        whole = path.read_bytes()
        path.write_bytes(whole + whole.splitlines()[-1][:cut])
    assert epsilon(granted, budget.delta) <= budget.epsilon


@pytest.mark.parametrize("noise", [0.09, 1e-12, 1e-160, 5e-324])
def test_noise_that_floats_cannot_count_is_above_every_budget(tmp_path, noise):
    budget = ledger(tmp_path, epsilon=1000)
    with pytest.raises(Forbidden, match="epsilon inf would be spent"):
        privacy_ledger.charge(budget, "job", Steps(noise, 0.3, 1))
    assert Path(budget.file).read_bytes() == b""


@pytest.mark.parametrize("damage", ["x\n", '{"job": "a"}\n', '{"job":"a","noiseMultiplier":1e9,"samplingRate":1,"steps":1,"at":1}\n'])  # fmt: skip
def test_a_damaged_ledger_forbids_everything(tmp_path, damage):
    budget = ledger(tmp_path)
    privacy_ledger.charge(budget, "job", STEPS)
    with open(budget.file, "a") as file:
        file.write(damage)
    with pytest.raises(Forbidden, match=r"budget\.jsonl:2: .*restore the ledger"):
        privacy_ledger.check(budget)


def test_a_ledger_that_is_gone_is_not_begun_again(tmp_path):
    budget = ledger(tmp_path)
    Path(budget.file).unlink()
    with pytest.raises(Forbidden, match="no such file; its owner creates it once"):
        privacy_ledger.charge(budget, "job", STEPS)
    assert not Path(budget.file).exists()
    Path(budget.file).mkdir()
    with pytest.raises(Forbidden, match="Is a directory; the privacy spent cannot be counted"):
        privacy_ledger.check(budget)


CHARGES = """
import sys
from fedpipe_agent.train.privacy_ledger import charge
from fedpipe_api.accounting import Steps
from fedpipe_api.policy import Forbidden, PrivacyBudget
budget = PrivacyBudget(epsilon=3, delta=1e-5, file=sys.argv[1])
granted = 0
for _ in range(200):
    try:
        charge(budget, sys.argv[2], Steps(4.0, 0.25, 1))
        granted += 1
    except Forbidden:
        break
print(granted)
"""


def test_two_agents_at_once_do_not_spend_the_same_budget(tmp_path):
    budget = ledger(tmp_path)
    agents = [
        subprocess.Popen([sys.executable, "-c", CHARGES, budget.file, job], stdout=subprocess.PIPE, text=True)
        for job in ("a", "b")
    ]
    granted = [int(agent.communicate()[0]) for agent in agents]
    lines = Path(budget.file).read_text().splitlines()
    assert len(lines) == sum(granted)
    assert epsilon([Steps(4.0, 0.25, sum(granted))], 1e-5) <= 3
    assert all(agent.returncode == 0 for agent in agents)
