# SPDX-License-Identifier: Apache-2.0
"""Plays the kubelet for Helm's hooks: runs the container of a hook's Job or Pod as a process of this machine."""

import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

from kube.controlplane import ControlPlane

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
NOW = "2026-01-01T00:00:00Z"


class HookRunner:
    """Runs hooks of a namespace while the block lasts, each with its ServiceAccount's real token."""

    def __init__(self, plane: ControlPlane, namespace: str, names: dict[str, str] | None = None) -> None:
        self._plane = plane
        self._namespace = namespace
        self._names = names or {}
        """What the cluster's DNS would answer: name and port of a Service to an address of this machine."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.ran: dict[str, subprocess.CompletedProcess[str]] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        jobs = f"/apis/batch/v1/namespaces/{self._namespace}/jobs"
        pods = f"/api/v1/namespaces/{self._namespace}/pods"
        while not self._over.wait(0.1):
            for job in self._plane.request("GET", jobs)[1]["items"]:
                if job["metadata"]["uid"] not in self.ran:
                    done = self._execute(job["metadata"], job["spec"]["template"]["spec"])
                    self._finish(
                        f"{jobs}/{job['metadata']['name']}/status", _job_status(done.returncode == 0)
                    )
            for pod in self._plane.request("GET", pods)[1]["items"]:
                hooked = "helm.sh/hook" in pod["metadata"].get("annotations", {})
                if hooked and pod["metadata"]["uid"] not in self.ran:
                    done = self._execute(pod["metadata"], pod["spec"])
                    phase = "Succeeded" if done.returncode == 0 else "Failed"
                    self._finish(f"{pods}/{pod['metadata']['name']}/status", {"phase": phase})

    def _finish(self, path: str, status: dict[str, Any]) -> None:
        code, answer = self._plane.request("PATCH", path, {"status": status}, "application/merge-patch+json")
        assert code == 200, answer

    def _execute(self, meta: dict[str, Any], spec: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        [container] = spec["containers"]
        host, port = self._plane.url.removeprefix("https://").split(":")
        with tempfile.TemporaryDirectory() as folder:
            environment = {e["name"]: e["value"] for e in container.get("env", [])}
            if spec.get("automountServiceAccountToken"):
                environment |= {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
                Path(folder, "token").write_text(
                    token(self._plane, self._namespace, spec["serviceAccountName"])
                )
                Path(folder, "ca.crt").write_text(self._plane.ca.read_text())
            arguments = []
            for argument in container["args"]:
                local = argument
                for name, address in (self._names | {ACCOUNT: folder}).items():
                    local = local.replace(name, address)
                arguments.append(local)
            assert container["command"] == ["python", "-c"]
            command = [sys.executable, "-I", "-c", *arguments]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=60, check=False
            )
        self.ran[meta["uid"]] = done
        return done


def token(plane: ControlPlane, namespace: str, account: str, **bound: str) -> str:
    """Return a real token of a ServiceAccount; `bound` is the reference of a Pod it is bound to."""
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
    spec = {"expirationSeconds": 3600}
    if bound:
        spec["boundObjectRef"] = {"kind": "Pod", "apiVersion": "v1"} | bound
    code, answer = plane.request("POST", path, {"apiVersion": "authentication.k8s.io/v1",
                                                "kind": "TokenRequest", "spec": spec})  # fmt: skip
    assert code == 201, answer
    return str(answer["status"]["token"])


def _job_status(succeeded: bool) -> dict[str, Any]:
    kinds = ("SuccessCriteriaMet", "Complete") if succeeded else ("FailureTarget", "Failed")
    conditions = [{"type": kind, "status": "True", "lastTransitionTime": NOW} for kind in kinds]
    times = {"startTime": NOW} | ({"completionTime": NOW, "succeeded": 1} if succeeded else {"failed": 1})
    return times | {"conditions": conditions}
