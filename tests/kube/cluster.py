"""A cluster for tests: namespaces, nodes, kubelets, and the operator as a process with its own rights."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from fedpipe_api.names import GROUP, JOBS, NODES, VERSION
from kube.controlplane import ControlPlane
from kube.kubelet import Kubelet, Process, Start, start_process
from kube.objects import stamp

HERE = Path(__file__).resolve().parent
CUSTOM = f"/apis/{GROUP}/{VERSION}"
RBAC = "/apis/rbac.authorization.k8s.io/v1"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"}


def taking(seconds: float) -> dict[str, Any]:
    """Return a podTemplate with which stand-in agents take so long to train."""
    variable = {"name": "STAND_IN_SECONDS", "value": str(seconds)}
    return {"spec": {"containers": [{"name": "agent", "env": [variable]}]}}


def free_port() -> int:
    """Return a port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stand_in_agent(pod: dict[str, Any], directory: Path) -> Process:
    """Start a stand-in agent for a Pod."""
    script = [sys.executable, str(HERE / "agent_process.py")]
    arguments = local_arguments(pod, directory, {})
    container = pod["spec"]["containers"][0]
    if container["name"] == "output":
        script = [sys.executable, "-m", "fedpipe_operator.kube", "deliver"]
        output, credentials = str(directory.parents[1] / "output"), str(directory / "credentials")
        arguments = [
            output + one.removeprefix("/output") if one.startswith("/output") else one for one in arguments
        ]
        arguments = [credentials if one == "/var/run/credentials" else one for one in arguments]
    given = {e["name"]: e["value"] for e in container.get("env", ())}
    environment = os.environ | given | ENVIRONMENT | {"SSL_CERT_FILE": str(directory / "ca.crt")}
    return start_process([*script, *arguments], directory, environment)


def local_arguments(pod: dict[str, Any], directory: Path, paths: dict[str, str]) -> list[str]:
    """Return the agent's arguments with the Pod's paths turned into this machine's."""
    known = {
        "/var/run/fedpipe/token": str(directory / "token"),
        "/var/run/fedpipe/ca.crt": str(directory / "ca.crt"),
    } | paths
    return [known.get(argument, argument) for argument in pod["spec"]["containers"][0]["args"]]


class Cluster:
    """One test's share of the control plane. `name` makes its names unique."""

    def __init__(self, plane: ControlPlane, name: str, directory: Path) -> None:
        self.plane = plane
        self.name = name
        self.namespace = f"{name}-jobs"
        self.own = f"{name}-fedpipe"
        self.directory = directory
        self.coordinator_port = free_port()
        self.http_port = free_port()
        self.api_url: str | None = None
        """Where the operator finds the API server, if not at the control plane itself."""
        self.program = [sys.executable, "-m", "fedpipe_operator.kube"]
        """What is run as the operator."""
        self.operator: subprocess.Popen[bytes] | None = None
        self.kubelet: Kubelet | None = None
        self._nodes: list[str] = []
        self._listeners: list[socket.socket] = []
        self._set_up()

    def _set_up(self) -> None:
        for kind in (f"{CUSTOM}/{NODES}", "/api/v1/nodes"):
            # They belong to no namespace, and tests of before may have left some.
            status, answer = self.plane.request("DELETE", kind)
            assert status == 200, answer
        for namespace in (self.namespace, self.own):
            self.create("/api/v1/namespaces", {"metadata": {"name": namespace}})
            self.create(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": "default"}})
        self.create(f"/api/v1/namespaces/{self.own}/serviceaccounts", {"metadata": {"name": "operator"}})
        for role in yaml.safe_load_all((HERE / "rbac.yaml").read_text()):
            role["metadata"]["name"] += f"-{self.name}"
            self.create(f"{RBAC}/clusterroles", role)
        self._bind(f"{RBAC}/clusterrolebindings", "ClusterRoleBinding", "fedpipe-operator")
        for namespace, role in ((self.namespace, "jobs"), (self.own, "own")):
            path = f"{RBAC}/namespaces/{namespace}/rolebindings"
            self._bind(path, "RoleBinding", f"fedpipe-operator-{role}")

    def _bind(self, path: str, kind: str, role: str) -> None:
        full = f"{role}-{self.name}"
        subject = {"kind": "ServiceAccount", "name": "operator", "namespace": self.own}
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": full}
        body = {"kind": kind, "metadata": {"name": full}, "subjects": [subject], "roleRef": reference}
        self.create(path, {"apiVersion": "rbac.authorization.k8s.io/v1"} | body)

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

    def start_operator(self, *more: str) -> None:
        """Run the operator with its ServiceAccount's own token; returns when it is ready."""
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        path = f"/api/v1/namespaces/{self.own}/serviceaccounts/operator/token"
        token = self.create(path, request)["status"]["token"]
        kubeconfig = self.plane.kubeconfig_for(f"operator-{self.name}", token)
        if self.api_url is not None:
            config = yaml.safe_load(kubeconfig.read_text())
            config["clusters"][0]["cluster"] = {"server": self.api_url}
            kubeconfig.write_text(yaml.safe_dump(config))
        command = [
            *self.program, "run", "--store", str(self.directory / "store"), "--namespace", self.own,
            "--agent-image", "agent:1", "--operator-image", "operator:1", "--watch", self.namespace,
            "--host", "127.0.0.1", "--coordinator-port", str(self.coordinator_port),
            "--http-port", str(self.http_port),
            "--coordinator-url", f"https://127.0.0.1:{self.coordinator_port}", *more,
        ]  # fmt: skip
        environment = os.environ | ENVIRONMENT | {"KUBECONFIG": str(kubeconfig)}
        with (self.directory / "operator.log").open("ab") as log:
            self.operator = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.wait("operator ready", lambda: self.get("/readyz") is not None)

    def get(self, path: str, seconds: float = 10) -> bytes | None:
        """Return what the operator's HTTP port answers; None for an error."""
        assert self.operator is not None
        assert self.operator.poll() is None, self.log()
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.http_port}{path}", timeout=seconds
            ) as response:
                return bytes(response.read())
        except OSError:
            return None

    def forward(self, address: str) -> int:
        """Lead a port of another address of this machine to the operator's HTTP port; return it."""
        listener = socket.create_server((address, 0))

        def serve() -> None:
            while True:
                try:
                    outer, _ = listener.accept()
                except OSError:
                    return
                inner = socket.create_connection(("127.0.0.1", self.http_port))
                for source, sink in ((outer, inner), (inner, outer)):
                    threading.Thread(target=_pipe, args=(source, sink), daemon=True).start()

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


def _pipe(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
