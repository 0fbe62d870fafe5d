# SPDX-License-Identifier: Apache-2.0
"""A cluster for tests: namespaces, nodes, kubelets, and the operator as a process with its own rights."""

import base64
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import yaml

from fedpipe_api.names import (
    ADAPTER_AUDIENCE,
    ADAPTER_READER,
    ADAPTER_SUBRESOURCE,
    GROUP,
    JOBS,
    NODES,
    VERSION,
)
from kube import forked_operator
from kube.controlplane import ControlPlane
from kube.kubelet import Kubelet, Start
from kube.objects import stamp
from kube.pod_process import ENVIRONMENT, stand_in_agent
from kube.proxy import pipe
from standins.forked import Forked

HERE = Path(__file__).resolve().parent
CUSTOM = f"/apis/{GROUP}/{VERSION}"
RBAC = "/apis/rbac.authorization.k8s.io/v1"


def taking(seconds: float) -> dict[str, Any]:
    """Return a podTemplate with which stand-in agents take so long to train."""
    variable = {"name": "STAND_IN_SECONDS", "value": str(seconds)}
    return {"spec": {"containers": [{"name": "agent", "env": [variable]}]}}


def free_port() -> int:
    """Return a port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """One test's share of the control plane. `name` makes its names unique."""

    def __init__(self, plane: ControlPlane, name: str, directory: Path) -> None:
        self.plane = plane
        self.name = name
        self.namespace = f"{name}-jobs"
        self.own = f"{name}-fedpipe"
        self.directory = directory
        self.coordinator_port = free_port()
        self.health_port = free_port()
        self.metrics_port = free_port()
        self.api_url: str | None = None
        """Where the operator finds the API server, if not at the control plane itself."""
        self.program: list[str] | None = None
        """What is run as the operator, if not one that is forked and so begins at once."""
        self.periods: dict[str, float] = {}
        """Constants of the forked operator by their full names, for tests that would wait for minutes."""
        self.operator: Forked | subprocess.Popen[bytes] | None = None
        self.kubelet: Kubelet | None = None
        self._nodes: list[str] = []
        self._listeners: list[socket.socket] = []
        self._set_up()

    def _set_up(self) -> None:
        for kind in (f"{CUSTOM}/{NODES}", "/api/v1/nodes"):
            # They belong to no namespace, and tests of before may have left some.
            status, answer = self.plane.request("DELETE", kind)
            assert status == 200, answer
        self.create("/api/v1/namespaces", {"metadata": {"name": self.own}})
        self.add_account(self.own, "operator")
        for role in yaml.safe_load_all((HERE / "rbac.yaml").read_text()):
            role["metadata"]["name"] += f"-{self.name}"
            self.create(f"{RBAC}/clusterroles", role)
        self._bind(f"fedpipe-operator-{self.name}", self.own, "operator")
        self._bind(f"fedpipe-operator-own-{self.name}", self.own, "operator", self.own)
        # What the chart brings for those who read.
        self.add_account(self.own, "prometheus")
        self.allow(self.own, "prometheus", {"nonResourceURLs": ["/metrics"], "verbs": ["get"]})
        self.add_tenant(self.namespace)

    def add_tenant(self, namespace: str) -> None:
        """Create a namespace of jobs as the chart prepares it; the operator watches it if asked to."""
        self.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
        self._bind(f"fedpipe-operator-jobs-{self.name}", self.own, "operator", namespace)
        for account in ("default", ADAPTER_READER):
            self.add_account(namespace, account)
        rule = {"apiGroups": [GROUP], "resources": [f"{JOBS}/{ADAPTER_SUBRESOURCE}"], "verbs": ["get"]}
        self.allow(namespace, ADAPTER_READER, rule, within=namespace)

    def add_account(self, namespace: str, name: str) -> None:
        """Create a ServiceAccount."""
        self.create(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": name}})

    def allow(self, namespace: str, account: str, *rules: dict[str, Any], within: str | None = None) -> None:
        """Give a ServiceAccount rights within a namespace, without one in the whole cluster."""
        role = f"{namespace}-{account}-{within or 'cluster'}"
        self.create(f"{RBAC}/clusterroles", {"metadata": {"name": role}, "rules": list(rules)})
        self._bind(role, namespace, account, within)

    def token(self, namespace: str, account: str, **spec: Any) -> str:
        """Return a token of a ServiceAccount; keyword arguments become fields of the TokenRequest's spec."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        return str(self.create(path, body)["status"]["token"])

    def _bind(self, role: str, namespace: str, account: str, within: str | None = None) -> None:
        subject = {"kind": "ServiceAccount", "name": account, "namespace": namespace}
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role}
        body = {"metadata": {"name": role}, "subjects": [subject], "roleRef": reference}
        path = f"namespaces/{within}/rolebindings" if within else "clusterrolebindings"
        self.create(f"{RBAC}/{path}", body)

    def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Create an object as the administrator."""
        status, answer = self.plane.request("POST", path, body)
        assert status == 201, answer
        return dict(answer)

    # Nodes

    def add_node(self, name: str, *, gpus: int = 0, **labels: str) -> str:
        """Create a Node and its FedPipeNode; return the full name."""
        full = f"{self.name}-{name}"
        labels = {"site": self.name} | labels
        node = {"metadata": {"name": full, "labels": labels}}
        self.create("/api/v1/nodes", node)
        allocatable = {"cpu": "4", "memory": "8Gi", "pods": "110"}
        if gpus:
            allocatable["nvidia.com/gpu"] = str(gpus)
        status = {
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": ""}],
            "allocatable": allocatable,
            "capacity": allocatable,
        }
        # A new Node has the taint not-ready, which the node controller would take away.
        self.patch(f"/api/v1/nodes/{full}", {"spec": {"taints": None}})
        self.patch(f"/api/v1/nodes/{full}/status", {"status": status})
        self.create(f"{CUSTOM}/{NODES}", _custom("FedPipeNode", {"name": full}))
        self.report(full, gpus=gpus)
        self._nodes.append(full)
        return full

    def report(self, full: str, *, gpus: int = 0, age: float = 0.0) -> None:
        """Play the probe of a node."""
        at = stamp(time.time() - age)
        ready = {
            "type": "Ready",
            "status": "True",
            "reason": "CpuOnly",
            "message": "",
            "lastTransitionTime": at,
        }
        devices = [{"uuid": f"GPU-{i}", "name": "T4", "totalMemory": 16 << 30} for i in range(gpus)]
        cpu = {"cores": 4, "totalMemory": 8 << 30, "freeMemory": 6 << 30}
        status = {"observedAt": at, "conditions": [ready], "devices": devices, "cpu": cpu}
        self.patch(f"{CUSTOM}/{NODES}/{full}/status", {"status": status})

    def drop_node(self, full: str) -> None:
        """Let a node vanish, as a cloud does it: no kubelet, no Node, no FedPipeNode."""
        assert self.kubelet is not None
        self.kubelet.dead.add(full)
        for process in (p for node, p in self.kubelet.agents().items() if node == full):
            process.kill()
            process.wait()
        self.plane.request("DELETE", f"/api/v1/nodes/{full}")
        self.plane.request("DELETE", f"{CUSTOM}/{NODES}/{full}")

    def patch(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Merge-patch an object as the administrator."""
        status, answer = self.plane.request("PATCH", path, body, "application/merge-patch+json")
        assert status == 200, answer
        return dict(answer)

    # Jobs and Pods

    def job_path(self, name: str = "") -> str:
        """Return the path of a job, or of all."""
        return f"{CUSTOM}/namespaces/{self.namespace}/{JOBS}" + (f"/{name}" if name else "")

    def submit(self, name: str = "tickets", **spec: Any) -> dict[str, Any]:
        """Create a job over this cluster's nodes."""
        base = {
            "model": {
                "hostPath": {"path": "/srv/model"},
                "task": "sequence-classification",
                "labels": ["a", "b", "c"],
            },
            "data": {"volume": {"hostPath": {"path": "/srv/data"}}, "train": "train.jsonl"},
            "nodes": {"selector": {"matchLabels": {"site": self.name}}, "min": 2},
            "rounds": {"count": 3, "localSteps": 2, "minUpdates": 2, "deadline": "5m"},
            "adapter": {"ranks": {"min": 2, "max": 4}},
        }
        return self.create(self.job_path(), _custom("FedPipeJob", {"name": name}, base | spec))

    def job(self, name: str = "tickets") -> dict[str, Any] | None:
        """Return a job, None when it is gone."""
        status, answer = self.plane.request("GET", self.job_path(name))
        return dict(answer) if status == 200 else None

    def status(self, name: str = "tickets") -> dict[str, Any]:
        """Return a job's status, empty before there is one."""
        found = self.job(name)
        return dict(found.get("status") or {}) if found else {}

    def condition(self, kind: str, name: str = "tickets") -> tuple[str, str, str]:
        """Return status, reason and message of a job's condition."""
        found = next((c for c in self.status(name).get("conditions", ()) if c["type"] == kind), {})
        return found.get("status", ""), found.get("reason", ""), found.get("message", "")

    def pods(self) -> dict[str, dict[str, Any]]:
        """Return the Pods by name."""
        _, found = self.plane.request("GET", f"/api/v1/namespaces/{self.namespace}/pods")
        return {pod["metadata"]["name"]: pod for pod in found["items"]}

    def events(self, name: str = "tickets") -> list[tuple[str, str]]:
        """Return (reason, message) of a job's Events."""
        _, found = self.plane.request("GET", f"/api/v1/namespaces/{self.namespace}/events")
        mine = [e for e in found["items"] if e["involvedObject"]["name"] == name]
        return [(event["reason"], event["message"]) for event in mine]

    def wait(self, what: str, holds: Callable[[], Any], seconds: float = 60) -> Any:
        """Wait until something holds and return it."""
        until = time.monotonic() + seconds
        while True:
            found = holds()
            if found:
                return found
            if time.monotonic() > until:
                jobs = self.plane.request("GET", self.job_path())[1]["items"]
                found = {job["metadata"]["name"]: job.get("status") for job in jobs}
                raise AssertionError(f"{what}: not in {seconds} s\n{found}\n{self.log()}")
            time.sleep(0.1)

    def wait_phase(self, phase: str, name: str = "tickets", seconds: float = 60) -> dict[str, Any]:
        """Wait for a job's phase and return its status."""
        self.wait(f"{name} {phase}", lambda: self.status(name).get("phase") == phase, seconds)
        return self.status(name)

    # Processes

    def start_kubelet(self, start: Start = stand_in_agent) -> Kubelet:
        """Start playing the nodes."""
        pods = self.directory / "pods"
        self.kubelet = Kubelet(self.plane, self.namespace, start, pods, any_node=self._nodes[0])
        return self.kubelet

    @contextmanager
    def running(self, *arguments: str) -> Iterator[Self]:
        """Run kubelets and the operator; tear everything down at the end."""
        try:
            self.start_kubelet()
            self.start_operator(*arguments)
            yield self
        finally:
            self.tear_down()

    def start_operator(self, *more: str) -> None:
        """Run the operator with its ServiceAccount's own token; returns when it is ready."""
        self.launch_operator(*more)
        self.wait("operator ready", lambda: self.get("/readyz") is not None)

    def launch_operator(self, *more: str) -> None:
        """Run the operator, whatever becomes of it."""
        token = self.token(self.own, "operator")
        kubeconfig = self.plane.kubeconfig_for(f"operator-{self.name}", token)
        if self.api_url is not None:
            config = yaml.safe_load(kubeconfig.read_text())
            config["clusters"][0]["cluster"] = {"server": self.api_url}
            kubeconfig.write_text(yaml.safe_dump(config))
        arguments = [
            "run", "--store", str(self.directory / "store"), "--namespace", self.own,
            "--agent-image", "agent:1", "--operator-image", "operator:1", "--watch", self.namespace,
            "--host", "127.0.0.1", "--coordinator-port", str(self.coordinator_port),
            "--health-port", str(self.health_port), "--metrics-port", str(self.metrics_port),
            "--coordinator-url", f"https://127.0.0.1:{self.coordinator_port}", *more,
        ]  # fmt: skip
        environment = os.environ | ENVIRONMENT | {"KUBECONFIG": str(kubeconfig)}
        log = self.directory / "operator.log"
        if self.program is None:
            environment |= {forked_operator.VARIABLE: json.dumps(self.periods)}
            self.operator = Forked(forked_operator.main, arguments, log, environment, Path.cwd())
            return
        with log.open("ab") as file:
            command = [*self.program, *arguments]
            self.operator = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def get(self, path: str, seconds: float = 10) -> bytes | None:
        """Return what the kubelet or Prometheus gets; None for an error."""
        assert self.operator is not None
        assert self.operator.poll() is None, self.log()
        if path != "/metrics":
            status, body = self._open(f"http://127.0.0.1:{self.health_port}{path}", {}, seconds)
        else:
            status, body = self.metrics(self.token(self.own, "prometheus"), seconds)
        return body if status == 200 else None

    def metrics(self, token: str | None, seconds: float = 10) -> tuple[int, bytes]:
        """Return status and body of /metrics for somebody with a token; status 0 where nobody answers."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return self._open(f"https://127.0.0.1:{self.metrics_port}/metrics", headers, seconds)

    def dial(self, path: str, token: str | None) -> tuple[int, bytes]:
        """Return what the coordinator answers to somebody with a token: status and body."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return self._open(f"https://127.0.0.1:{self.coordinator_port}{path}", headers, 30)

    def adapter(self, name: str, token: str | None) -> tuple[int, bytes]:
        """Return status and body of a job's adapter for somebody with a token."""
        return self.dial(f"/v1/jobs/{self.namespace}/{name}/adapter", token)

    def reader_token(self, namespace: str | None = None) -> str:
        """Return a token as `fedpipe get adapter` asks for it."""
        return self.token(namespace or self.namespace, ADAPTER_READER, audiences=[ADAPTER_AUDIENCE])

    def _open(self, url: str, headers: dict[str, str], seconds: float) -> tuple[int, bytes]:
        context = ssl.create_default_context(cadata=self._authority()) if url.startswith("https:") else None
        request = urllib.request.Request(url, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=seconds, context=context) as response:
                return int(response.status), bytes(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except OSError:
            return 0, b""

    def _authority(self) -> str:
        """Return the CA that the operator's certificate is of."""
        _, secret = self.plane.request("GET", f"/api/v1/namespaces/{self.own}/secrets/fedpipe-tls")
        return base64.b64decode(secret["data"]["ca.crt"]).decode()

    def forward(self, address: str) -> int:
        """Lead a port of another address of this machine to the coordinator's; return it."""
        listener = socket.create_server((address, 0))

        def serve() -> None:
            while True:
                try:
                    outer, _ = listener.accept()
                except OSError:
                    return
                inner = socket.create_connection(("127.0.0.1", self.coordinator_port))
                for source, sink in ((outer, inner), (inner, outer)):
                    threading.Thread(target=pipe, args=(source, sink), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        self._listeners.append(listener)
        return int(listener.getsockname()[1])

    def kill_operator(self) -> None:
        """SIGKILL: nothing can be tidied up."""
        assert self.operator is not None
        self.operator.send_signal(signal.SIGKILL)
        self.operator.wait()

    def stop_operator(self) -> int:
        """SIGTERM; return the exit code."""
        assert self.operator is not None
        self.operator.terminate()
        return self.operator.wait(30)

    def log(self) -> str:
        """Return the end of the operator's log."""
        path = self.directory / "operator.log"
        return path.read_text(errors="replace")[-6000:] if path.exists() else ""

    def tear_down(self) -> None:
        """End everything and remove what other tests could see."""
        if self.operator is not None and self.operator.poll() is None:
            self.stop_operator()
        if self.kubelet is not None:
            self.kubelet.stop()
        for listener in self._listeners:
            listener.close()
        for full in self._nodes:
            self.plane.request("DELETE", f"/api/v1/nodes/{full}")
            self.plane.request("DELETE", f"{CUSTOM}/{NODES}/{full}")


def _custom(kind: str, metadata: dict[str, Any], spec: dict[str, Any] | None = None) -> dict[str, Any]:
    body = {"apiVersion": f"{GROUP}/{VERSION}", "kind": kind, "metadata": metadata}
    return body if spec is None else body | {"spec": spec}
