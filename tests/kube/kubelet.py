# SPDX-License-Identifier: Apache-2.0
"""A stand-in for scheduler and kubelets: binds each Pod to its node, runs its agent, reports how that goes."""

import base64
import http.client
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from fedpipe_api.names import JOB_LABEL
from kube.controlplane import ControlPlane

PERIOD = 0.1
BACKOFF_SECONDS = 1.0


class Process(Protocol):
    """A running agent, as subprocess.Popen has it."""

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""
        ...

    def terminate(self) -> None:
        """Ask it to end."""
        ...

    def kill(self) -> None:
        """End it."""
        ...

    def wait(self) -> int:
        """Return its exit code once it has ended."""
        ...


Start = Callable[[dict[str, Any], Path], Process]
"""Starts the agent of a Pod; the directory holds `token` and `ca.crt`."""


@dataclass
class Running:
    """One Pod on its node."""

    node: str
    directory: Path
    process: Process | None
    ending: float | None = None
    restart_at: float = 0.0
    phase: str = "Running"


@dataclass
class Kubelet:
    """Plays all nodes of a namespace. `dead` nodes do nothing any more; `images` missing cannot be pulled."""

    plane: ControlPlane
    namespace: str
    start: Start
    directory: Path
    dead: set[str] = field(default_factory=set)
    any_node: str = ""
    missing_images: set[str] = field(default_factory=set)
    missing_claims: set[str] = field(default_factory=set)
    """Claims that cannot be mounted: their Pods wait, and only an Event says why."""
    created: list[str] = field(default_factory=list)
    """Names of all Pods ever seen, once for each uid."""

    def __post_init__(self) -> None:
        self._running: dict[str, Running] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="kubelet")
        self._thread.start()

    def stop(self) -> None:
        """Stop playing; agents are ended."""
        self._stop.set()
        self._thread.join(30)
        for known in self._running.values():
            _kill(known.process)

    def evict(self, node: str) -> None:
        """Fail the node's Pods as the kubelet does under pressure."""
        with self._lock:
            for uid, known in self._running.items():
                if known.node == node and known.phase == "Running":
                    _kill(known.process)
                    known.process, known.phase = None, "Failed"
                    self._status(uid, {"phase": "Failed", "reason": "Evicted", "message": "low on memory"})

    def kill_for_memory(self, node: str) -> None:
        """Kill the node's agent as the kernel does one that uses more memory than its container may."""
        with self._lock:
            for uid, known in self._running.items():
                if known.node == node and known.phase == "Running":
                    _kill(known.process)
                    known.process, known.phase = None, "Failed"
                    ended = {"exitCode": 137, "reason": "OOMKilled", "finishedAt": _now()}
                    container = _container(terminated=ended)
                    self._status(uid, {"phase": "Failed", "containerStatuses": [container]})

    def agents(self) -> dict[str, Process]:
        """Return the running agents by node."""
        with self._lock:
            return {
                k.node: k.process for k in self._running.values() if k.process and k.process.poll() is None
            }

    def _loop(self) -> None:
        while not self._stop.is_set():
            with suppress(OSError, http.client.HTTPException):  # the API server is away; kubelets go on
                self._pass()
            self._stop.wait(PERIOD)

    def _pass(self) -> None:
        status, found = self.plane.request("GET", f"/api/v1/namespaces/{self.namespace}/pods")
        if status != 200:
            return
        with self._lock:
            self._names = {pod["metadata"]["uid"]: pod["metadata"]["name"] for pod in found["items"]}
            for pod in found["items"]:
                if JOB_LABEL in pod["metadata"].get("labels", {}):
                    self._play(pod)
            for uid in self._running.keys() - self._names.keys():
                gone = self._running.pop(uid)
                _kill(gone.process)

    def _play(self, pod: dict[str, Any]) -> None:
        meta = pod["metadata"]
        uid, node = meta["uid"], self._node_of(pod)
        known = self._running.get(uid)
        if known is None and "deletionTimestamp" not in meta:
            if meta["name"] not in self.created or uid not in self._running:
                self.created.append(meta["name"])
            self._admit(pod, node)
        elif node in self.dead:
            return
        elif "deletionTimestamp" in meta:
            self._end(pod, known)
        elif known is not None and known.phase == "Mounting":
            self._start(pod, known.directory)
        elif known is not None and known.phase == "Running":
            self._check(pod, known)

    def _node_of(self, pod: dict[str, Any]) -> str:
        """Schedule: to the node the Pod is pinned to, else to any."""
        if "affinity" in pod["spec"]:
            return _pinned(pod)
        return str(pod["spec"].get("nodeName") or self.any_node)

    def _admit(self, pod: dict[str, Any], node: str) -> None:
        meta = pod["metadata"]
        directory = self.directory / meta["uid"]
        self._running[meta["uid"]] = Running(node, directory, None, phase="Admitted")
        path = f"/api/v1/namespaces/{self.namespace}/pods/{meta['name']}"
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": meta["name"]}}
        status, answer = self.plane.request("POST", f"{path}/binding", binding | {"target": {"name": node}})
        if _is_gone(status):
            del self._running[meta["uid"]]
            return
        assert status == 201, answer
        images = {container["image"] for container in pod["spec"]["containers"]}
        if images & self.missing_images:
            waiting = {"reason": "ErrImagePull", "message": f"no such image: {images.pop()}"}
            self._status(
                meta["uid"], {"phase": "Pending", "containerStatuses": [_container(waiting=waiting)]}
            )
            return
        claims = {
            volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["spec"]["volumes"]
        }
        if claims & self.missing_claims:
            self._status(meta["uid"], {"phase": "Pending", "containerStatuses": []})
            return self._warn(pod, 'MountVolume.SetUp failed for volume "data" : the claim is gone')
        self._start(pod, directory)

    def _start(self, pod: dict[str, Any], directory: Path) -> None:
        """Mount its volumes and run it; a Pod whose CA is missing waits, as on a node."""
        meta = pod["metadata"]
        known = self._running[meta["uid"]]
        if self._authorities(pod) is None:
            known.phase = "Mounting"
            return
        if not self._project(pod, directory):
            del self._running[meta["uid"]]
            return
        known.process, known.phase = self.start(pod, directory), "Running"
        running = {"startedAt": _now()}
        # A kubelet that resizes Pods reports what their containers have.
        container = _container(running=running) | {
            "resources": pod["spec"]["containers"][0].get("resources", {})
        }
        self._status(meta["uid"], {"phase": "Running", "containerStatuses": [container]})

    def _warn(self, pod: dict[str, Any], message: str) -> None:
        meta = pod["metadata"]
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{meta['name']}.{meta['uid'][:8]}", "namespace": self.namespace},
            "involvedObject": {"apiVersion": "v1", "kind": "Pod", "namespace": self.namespace}
            | {key: meta[key] for key in ("name", "uid")},
            "type": "Warning",
            "reason": "FailedMount",
            "message": message,
            "firstTimestamp": _now(),
            "lastTimestamp": _now(),
        }
        status, answer = self.plane.request("POST", f"/api/v1/namespaces/{self.namespace}/events", event)
        assert status == 201, answer

    def _project(self, pod: dict[str, Any], directory: Path) -> bool:
        """Write the token, bound to the Pod, and the CA, as the projected volume has them; False if it is gone."""
        meta, spec = pod["metadata"], pod["spec"]
        directory.mkdir(parents=True, exist_ok=True)
        sources = next(v for v in spec["volumes"] if v["name"] == "identity")["projected"]["sources"]
        wanted = sources[0]["serviceAccountToken"]
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": [wanted["audience"]],
                "expirationSeconds": wanted["expirationSeconds"],
                "boundObjectRef": {
                    "apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]
                },
            },
        }  # fmt: skip
        account = spec.get("serviceAccountName", "default")
        path = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/{account}/token"
        status, answer = self.plane.request("POST", path, request)
        if _is_gone(status):
            return False
        assert status == 201, answer
        (directory / "token").write_text(answer["status"]["token"])
        (directory / "ca.crt").write_text(self._authorities(pod) or "")
        for volume in spec["volumes"]:
            if "secret" in volume:
                self._mount_secret(volume["secret"], directory / volume["name"])
        return True

    def _authorities(self, pod: dict[str, Any]) -> str | None:
        """Return the CA that the Pod mounts, None while it is not there."""
        identity = next(v for v in pod["spec"]["volumes"] if v["name"] == "identity")
        name = identity["projected"]["sources"][1]["configMap"]["name"]
        status, answer = self.plane.request("GET", f"/api/v1/namespaces/{self.namespace}/configmaps/{name}")
        return answer["data"]["ca.crt"] if status == 200 else None

    def _mount_secret(self, source: dict[str, Any], directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        path = f"/api/v1/namespaces/{self.namespace}/secrets/{source['secretName']}"
        status, answer = self.plane.request("GET", path)
        assert status == 200 or (source.get("optional") and status == 404), answer
        for key, value in answer.get("data", {}).items():
            (directory / key).write_bytes(base64.b64decode(value))

    def _end(self, pod: dict[str, Any], known: Running | None) -> None:
        meta = pod["metadata"]
        if known is not None and known.process is not None and known.process.poll() is None:
            grace = meta.get("deletionGracePeriodSeconds", 30)
            if known.ending is None:
                known.ending = time.monotonic() + grace
                known.process.terminate()
            if time.monotonic() < known.ending:
                return
            _kill(known.process)
        path = f"/api/v1/namespaces/{self.namespace}/pods/{meta['name']}"
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": meta["uid"]}}
        self.plane.request("DELETE", path, options)

    def _check(self, pod: dict[str, Any], known: Running) -> None:
        uid = pod["metadata"]["uid"]
        if known.process is None:
            if time.monotonic() >= known.restart_at:
                known.process = self.start(pod, known.directory)
                running = {"startedAt": _now()}
                self._status(uid, {"phase": "Running", "containerStatuses": [_container(running=running)]})
            return
        code = known.process.poll()
        if code is None:
            return
        ended = {
            "exitCode": code if code >= 0 else 128 - code,  # a signal's, as a container runtime reports it
            "reason": "Error" if code else "Completed",
            "finishedAt": _now(),
            "message": _last_words(known.directory),
        }
        known.process = None
        if code == 0 or pod["spec"]["restartPolicy"] == "Never":
            known.phase = "Failed" if code else "Succeeded"
            self._status(uid, {"phase": known.phase, "containerStatuses": [_container(terminated=ended)]})
            return
        known.restart_at = time.monotonic() + BACKOFF_SECONDS
        waiting = {"reason": "CrashLoopBackOff", "message": "back-off restarting failed container"}
        status = _container(waiting=waiting) | {"lastState": {"terminated": ended}}
        self._status(uid, {"phase": "Running", "containerStatuses": [status]})

    def _status(self, uid: str, status: dict[str, Any]) -> None:
        path = f"/api/v1/namespaces/{self.namespace}/pods/{self._names[uid]}/status"
        code, answer = self.plane.request("PATCH", path, {"status": status}, "application/merge-patch+json")
        assert code in (200, 404), answer


def _kill(process: Process | None) -> None:
    if process is not None:
        process.kill()
        process.wait()


def _pinned(pod: dict[str, Any]) -> str:
    affinity = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    return str(affinity["nodeSelectorTerms"][0]["matchFields"][0]["values"][0])


def _container(**state: Any) -> dict[str, Any]:
    return {
        "name": "agent", "image": "agent", "imageID": "", "restartCount": 0,
        "ready": "running" in state, "state": state,
    }  # fmt: skip


def _is_gone(status: int) -> bool:
    """Whether the answer means that the Pod was deleted since it was listed."""
    return status in (404, 409)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _last_words(directory: Path) -> str:
    log = directory / "log"
    return log.read_text(errors="replace")[-500:] if log.exists() else ""


def start_process(command: list[str], directory: Path, environment: dict[str, str]) -> Process:
    """Start a program as a Pod's agent, its output in `log`."""
    with (directory / "log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=directory)
