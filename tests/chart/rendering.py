# SPDX-License-Identifier: Apache-2.0
"""Renders the chart with the real Helm; `python tests/chart/rendering.py` rewrites the snapshots."""

import contextlib
import difflib
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml
from helm_python import _native

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "charts/fedpipe"
SNAPSHOTS = Path(__file__).parent / "snapshots"
NAMESPACE = "fedpipe-system"
MODES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
MONITORING = tuple(
    f"monitoring.coreos.com/v1/{k}" for k in ("ServiceMonitor", "PodMonitor", "PrometheusRule")
)

# Helm's dry run asks for a cluster's address and never calls it.
_NOWHERE = """
apiVersion: v1
kind: Config
current-context: none
clusters: [{name: none, cluster: {server: "http://127.0.0.1:1"}}]
contexts: [{name: none, context: {cluster: none, user: none}}]
users: [{name: none, user: {}}]
"""

Document = dict[str, Any]


def values_of(mode: str) -> Document:
    """Return the values of a file in ci/."""
    return yaml.safe_load((CHART / f"ci/{mode}-values.yaml").read_text()) or {}


def template(
    values: Document, *, minor: int = 36, api_versions: tuple[str, ...] = MONITORING, name: str = "fedpipe"
) -> list[Document]:
    """Return every object of `helm template` for Kubernetes 1.<minor>, hooks last."""
    options = {
        "dry_run": "client",
        "namespace": NAMESPACE,
        "kube_version": f"v1.{minor}.0",
        "api_versions": list(api_versions),
    }
    with helm_python.Config(kubeconfig_content=_NOWHERE) as config, _chart() as chart:
        # The Python method install() does not hand on kube_version and api_versions; the library takes them.
        answer = _native.call_string(
            "helm_install",
            config._raw(),
            0,
            chart._raw(),
            None,
            name,
            json.dumps(values),
            json.dumps(options),
        )
        # A dry run lists no hooks; none of them depends on monitoring.
        quiet = values | {"metrics": {}}
        hooks = chart.render(quiet, name=name, namespace=NAMESPACE)
    texts = (text for path, text in sorted(hooks.items()) if not path.endswith(".txt"))
    found = [document for text in texts for document in _documents(text) if _is_hook(document)]
    return [*_documents(json.loads(answer)["manifest"]), *found]


def notes(values: Document) -> str:
    """Return what Helm says after an install."""
    with helm_python.Config(kubeconfig_content=_NOWHERE), _chart() as chart:
        files = chart.render(values, name="fedpipe", namespace=NAMESPACE)
    return next(text for path, text in files.items() if path.endswith("NOTES.txt"))


def _chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


def _documents(text: str) -> list[Document]:
    return [document for document in yaml.safe_load_all(text) if document]


def _is_hook(document: Document) -> bool:
    return "helm.sh/hook" in document["metadata"].get("annotations", {})


@cache
def rendered(mode: str) -> tuple[Document, ...]:
    """Return the objects of a mode of ci/."""
    return tuple(template(values_of(mode)))


def pods(documents: tuple[Document, ...]) -> list[tuple[str, Document]]:
    """Return the name and the Pod spec of everything that makes Pods."""
    found = []
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] == "Pod":
            found.append((document["metadata"]["name"], spec))
        elif document["kind"] in ("Deployment", "DaemonSet", "Job"):
            found.append((document["metadata"]["name"], spec["template"]["spec"]))
    return found


def snapshot(mode: str) -> str:
    """Return the default mode in full, any other as its difference from it."""
    if mode == "default":
        return _normalised(rendered(mode))
    lines = difflib.unified_diff(
        _normalised(rendered("default")).splitlines(),
        _normalised(rendered(mode)).splitlines(),
        "default", mode, n=1, lineterm="",
    )  # fmt: skip
    # Line numbers would change with every edit of what stands above.
    return "\n".join(re.sub(r"^@@ .*", "@@", line) for line in lines) + "\n"


def _normalised(documents: tuple[Document, ...]) -> str:
    """Return the objects sorted, without what every one carries and what other tests look at."""
    texts = []
    for document in documents:
        copied = json.loads(json.dumps(document))
        for labels in _every(copied, "labels"):
            for key in ("app.kubernetes.io/version", "app.kubernetes.io/managed-by", "helm.sh/chart",
                        "app.kubernetes.io/name", "app.kubernetes.io/instance"):  # fmt: skip
                labels.pop(key, None)
        if copied["kind"] == "CustomResourceDefinition":
            copied["spec"] = "(crds/)"
        if copied["kind"] == "PrometheusRule":
            copied["spec"] = "(files/rules.yaml)"
        for name in copied.get("data", {}):
            copied["data"][name] = "(dashboards/)"
        for _, spec in pods((copied,)):
            for container in spec["containers"]:
                container["args"] = [a if "\n" not in a else "(files/)" for a in container.get("args", [])]
        place = copied["metadata"].get("namespace", "")
        texts.append((copied["kind"], place, copied["metadata"]["name"], yaml.safe_dump(copied, width=120)))
    return "---\n".join(text for *_, text in sorted(texts))


def _every(value: Any, key: str) -> list[Document]:
    found = []
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key and isinstance(inner, dict):
                found.append(inner)
            found += _every(inner, key)
    elif isinstance(value, list):
        for inner in value:
            found += _every(inner, key)
    return found


if __name__ == "__main__":
    SNAPSHOTS.mkdir(exist_ok=True)
    with contextlib.suppress(IndexError):
        MODES = [sys.argv[1]]
    for known in MODES:
        (SNAPSHOTS / f"{known}.txt").write_text(snapshot(known))
