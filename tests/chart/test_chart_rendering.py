# SPDX-License-Identifier: Apache-2.0
"""What the chart makes of its values: snapshots, validity for each Kubernetes, Pod Security, rights."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from chart.rendering import (
    CHART,
    MODES,
    MONITORING,
    NAMESPACE,
    REPOSITORY,
    SNAPSHOTS,
    notes,
    pods,
    rendered,
    snapshot,
    template,
    values_of,
)
from fedpipe_operator.kube.settings import OperatorSettings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import kubernetes_validate

MINORS = range(31, 37)
PROMETHEUS = {"namespace": "monitoring", "name": "prometheus-k8s"}
MONITORING_PODS = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}


@pytest.mark.parametrize("mode", MODES)
def test_snapshot(mode: str) -> None:
    known = (SNAPSHOTS / f"{mode}.txt").read_text()
    assert snapshot(mode) == known, "if this is meant: python tests/chart/rendering.py"


@pytest.mark.parametrize("minor", MINORS)
def test_every_object_is_valid_for_each_kubernetes(minor: int) -> None:
    distinct = {json.dumps(document) for mode in MODES for document in rendered(mode)}
    for document in map(json.loads, sorted(distinct)):
        if f"{document['apiVersion']}/{document['kind']}" in MONITORING:
            continue  # kinds of the Prometheus operator, which Kubernetes' own schemas do not hold
        kubernetes_validate.validate(document, f"1.{minor}", strict=True)


@pytest.mark.parametrize("minor", [min(MINORS), max(MINORS)])
def test_the_oldest_and_the_newest_kubernetes_get_the_same(minor: int) -> None:
    assert template({}, minor=minor) == list(rendered("default"))


def test_an_older_kubernetes_is_refused() -> None:
    with pytest.raises(Exception, match=r"requires kubeVersion: >=1\.31\.0-0"):
        template({}, minor=30)


@pytest.mark.parametrize(
    "file",
    [
        "README.md",
        "charts/fedpipe/README.md",
        "charts/fedpipe/templates/probe/admissionpolicy.yaml",
        "edge-agent/README.md",
    ],
)
def test_every_text_asks_for_the_same_kubernetes(file: str) -> None:
    named = re.findall(r"Kubernetes (1\.\d+)(?: or later| to 1)", (REPOSITORY / file).read_text())
    assert set(named) == {f"1.{min(MINORS)}"}


@pytest.mark.parametrize("mode", MODES)
def test_pods_keep_pod_security_restricted(mode: str) -> None:
    values = values_of(mode)
    cached = bool(values.get("modelCache", {}).get("hostPath"))
    privileged = bool(values.get("probe", {}).get("gpu", {}).get("privileged"))
    for name, spec in pods(rendered(mode)):
        allowed = set()
        if "-probe" in name and cached:
            allowed.add("volume cache: hostPath")
        if name.endswith("-probe-gpu") and privileged:
            allowed |= {
                "privileged",
                "allowPrivilegeEscalation",
                "capabilities",
                "runAsNonRoot",
                "runAsUser 0",
            }
        assert breaches(spec) == allowed, name


def breaches(spec: dict[str, Any]) -> set[str]:
    """Return what keeps a Pod spec from Pod Security "restricted", as the standard words its controls."""
    found = {field for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)}
    outer = spec.get("securityContext", {})
    plain = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected",
             "secret"}  # fmt: skip
    for volume in spec.get("volumes", []):
        found |= {f"volume {volume['name']}: {kind}" for kind in set(volume) - {"name"} - plain}
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        inner = container.get("securityContext", {})
        merged = outer | inner
        capabilities = inner.get("capabilities", {})
        checks = {
            "privileged": not inner.get("privileged"),
            "allowPrivilegeEscalation": inner.get("allowPrivilegeEscalation") is False,
            "capabilities": "ALL" in capabilities.get("drop", [])
            and set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "runAsNonRoot": merged.get("runAsNonRoot") is True,
            "runAsUser 0": merged.get("runAsUser") != 0,
            "seccompProfile": merged.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
            "procMount": inner.get("procMount", "Default") == "Default",
            "seLinux": "seLinuxOptions" not in merged,
            "sysctls": not outer.get("sysctls"),
            # Beyond the standard, FedPipe's own:
            "readOnlyRootFilesystem": inner.get("readOnlyRootFilesystem") is True,
        }
        found |= {control for control, kept in checks.items() if not kept}
        assert container["resources"]["limits"]["memory"]
    return found


@pytest.mark.parametrize("mode", MODES)
def test_rights_are_named(mode: str) -> None:
    roles = [d for d in rendered(mode) if d["kind"] in ("Role", "ClusterRole")]
    assert roles
    for role in roles:
        for rule in role["rules"]:
            named = {name for field in rule.values() for name in field}
            assert not [name for name in named if "*" in name], role["metadata"]["name"]
            assert not {"bind", "escalate", "impersonate"} & set(rule["verbs"])


def test_namespaced_rights_end_at_the_namespaces() -> None:
    bindings = [d for d in rendered("namespaced") if d["kind"] == "ClusterRoleBinding"]
    reach = {b["roleRef"]["name"] for b in bindings}
    roles = {d["metadata"]["name"]: d for d in rendered("namespaced") if d["kind"] == "ClusterRole"}
    resources = {r for name in reach for rule in roles[name]["rules"] for r in rule.get("resources", ())}
    assert not resources & {"pods", "secrets", "configmaps", "fedpipejobs", "fedpipejobs/status", "events"}
    places = {
        d["metadata"]["namespace"]
        for d in rendered("namespaced")
        if d["kind"] == "RoleBinding" and d["roleRef"]["name"] == "fedpipe-operator-jobs"
    }
    assert places == {"support", "research"}


@pytest.mark.parametrize("mode", MODES)
def test_selectors_find_the_pods_they_mean(mode: str) -> None:
    documents = rendered(mode)
    made = {}
    for document in documents:
        if document["kind"] in ("Deployment", "DaemonSet"):
            meta = document["spec"]["template"]["metadata"]
            assert document["spec"]["selector"]["matchLabels"].items() <= meta["labels"].items()
            made[document["metadata"]["name"]] = meta["labels"]
            ports = {
                p["name"] for c in document["spec"]["template"]["spec"]["containers"] for p in c["ports"]
            }
            made[document["metadata"]["name"] + "/ports"] = ports
    for service in (d for d in documents if d["kind"] == "Service"):
        selected = [
            name
            for name, labels in made.items()
            if isinstance(labels, dict) and service["spec"]["selector"].items() <= labels.items()
        ]
        assert selected, service["metadata"]["name"]
        for name in selected:
            assert {p["targetPort"] for p in service["spec"]["ports"]} <= made[f"{name}/ports"]
    monitored = [
        d for d in documents if d["kind"] == "Service" and d["metadata"]["labels"].get("fedpipe.io/metrics")
    ]
    for monitor in (d for d in documents if d["kind"] == "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        assert sum(wanted <= s["metadata"]["labels"].items() for s in monitored) == 2
        assert all(e["honorLabels"] for e in monitor["spec"]["endpoints"])


@pytest.mark.parametrize("name", ["fedpipejobs", "fedpipenodes"])
def test_the_charts_definitions_are_the_contracts(name: str) -> None:
    source = (REPOSITORY / f"crds/fedpipe.io_{name}.yaml").read_text()
    copy = (CHART / f"files/crds/fedpipe.io_{name}.yaml").read_text()
    assert copy == source, "run `make generate`"
    for keep in (True, False):
        found = template({"crds": {"keep": keep}})
        [definition] = [d for d in found if d["metadata"]["name"] == f"{name}.fedpipe.io"]
        annotations = definition["metadata"].pop("annotations", {})
        assert definition == yaml.safe_load(source)
        assert annotations == ({"helm.sh/resource-policy": "keep"} if keep else {})


@pytest.mark.parametrize(
    ("file", "document"),
    [("operator-cluster-rules", 0), ("operator-jobs-rules", 1), ("operator-own-rules", 2)],
)
def test_the_operators_rights_are_those_its_own_tests_run_with(file: str, document: int) -> None:
    roles = list(yaml.safe_load_all((REPOSITORY / "tests/kube/rbac.yaml").read_text()))
    assert yaml.safe_load((CHART / f"files/{file}.yaml").read_text()) == roles[document]["rules"]


def test_the_probes_rights_and_policy_are_those_its_own_tests_run_with() -> None:
    text = (REPOSITORY / "tests/nvml/admission.yaml").read_text().replace("default", NAMESPACE)
    tested = {(d["kind"], d["metadata"]["name"]): d for d in yaml.safe_load_all(text)}
    ours = {(d["kind"], d["metadata"]["name"]): d for d in rendered("default")}
    for key, document in tested.items():
        for part in ("rules", "roleRef", "subjects", "spec", "automountServiceAccountToken"):
            assert ours[key].get(part) == document.get(part), (key, part)


@pytest.mark.parametrize(
    ("values", "coordinator"),
    [
        ({}, f"https://edge-fedpipe.{NAMESPACE}.svc:8443"),
        ({"namespaces": ["support"]}, f"https://edge-fedpipe.{NAMESPACE}.svc:8443"),
        (
            {"operator": {"coordinatorURL": "https://a.example:1", "tls": {"existingSecret": "own"}}},
            "https://a.example:1",
        ),
    ],
)
def test_probes_that_measure_the_link_trust_what_the_operator_may_write(
    values: dict[str, Any], coordinator: str
) -> None:
    documents = template(values | {"probe": {"measureLink": True}}, name="edge")
    specs = dict(pods(tuple(documents)))
    probe, operator = specs["edge-fedpipe-probe"], specs["edge-fedpipe-operator"]
    arguments = probe["containers"][0]["args"]
    assert f"--coordinator={coordinator}/v1/link" in arguments
    [mount], [volume] = probe["containers"][0]["volumeMounts"], probe["volumes"]
    assert f"--ca-file={mount['mountPath']}/ca.crt" in arguments
    name = volume["configMap"]["name"]
    assert f"--ca-configmap={name}" in operator["containers"][0]["args"]
    found = {(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]): d for d in documents}
    assert ("ConfigMap", NAMESPACE, name) in found
    role = found["Role", NAMESPACE, "edge-fedpipe-operator"]
    rights = [rule for rule in role["rules"] if "configmaps" in rule["resources"]]
    assert rights == [
        {
            "apiGroups": [""],
            "resources": ["configmaps"],
            "resourceNames": [name],
            "verbs": ["create", "patch"],
        }
    ]


def test_no_link_is_measured_unasked() -> None:
    for values in ({}, {"probe": {"measureLink": True, "enabled": False}}):
        text = json.dumps(template(values))
        assert "/var/run/fedpipe" not in text
        assert "/v1/link" not in text


def test_one_monitor_never_both_and_none_without_its_kind() -> None:
    monitors = {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}
    both = {"metrics": {"readers": [PROMETHEUS]} | monitors}
    with pytest.raises(Exception, match="scrape everything twice"):
        template(both)
    for value, kind in zip(("serviceMonitor", "podMonitor", "rules"), MONITORING, strict=True):
        with pytest.raises(Exception, match=f"metrics.{value}.enabled needs the Prometheus operator.*{kind}"):
            template({"metrics": {"readers": [PROMETHEUS], value: {"enabled": True}}}, api_versions=())
    for value in monitors:
        with pytest.raises(Exception, match="so Prometheus would be refused"):
            template({"metrics": {value: {"enabled": True}}})


def test_metrics_are_closed_to_all_but_their_readers() -> None:
    for values, peers in (
        ({}, []),
        ({"metrics": {"readers": [PROMETHEUS, PROMETHEUS | {"name": "agent"}]}}, [MONITORING_PODS]),
        ({"networkPolicy": {"metricsFrom": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]}},
         [{"ipBlock": {"cidr": "192.0.2.0/24"}}]),
    ):  # fmt: skip
        found = {(d["kind"], d["metadata"]["name"]): d for d in template(values)}
        [agents, scrapes] = found["NetworkPolicy", "fedpipe-operator"]["spec"]["ingress"]
        assert [port["port"] for port in agents["ports"]] == ["coordinator"]
        smoke, *others = scrapes["from"]
        assert smoke["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "smoke"
        assert others == peers
        probe = found["NetworkPolicy", "fedpipe-probe"]["spec"]
        assert probe["policyTypes"] == ["Ingress"]
        assert [rule["from"] for rule in probe.get("ingress", [])] == ([peers] if peers else [])
        bound = found.get(("ClusterRoleBinding", "fedpipe-metrics-reader"), {}).get("subjects", [])
        given = values.get("metrics", {}).get("readers", [])
        assert [{"namespace": s["namespace"], "name": s["name"]} for s in bound] == given


@pytest.mark.parametrize("mode", ["prometheus", "podmonitor", "existing-tls"])
def test_a_scrape_checks_the_operators_certificate_and_sends_a_token(mode: str) -> None:
    values = values_of(mode) | {
        "metrics": values_of(mode).get("metrics", {"serviceMonitor": {"enabled": True}})
    }
    values["metrics"]["readers"] = [PROMETHEUS]
    documents = template(values)
    [monitor] = [d["spec"] for d in documents if d["kind"] in ("ServiceMonitor", "PodMonitor")]
    secure, plain = monitor.get("endpoints") or monitor["podMetricsEndpoints"]
    assert plain["port"] == "metrics", "the probe's"
    assert (secure["port"], secure["scheme"]) == ("https-metrics", "https")
    assert "insecureSkipVerify" not in secure["tlsConfig"]
    host = "fedpipe.example.com" if mode == "existing-tls" else f"fedpipe.{NAMESPACE}.svc"
    assert secure["tlsConfig"]["serverName"] == host
    authority = secure["tlsConfig"]["ca"]["configMap"]["name"]
    made = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    assert ("ConfigMap", authority) in made
    if "bearerTokenFile" not in secure:
        secret = made["Secret", secure["authorization"]["credentials"]["name"]]
        account = secret["metadata"]["annotations"]["kubernetes.io/service-account.name"]
        subjects = made["ClusterRoleBinding", "fedpipe-metrics-reader"]["subjects"]
        assert {"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE} in subjects


def test_viewers_do_not_read_adapters() -> None:
    roles = {d["metadata"]["name"]: d for d in rendered("namespaced") if d["kind"] == "ClusterRole"}
    reading = [
        name for name, role in roles.items()
        if any("fedpipejobs/adapter" in rule.get("resources", ()) for rule in role["rules"])
    ]  # fmt: skip
    assert reading == ["fedpipe-adapter-reader"]
    labels = roles["fedpipe-adapter-reader"]["metadata"]["labels"]
    prefix = "rbac.authorization.k8s.io/aggregate-to-"
    assert {label.removeprefix(prefix) for label in labels if label.startswith(prefix)} == {"edit", "admin"}


def test_everybody_is_led_to_the_coordinator_and_nowhere_else() -> None:
    found = {(d["kind"], d["metadata"]["name"]): d for d in template({}, name="edge")}
    [rule] = found["Role", "edge-fedpipe-adapter-proxy"]["rules"]
    assert (rule["resourceNames"], rule["verbs"]) == (["https:edge-fedpipe:coordinator"], ["get"])
    [port] = found["Service", "edge-fedpipe"]["spec"]["ports"]
    assert port["name"] == "coordinator"


def test_a_wide_install_says_what_it_risks() -> None:
    for values, warned in (({}, True), ({"namespaces": ["support"]}, False)):
        assert ("can create Pods in every namespace" in notes(values)) == warned


def test_the_operator_may_write_the_secret_that_it_keeps_its_certificate_in() -> None:
    documents = template({}, name="edge")
    [operator] = [spec for name, spec in pods(tuple(documents)) if name.endswith("-operator")]
    service = next(a for a in operator["containers"][0]["args"] if a.startswith("--service="))
    named = OperatorSettings(NAMESPACE, service.removeprefix("--service="), Path("/"), "", "").own_tls_secret
    rules = [rule for d in documents if d["kind"] == "Role" for rule in d["rules"]]
    kept = [rule for rule in rules if "secrets" in rule["resources"] and "patch" in rule["verbs"]]
    assert [rule["resourceNames"] for rule in kept] == [[named]]


def test_two_releases_do_not_share_names() -> None:
    first = {
        (d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in template({}, name="a")
    }
    second = {
        (d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in template({}, name="b")
    }
    assert {kind for kind, *_ in first & second} == {"CustomResourceDefinition"}


def test_a_long_release_name_keeps_names_valid() -> None:
    for document in template(values_of("gpu-nodes"), name="a" * 53):
        assert len(document["metadata"]["name"]) <= 63
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", document["metadata"]["name"])
