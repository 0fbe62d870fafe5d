# SPDX-License-Identifier: Apache-2.0
"""The operator's smaller parts: certificates, identity, when a status is written, metrics, views."""

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from prometheus_client.parser import text_string_to_metric_families

from fedpipe_api.base import UserError
from fedpipe_api.names import child_name
from fedpipe_api.status import Phase
from fedpipe_api.wire import Blob
from fedpipe_operator.coordinator import Identity
from fedpipe_operator.engine import Engine, Refused
from fedpipe_operator.engine.decide import Wait
from fedpipe_operator.engine.jobs import Job
from fedpipe_operator.engine.records import (
    Offered,
    RoundAggregated,
    RoundClosed,
    RoundOpened,
    Submitted,
    UpdateAccepted,
)
from fedpipe_operator.engine.state import apply, submitted
from fedpipe_operator.kube.api import ApiError
from fedpipe_operator.kube.identity import REFUSED_SECONDS, JobName, PodIdentities
from fedpipe_operator.kube.inventory import Inventory
from fedpipe_operator.kube.job_status import WriteBudget, invalid_status, job_status
from fedpipe_operator.kube.pod_warnings import AT_ONCE, QUIET_SECONDS, PodWarnings
from fedpipe_operator.kube.resync import Resync
from fedpipe_operator.kube.settings import OperatorSettings
from fedpipe_operator.kube.tls import CA_LIFE, OVERLAP, SERVING_LIFE, Material, load_certificate, renew
from fedpipe_operator.kube.views import pod_view
from fedpipe_operator.metrics import FAMILIES, Exposition, OperatorMetrics, markdown
from fedpipe_operator.metrics.job_totals import Totals
from kube.looks import PLAN, SHAPE, state_of
from kube.objects import NOW, UID, capacity, job, node, pod
from standins.agents import make_update, manifest_of

START = datetime(2027, 1, 1, tzinfo=UTC)
HOSTS = ["fedpipe.fedpipe.svc", "127.0.0.1"]


def trusts(bundle: str, certificate: bytes, at: datetime) -> bool:
    """Whether an agent with the bundle would accept the certificate."""
    leaf = x509.load_pem_x509_certificate(certificate)
    if not leaf.not_valid_before_utc <= at < leaf.not_valid_after_utc:
        return False
    authorities = x509.load_pem_x509_certificates(bundle.encode())
    for authority in authorities:
        try:
            leaf.verify_directly_issued_by(authority)
        except Exception:
            continue
        return authority.not_valid_before_utc <= at < authority.not_valid_after_utc
    return False


def test_certificates_are_renewed_without_a_gap_for_years() -> None:
    """An agent whose bundle is up to half a day old always trusts the coordinator."""
    now, material = START, renew(None, HOSTS, START)
    published, served, authorities = [(now, material.bundle)], set(), set()
    while now < START + 3 * CA_LIFE:
        now += timedelta(hours=6)
        material = renew(material, HOSTS, now)
        served.add(material.tls_crt)
        authorities.add(material.ca_crt)
        old = next(
            bundle for at, bundle in reversed(published) if now - at >= timedelta(hours=12) or at == START
        )
        assert trusts(old, material.tls_crt, now)
        assert trusts(material.bundle, material.tls_crt, now)
        published.append((now, material.bundle))
    assert len(authorities) >= 4
    assert len(served) >= 3 * CA_LIFE / SERVING_LIFE


def test_nothing_is_renewed_before_its_time_and_names_matter() -> None:
    material = renew(None, HOSTS, START)
    assert renew(material, HOSTS, START + timedelta(days=30)) is material
    other = renew(material, [*HOSTS, "edge.example.org"], START)
    assert other.tls_crt != material.tls_crt
    assert other.ca_crt == material.ca_crt
    assert Material.from_secret("s", material.to_secret()) == material
    assert timedelta(hours=1) < OVERLAP < SERVING_LIFE / 3
    load_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), material)


def test_a_job_whose_operator_slept_through_the_end_of_the_ca_gets_a_new_one() -> None:
    late = START + 2 * CA_LIFE
    material = renew(renew(None, HOSTS, START), HOSTS, late)
    assert trusts(material.bundle, material.tls_crt, late)


