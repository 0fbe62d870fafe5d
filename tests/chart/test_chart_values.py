# SPDX-License-Identifier: Apache-2.0
"""Values: lint, a table of bad ones, and that schema, comments and README speak of the same."""

import json
import re
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import pytest
import yaml

from chart.rendering import CHART, MODES, template, values_of
from fedpipe_operator.kube.settings import AllowedStore, parse_origin

INFORMATION = 1


@pytest.mark.parametrize("mode", MODES)
def test_lint_strict(mode: str) -> None:
    report = helm_python.lint(CHART, values_of(mode), strict=True, kube_version="v1.36.0")
    assert not report["errors"]
    assert [m for m in report["messages"] if m["severity"] > INFORMATION] == []


BAD = [
    # unknown names
    ({"operatr": {}}, "operatr"),
    ({"operator": {"replicas": 2}}, "replicas"),
    ({"operator": {"image": {"name": "x"}}}, "name"),
    ({"crds": {"install": True}}, "install"),
    ({"persistence": {"storageClassName": "fast"}}, "storageClassName"),
    ({"probe": {"gpu": {"runtimeClass": "nvidia"}}}, "runtimeClass"),
    ({"metrics": {"serviceMonitor": {"enable": True}}}, "enable"),
    ({"dashboards": {"label": {}}}, "label"),
    ({"operator": {"resources": {"limit": {}}}}, "limit"),
    # wrong kinds and forms
    ({"crds": {"enabled": "yes"}}, "/crds/enabled"),
    ({"namespaces": "support"}, "/namespaces"),
    ({"namespaces": ["Support"]}, "/namespaces/0"),
    ({"namespaces": ["support", "support"]}, "/namespaces"),
    ({"imagePullSecrets": [{"name": "mirror"}]}, "/imagePullSecrets/0"),
    ({"operator": {"image": {"repository": "Fed Pipe"}}}, "repository"),
    ({"operator": {"image": {"digest": "sha256:abc"}}}, "digest"),
    ({"operator": {"image": {"pullPolicy": "Sometimes"}}}, "pullPolicy"),
    ({"operator": {"verbose": "yes"}}, "/operator/verbose"),
    ({"agent": {"image": {"pullPolicy": "Always"}}}, "pullPolicy"),
    ({"operator": {"service": {"type": "ExternalName"}}}, "/operator/service/type"),
    ({"operator": {"service": {"nodePort": 70000}}}, "nodePort"),
    ({"operator": {"coordinatorURL": "http://plain.example.com"}}, "coordinatorURL"),
    ({"operator": {"coordinatorURL": "https://a.example:99999"}}, "coordinatorURL"),
    ({"operator": {"coordinatorURL": "https://a.example:0"}}, "coordinatorURL"),
    ({"operator": {"coordinatorURL": "https://a..example"}}, "coordinatorURL"),
    ({"operator": {"coordinatorURL": "https://a-.example"}}, "coordinatorURL"),
    ({"operator": {"coordinatorURL": "https://" + "a" * 64 + ".example"}}, "coordinatorURL"),
    ({"persistence": {"size": "plenty"}}, "/persistence/size"),
    ({"metrics": {"readers": [{"namespace": "monitoring"}]}}, "name"),
    ({"metrics": {"readers": ["prometheus"]}}, "/metrics/readers/0"),
    ({"networkPolicy": {"metricsFrom": [{}]}}, "/networkPolicy/metricsFrom/0"),
    ({"networkPolicy": {"coordinatorFrom": [{"ipBlock": {}}]}}, "cidr"),
    ({"probe": {"intervalSeconds": 0}}, "intervalSeconds"),
    ({"probe": {"heartbeatSeconds": 150}}, "heartbeatSeconds"),
    ({"probe": {"measureLink": "yes"}}, "/probe/measureLink"),
    ({"probe": {"tolerations": [{"effect": "Never"}]}}, "effect"),
    ({"modelCache": {"hostPath": "cache"}}, "hostPath"),
    ({"agent": {"policyDirectory": "etc"}}, "policyDirectory"),
    ({"agent": {"budgetDirectory": "/srv/budget"}}, "set agent.policyDirectory too"),
    ({"modelCache": {"hostPath": "/var/../etc/{x}"}}, "hostPath"),
    ({"output": {"allow": []}}, "allow"),
    ({"tracking": {"allowed": ["mlflow:5000"]}}, "/tracking/allowed/0"),
    ({"tracking": {"allowed": ["http://mlflow:5000/path"]}}, "/tracking/allowed/0"),
    ({"tracking": {"allowed": ["file:///runs"]}}, "/tracking/allowed/0"),
    ({"output": {"allowed": ["s3://adapters"]}}, "/output/allowed/0"),
    ({"output": {"allowed": [{"endpoint": "https://a"}]}}, "/output/allowed/0"),
    ({"output": {"allowed": [{"prefix": "file:///"}]}}, "/output/allowed/0/prefix"),
    ({"output": {"allowed": [{"prefix": "s3://adapters/../x"}]}}, "prefix"),
    ({"output": {"allowed": [{"prefix": "s3://adapters", "endpoint": "minio:9000"}]}}, "/output/allowed/0/endpoint"),
    ({"output": {"allowed": [{"prefix": "gs://adapters", "endpoint": "https://a"}]}}, "output.allowed: gs:// has no endpoint"),
    ({"metrics": {"podMonitor": {"interval": "30"}}}, "interval"),
    ({"metrics": {"rules": {"labels": {"release": 1}}}}, "release"),
    ({"networkPolicy": {"metricsFrom": [{"namespace": "x"}]}}, "metricsFrom"),
    ({"networkPolicy": {"metricsFrom": [{}]}}, "metricsFrom"),
    # contradictions
    ({"metrics": {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}}, "enable one of them"),
    ({"persistence": {"enabled": False, "existingClaim": "store"}}, "persistence.existingClaim is store but"),
    ({"persistence": {"storageClass": "fast", "existingClaim": "store"}}, "clear one of them"),
    ({"operator": {"service": {"nodePort": 30843}}}, "needs operator.service.type NodePort, not ClusterIP"),
    ({"probe": {"heartbeatSeconds": 600}}, "heartbeatSeconds"),
    ({"probe": {"intervalSeconds": 60, "heartbeatSeconds": 30}}, "must not be above probe.heartbeatSeconds"),
    ({"agent": {"image": {"tag": "1", "digest": "sha256:" + "0" * 64}}}, "give tag or digest, not both"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_value_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(helm_python.HelmError) as refusal:
        template(values)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    ["https://a", f"https://{'a' * 63}.example:65535", "https://10.0.0.1:8443", "https://a-b.example:1"],
)
def test_a_coordinator_url_is_taken(url: str) -> None:
    assert template({"operator": {"coordinatorURL": url}})


def test_allowed_stores_reach_the_operator() -> None:
    allowed = [
        {"prefix": "s3://"},
        {"prefix": "s3://adapters/team-a", "endpoint": "https://minio.example:9000"},
        {"prefix": "gs://adapters"},
        {"prefix": "az://account/models/x"},
    ]
    rendered = yaml.safe_dump_all(template({"output": {"allowed": allowed}}))
    allowances = re.findall(r"--output-allow=(\S+)", rendered)
    assert allowances == [",".join(entry.values()) for entry in allowed]
    assert [AllowedStore.parse(text).endpoint for text in allowances] == [
        entry.get("endpoint") for entry in allowed
    ]
    assert "--output-allow" not in yaml.safe_dump_all(template({}))


def test_mlflow_servers_reach_the_operator_as_it_reads_them() -> None:
    allowed = ["http://mlflow.ml.svc:5000", "https://mlflow.lab"]
    rendered = yaml.safe_dump_all(template({"tracking": {"allowed": allowed}}))
    found = re.findall(r"--tracking-allow=(\S+)", rendered)
    assert [parse_origin(origin) for origin in found] == allowed
    assert "--tracking-allow" not in yaml.safe_dump_all(template({}))


def test_every_value_has_a_comment_and_a_place_in_the_schema() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    lines = (CHART / "values.yaml").read_text().splitlines()
    path: list[str] = []
    seen = 0
    for before, line in zip(["", *lines], lines, strict=False):
        if not (match := re.fullmatch(r"( *)([A-Za-z]+):(.*)", line)) or line.lstrip().startswith("#"):
            continue
        path = [*path[: len(match[1]) // 2], match[2]]
        if path[-2:-1] == ["resources"]:
            continue  # Kubernetes' own
        seen += 1
        node = schema
        for name in path:
            if "$ref" in node:
                node = schema["definitions"][node["$ref"].rsplit("/", 1)[1]]
            assert name in node["properties"], f"{'.'.join(path)} is not in the schema"
            node = node["properties"][name]
        if match[3].strip():
            assert before.strip().startswith("#"), f"{'.'.join(path)} has no comment"
    assert seen > 60


def test_the_schema_knows_no_value_that_does_not_exist() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())

    def walk(node: dict[str, Any], value: Any, path: str) -> None:
        if "$ref" in node:
            kind = node["$ref"].rsplit("/", 1)[1]
            node = schema["definitions"][kind]
            if kind in ("resources", "strings", "affinity"):
                return
        for name, inner in node.get("properties", {}).items():
            if f"{path}{name}" == "global":
                continue
            assert name in value, f"{path}{name} has no default"
            walk(inner, value[name], f"{path}{name}.")

    walk(schema, defaults, "")


def test_the_package_carries_what_it_needs_and_no_more(tmp_path: Path) -> None:
    archive = Path(helm_python.package(CHART, destination=tmp_path))
    assert archive.stat().st_size < 200_000
    with helm_python.Chart.load(archive) as chart:
        names = {file["name"] for file in chart.files}
    assert {"files/crds/fedpipe.io_fedpipejobs.yaml", "files/cleanup.py", "files/smoke.py"} <= names
    assert not [name for name in names if name.startswith("ci/") or name.endswith(".png")]
