# SPDX-License-Identifier: Apache-2.0
"""Dashboards and alerts: their form, the metrics they name, and data for every query under a real Prometheus."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from chart.rendering import CHART, REPOSITORY, rendered
from chart.watched import PROMETHEUS, Prometheus, run
from fedpipe_agent.probe import metrics as probe_metrics
from fedpipe_operator.metrics import FAMILIES

NAMES = ("rounds", "fleet", "operator")
RULES = CHART / "files/rules.yaml"

needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None or shutil.which("promtool") is None, reason="no prometheus and promtool on PATH"
)


def dashboard(name: str) -> dict[str, Any]:
    return json.loads((CHART / f"dashboards/{name}.json").read_text())


def queries() -> Iterator[tuple[str, str, str]]:
    """Yield where each PromQL expression stands, the expression, and its legend."""
    for name in NAMES:
        for panel in dashboard(name)["panels"]:
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}", target["expr"], target["legendFormat"]
    for rule in rules():
        yield f"alert {rule['alert']}", rule["expr"], "__auto"


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def offered() -> set[str]:
    """Return the name of every series that operator and probe report."""
    names = set()
    for family in FAMILIES:
        endings = ("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",)
        names |= {family.name + ending for ending in endings}
    names |= {f"fedpipe_node_{name}" for name in probe_metrics.NODE}
    names |= {f"fedpipe_probe_{name}" for name in probe_metrics.PROBE}
    return names


def test_generated_files_are_up_to_date() -> None:
    command = [sys.executable, "charts/generate.py", "--check"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}run `make generate`"


@pytest.mark.parametrize("name", NAMES)
def test_form(name: str) -> None:
    known = dashboard(name)
    assert known["uid"] == f"fedpipe-{name}"
    assert known["schemaVersion"] >= 41
    assert [v["name"] for v in known["templating"]["list"]] == ["datasource", "namespace", "job"]
    panels = known["panels"]
    assert {panel["type"] for panel in panels} <= {"timeseries", "stat", "table"}
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]


def test_every_metric_named_is_reported_by_operator_or_probe() -> None:
    known = offered()
    for place, expression, _ in queries():
        named = set(re.findall(r"fedpipe_\w+", expression))
        assert named, place
        assert named <= known, place


def test_every_metric_of_the_operator_is_shown_or_alerted_on() -> None:
    shown = {name for _, expression, _ in queries() for name in re.findall(r"fedpipe_\w+", expression)}
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    # Facts for queries by hand: what a job is, and when it began and ended.
    by_hand = {"fedpipe_job_info", "fedpipe_job_submitted_timestamp_seconds", "fedpipe_job_updates_total",
               "fedpipe_job_finished_timestamp_seconds", "fedpipe_job_evaluated_round"}  # fmt: skip
    # The largest of what is shown of each node.
    by_hand |= {"fedpipe_job_epsilon"}
    assert {family.name for family in FAMILIES} - shown == by_hand


@needs_prometheus
def test_rules_are_valid_and_each_alert_fires_on_its_fault(tmp_path: Path) -> None:
    shutil.copy(RULES, tmp_path / "rules.yaml")
    shutil.copy(Path(__file__).parent / "rules_test.yaml", tmp_path)
    for command in (["check", "rules", "--lint-fatal", "rules.yaml"], ["test", "rules", "rules_test.yaml"]):
        done = subprocess.run(
            ["promtool", *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    tests = yaml.safe_load((tmp_path / "rules_test.yaml").read_text())["tests"]
    tested = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert tested == {rule["alert"] for rule in rules()}


@needs_prometheus
def test_the_scrape_configuration_is_valid_and_fits_the_chart(tmp_path: Path) -> None:
    configuration = yaml.safe_load((CHART / "files/prometheus.yaml").read_text())
    wanted = {job["job_name"].removeprefix("fedpipe-"): job for job in configuration["scrape_configs"]}
    for job in wanted.values():
        assert [found["role"] for found in job.pop("kubernetes_sd_configs")] == ["pod"]
        job["static_configs"] = [{"targets": ["a:1"]}]  # Debian's promtool knows no Kubernetes
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    command = ["promtool", "check", "config", "--syntax-only", "--lint-fatal", tmp_path / "prometheus.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    offered = {}
    for document in rendered("default"):
        if document["kind"] not in ("Deployment", "DaemonSet"):
            continue
        meta, spec = (document["spec"]["template"][part] for part in ("metadata", "spec"))
        assert document["metadata"]["namespace"] == "fedpipe-system"
        assert meta["labels"]["app.kubernetes.io/instance"] == "fedpipe"
        ports = {port["name"] for container in spec["containers"] for port in container.get("ports", ())}
        offered[meta["labels"]["app.kubernetes.io/component"]] = ports
    for component, job in wanted.items():
        assert job["relabel_configs"][0]["regex"] in offered[component]
        assert job["honor_labels"]
    assert wanted["operator"]["tls_config"]["server_name"] == "fedpipe.fedpipe-system.svc"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def watched(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Prometheus]:
    """What Prometheus has seen of a whole job."""
    prometheus, stack = await run(tmp_path_factory.mktemp("watched"))
    with stack:
        yield prometheus


@needs_prometheus
@pytest.mark.asyncio(loop_scope="module")
async def test_every_metric_of_the_table_is_present(watched: Prometheus) -> None:
    known = offered()
    # What nobody has measured, and what only a job with privacy has.
    missing = {"fedpipe_node_link_bytes_per_second", "fedpipe_job_epsilon", "fedpipe_node_epsilon"}
    assert known - watched.names() == missing


@needs_prometheus
@pytest.mark.asyncio(loop_scope="module")
async def test_every_query_returns_data(watched: Prometheus) -> None:
    for place, expression, legend in queries():
        filled = (
            expression.replace("$namespace", ".*").replace("$job", ".*").replace("$__rate_interval", "10s")
        )
        if place.startswith("alert"):
            # Without its comparison an alert's expression must have something to compare.
            filled = re.split(r"\s[<>]\s|\s==\s", filled)[0]
        if "fedpipe_node_epsilon" in expression:
            continue  # of private jobs alone, which the watched one is not
        found = watched.query(f"last_over_time(({filled})[2m:1s])")
        assert found, f"{place}: {filled}"
        labels = set(re.findall(r"{{(\w+)}}", legend))
        assert all(labels <= set(series["metric"]) for series in found), f"{place}: {legend}"


@needs_prometheus
@pytest.mark.asyncio(loop_scope="module")
async def test_a_healthy_run_raises_no_alert(watched: Prometheus) -> None:
    for rule in rules():
        assert watched.query(f"count_over_time(({rule['expr']})[2m:1s]) > 20") == [], rule["alert"]