def test_a_secret_that_is_no_certificate_is_named() -> None:
    with pytest.raises(UserError, match="Secret own: needs"):
        Material.from_secret("own", {"tls.crt": "eA=="})


class Reviews:
    """An API server that knows one token and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.away = False
        self.pods: dict[str, Any] = {}

    async def review_token(self, token: str, audience: str | None) -> Any:
        self.asked += 1
        if self.away:
            raise ApiError(0, "Unreachable", "the API server does not answer")
        if token != "good":
            return {"error": "unknown token"}
        name = child_name("tickets", "edge-1")
        extra = {
            "authentication.kubernetes.io/pod-name": [name],
            "authentication.kubernetes.io/pod-uid": [pod("edge-1")["metadata"]["uid"]],
        }
        user = {"username": "system:serviceaccount:support:default", "extra": extra}
        return {"authenticated": True, "audiences": ["fedpipe"], "user": user}

    async def get_pod(self, namespace: str, name: str) -> Any:
        return self.pods.get(name)


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens here have no claims: they expire in an hour."""
    monkeypatch.setattr("fedpipe_operator.kube.identity.expiry", lambda token: NOW + 3600)


@pytest.mark.usefixtures("signed")
async def test_an_agent_is_its_pod() -> None:
    api, clock = Reviews(), Clock()
    inventory = Inventory(lambda: None, lambda uid: None)
    names = {UID: JobName("support", "tickets")}
    identify = PodIdentities(api, inventory.pod, names.get, clock)  # type: ignore[arg-type]
    assert await identify("good") is None, "its Pod is not known"
    clock.now += REFUSED_SECONDS
    api.pods[child_name("tickets", "edge-1")] = pod("edge-1")
    assert await identify("good") == Identity(UID, "edge-1"), "quicker than the watch"
    inventory.see_pod(pod("edge-1"))
    for _ in range(20):
        assert await identify("good") == Identity(UID, "edge-1")
    assert api.asked == 2, "a review is kept"
    clock.now += 601
    await identify("good")
    assert api.asked == 3, "but not for ever"
    inventory.see_pod(pod("edge-1", created=NOW + 5))
    api.pods.clear()
    assert await identify("good") is None, "another Pod of that name"
    assert await identify("bad") is None
    assert await identify("bad") is None
    assert api.asked == 4, "a refusal is kept"
    clock.now += 700
    api.away = True
    with pytest.raises(Refused) as caught:
        await identify("good")
    assert caught.value.status == 503
    names.clear()


def known_job(**spec: Any) -> Job:
    one = job(**spec)
    record = Submitted(namespace="support", name="tickets", generation=1, spec=one.spec)
    return Job(submitted(UID, record, NOW))


def test_an_ordinary_round_is_written_at_most_twice_and_news_at_once() -> None:
    known = known_job()
    known.wait = Wait("RoundOpen", "round 1: 0 of 3 updates")  # type: ignore[arg-type]
    options: dict[str, Any] = {
        "pods": [], "choice": None, "refused": None, "output": None, "tracking": None, "previous": None, "now": NOW
    }  # fmt: skip
    first = job_status(job(), known, **options)
    budget, now, writes = WriteBudget(None), NOW, 0
    assert budget.delay(first, now) == 0
    budget.wrote(first, now)
    for step in range(300):
        now += 1
        new = first.model_copy(update={"eta": f"{300 - step}s"})
        if budget.delay(new, now) == 0:
            budget.wrote(new, now)
            writes += 1
    assert writes == 1
    suspended = first.model_copy(update={"phase": Phase.SUSPENDED})
    assert budget.delay(suspended, now) == 0
    budget.wrote(suspended, now)
    assert budget.delay(first, now) == 2, "writes keep a distance"
    assert budget.delay(suspended, now) is None


def test_an_invalid_spec_is_said_and_a_running_job_keeps_its_phase() -> None:
    fresh = invalid_status("spec.rounds.count: too small", 1, None, NOW)
    assert (fresh.phase, fresh.conditions[0].reason) == (Phase.PENDING, "Invalid")
    before = fresh.model_copy(update={"phase": Phase.TRAINING})
    assert invalid_status("spec: x", 2, before, NOW).phase is Phase.TRAINING


def test_an_agent_that_was_killed_for_memory_says_so_while_it_works_again() -> None:
    known = known_job()
    apply(known.state, Offered(sequence=1, nodes=("a",)), NOW)
    ended = {"reason": "OOMKilled", "exitCode": 137}
    status = [{"name": "agent", "state": {"running": {}}, "lastState": {"terminated": ended}}]
    view = pod_view(pod("a", containerStatuses=status))
    assert view
    assert view.trouble is None
    found = job_status(
        job(),
        known,
        pods=[view],
        choice=None,
        refused=None,
        output=None,
        tracking=None,
        previous=None,
        now=NOW,
    )
    assert found.node_table[0].message == (
        "its container was started again: it was killed because it used more memory than it may (OOMKilled)"
    )


async def test_of_many_pods_that_wait_a_few_are_asked_about_at_a_look() -> None:
    asked: list[str] = []

    class Events:
        async def warnings_of(self, namespace: str, uid: str) -> list[Any]:
            asked.append(uid)
            return []

    clock = Clock()
    warnings = PodWarnings(Events(), clock)  # type: ignore[arg-type]
    found = [pod_view(pod(f"edge-{n}", phase="Pending", created=NOW - 60)) for n in range(2 * AT_ONCE + 1)]
    pods = [view for view in found if view]
    for expected in (AT_ONCE, 2 * AT_ONCE, len(pods), len(pods)):
        await warnings.ask(UID, pods)
        assert len(set(asked)) == len(asked) == expected, "each in its turn"
    clock.now += QUIET_SECONDS
    assert await warnings.ask(UID, pods)
    assert not await warnings.ask(UID, [])


def test_gpu_nodes_are_held_by_one_job() -> None:
    reported: list[str] = []
    inventory = Inventory(lambda: reported.append("fleet"), reported.append)
    inventory.hold("first", ["a", "b"])
    inventory.hold("second", ["b", "c"])
    names = {"first": "ns/first", "second": "ns/second"}
    assert inventory.fleet_for("second", names).held == {"a": "ns/first", "b": "ns/first"}
    assert inventory.hold("first", ["a"])
    assert inventory.fleet_for("second", names).held == {"a": "ns/first"}


def test_a_heartbeat_wakes_nobody() -> None:
    reported: list[str] = []
    clock = Clock()
    inventory = Inventory(lambda: reported.append("fleet"), reported.append, clock)
    inventory.see_node(node("a"))
    inventory.see_capacity(capacity("a"))
    reported.clear()
    clock.now += 60
    inventory.see_capacity(capacity("a", at=NOW + 60))
    assert reported == []
    clock.now += 9999
    inventory.see_capacity(capacity("a", at=NOW + 9999))
    assert reported == ["fleet"], "it had been treated as gone"


@pytest.mark.parametrize("wrong", [-86_400, -400, 0, 86_400])
def test_a_probe_is_silent_by_the_operator_s_clock(wrong: float) -> None:
    """However wrong the clock of its node is."""
    clock = Clock()
    inventory = Inventory(lambda: None, lambda uid: None, clock)
    for _ in range(3):
        inventory.see_capacity(capacity("a", at=clock.now + wrong))
        clock.now += 120
    assert not inventory.capacities["a"].stale(clock.now)
    inventory.see_capacity(capacity("a", at=clock.now - 120 + wrong))
    clock.now += 300
    assert inventory.capacities["a"].stale(clock.now)


class Paged:
    """An API server that gives at most two objects at a time."""

    def __init__(self, lists: dict[str, list[Any]]) -> None:
        self._lists = lists

    async def request(self, verb: str, method: str, path: str, *, query: Any, accept: str) -> Any:
        found = self._lists[path]
        begin = int(query.get("continue", 0))
        rest = {"continue": str(begin + 2)} if begin + 2 < len(found) else {}
        return {"metadata": rest, "items": found[begin : begin + 2]}


async def test_everything_there_is_is_known_before_the_watches_begin(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    ancient = capacity("ancient")
    ancient["status"]["observedAt"] = "0000-01-01T00:00:00Z"
    api: Any = Paged(
        {
            "/api/v1/nodes": [node(name) for name in names],
            "/apis/fedpipe.io/v1alpha1/fedpipenodes": [ancient, *(capacity(name) for name in names)],
            "/api/v1/namespaces/one/pods": [pod(name) for name in names[:3]],
            "/api/v1/namespaces/two/pods": [pod(names[3])],
        }
    )
    settings = OperatorSettings(
        "fedpipe", "fedpipe", tmp_path, "agent:1", "operator:1", namespaces=("one", "two")
    )
    known = Inventory(lambda: None, lambda uid: None)
    controller: Any = SimpleNamespace(inventory=known)
    engine: Any = None
    await Resync(api, engine, controller, settings).fill()
    assert sorted(known.nodes) == names
    assert sorted(known.capacities) == [*names[:1], "ancient", *names[1:]]
    assert "status.observedAt" in (known.capacities["ancient"].fault or "")
    assert len(known.pods_of("support", UID)) == 4


async def scraped(figures: OperatorMetrics) -> str:
    return (await figures.text()).decode()


def test_labels_are_escaped() -> None:
    samples = Exposition()
    labels = ("a\\b", 'say "x"\nand y', "bf16", "memory")
    samples.add("fedpipe_node_plan_info", (labels[0], labels[1], "n", *labels[2:]), 1)
    (family,) = text_string_to_metric_families(samples.text())
    assert family.samples[0].labels["namespace"] == labels[0]
    assert family.samples[0].labels["job"] == labels[1]


def test_totals_are_the_same_whether_rounds_are_added_one_by_one_or_at_once() -> None:
    state = state_of(job(), ("a", "b"), ("a", "b"), plan=("a", "b"))
    following = Totals()
    for number in (1, 2, 3):
        apply(state, RoundOpened(round=number, plan=2, participants=("a", "b"), deadline=NOW), NOW)
        following.follow(state)
        body = make_update(SHAPE, PLAN, "a", number)
        apply(state, UpdateAccepted(round=number, node="a", manifest=manifest_of(body, PLAN)), NOW)
        apply(state, RoundClosed(round=number, stragglers={"b": 1}, bytes_down=7), NOW)
        blob = Blob(digest="0" * 64, size=1)
        done = RoundAggregated(
            round=number, adapter=blob, matrices={}, checks={}, relative_error=0.0, discarded_energy=0.0,
            effective_rank=1.0, seconds=1.0,
        )  # fmt: skip
        apply(state, done, NOW)
    apply(state, RoundOpened(round=4, plan=2, participants=("a", "b"), deadline=NOW), NOW)
    apply(state, UpdateAccepted(round=4, node="a", manifest=manifest_of(body, PLAN)), NOW)
    found = following.follow(state)
    assert found == Totals().follow(state)
    assert (found.updates, found.stragglers, found.bytes_down) == (4, 3, 21)
    assert found.under_training == pytest.approx(1 / 4)  # of 2 x 2 planned steps, b was heard of at its first
    assert following.updates == 3


async def test_every_series_is_of_the_table_and_vanishes_with_its_job(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    await engine.start()
    try:
        await engine.submit(job())
        await engine.set_eligible_nodes(UID, ["edge-1", "edge-2"])
        figures = OperatorMetrics(engine, tmp_path, lambda: {("get", "200"): 3}, lambda: 0.5, dict)
        found = {family.name: family for family in text_string_to_metric_families(await scraped(figures))}
        # The parser takes the ending off counters, and what a client adds for its histograms is no family of ours.
        named = {name + "_total" * (family.type == "counter") for name, family in found.items()}
        assert {name for name in named if not name.endswith("_created")} <= {f.name for f in FAMILIES}
        for family in found.values():
            assert family.documentation
        phases = {s.labels["phase"]: s.value for s in found["fedpipe_job_phase"].samples}
        assert [phase for phase, value in phases.items() if value] == ["Planning"]
        (sample,) = found["fedpipe_operator_api_requests"].samples
        assert (sample.labels, sample.value) == ({"verb": "get", "code": "200"}, 3.0)
        await engine.delete(UID)
        assert "tickets" not in await scraped(figures)
    finally:
        await engine.stop()


def test_the_readme_has_every_metric() -> None:
    readme = Path(__file__).resolve().parents[2] / "operator" / "README.md"
    assert markdown() in readme.read_text(encoding="utf-8")
