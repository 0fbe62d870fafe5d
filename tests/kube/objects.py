# SPDX-License-Identifier: Apache-2.0
"""Kubernetes objects as the API server would show them."""

from datetime import UTC, datetime
from typing import Any

from fedpipe_api.job import FedPipeJob
from fedpipe_api.names import GROUP, JOB_LABEL, NODE_LABEL, VERSION, child_name
from fedpipe_operator.kube.views import GENERATION_ANNOTATION, TEMPLATE_ANNOTATION

UID = "job-uid"
NOW = 1_800_000_000.0


def stamp(seconds: float) -> str:
    """Return a Kubernetes timestamp."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def job(name: str = "tickets", uid: str = UID, **spec: Any) -> FedPipeJob:
    """A valid job; keyword arguments replace fields of its spec."""
    base = {
        "model": {
            "hostPath": {"path": "/srv/model"},
            "task": "sequence-classification",
            "labels": ["a", "b"],
        },
        "data": {
            "volume": {"persistentVolumeClaim": {"claimName": "tickets-{node}"}},
            "train": "train.jsonl",
        },
        "nodes": {"selector": {"matchLabels": {"site": "edge"}}, "min": 2, "max": 3},
        "rounds": {"count": 3, "minUpdates": 2},
    }
    meta = {"name": name, "namespace": "support", "uid": uid, "generation": 1}
    return FedPipeJob.model_validate({"metadata": meta, "spec": base | spec})


def node(
    name: str, *, ready: bool = True, cordoned: bool = False, site: str = "edge", **allocatable: str
) -> Any:
    """A Node; keyword arguments such as nvidia_com_gpu become resources."""
    resources = {key.replace("_com_", ".com/").replace("_", "-"): count for key, count in allocatable.items()}
    return {
        "metadata": {"name": name, "labels": {"site": site, "kubernetes.io/hostname": name}},
        "spec": {"unschedulable": True} if cordoned else {},
        "status": {
            "conditions": [{"type": "Ready", "status": "True" if ready else "Unknown"}],
            "allocatable": {"cpu": "4"} | resources,
        },
    }


def capacity(
    name: str,
    *,
    gpus: int = 0,
    memory: int = 8 << 30,
    ready: bool = True,
    unschedulable: bool = False,
    at: float = NOW,
) -> Any:
    """A FedPipeNode."""
    condition = {"type": "Ready", "status": "True", "reason": "CpuOnly", "message": ""}
    if not ready:
        condition |= {"status": "False", "reason": "DriverMismatch", "message": "the driver was updated"}
    return {
        "metadata": {"name": name},
        "spec": {"unschedulable": unschedulable},
        "status": {
            "observedAt": stamp(at),
            "conditions": [condition],
            "cpu": {"cores": 4, "totalMemory": memory, "freeMemory": memory},
            "devices": [{"uuid": f"GPU-{i}", "name": "T4", "totalMemory": memory} for i in range(gpus)],
        },
    }


def pod(
    node_name: str,
    *,
    job_name: str = "tickets",
    job_uid: str = UID,
    phase: str = "Running",
    template: str = "t1",
    generation: str = "1",
    created: float = NOW - 60,
    deleting: bool = False,
    **status: Any,
) -> Any:
    """An agent Pod; keyword arguments become fields of its status."""
    name = child_name(job_name, node_name)
    meta = {
        "name": name,
        "namespace": "support",
        "uid": f"uid-{name}-{created:.0f}",
        "labels": {JOB_LABEL: job_name, NODE_LABEL: node_name},
        "annotations": {
            NODE_LABEL: node_name,
            TEMPLATE_ANNOTATION: template,
            GENERATION_ANNOTATION: generation,
        },
        "ownerReferences": [owner(job_name, job_uid)],
        "creationTimestamp": stamp(created),
    }
    if deleting:
        meta["deletionTimestamp"] = stamp(NOW)
    return {"metadata": meta, "spec": {"nodeName": node_name}, "status": {"phase": phase} | status}


def owner(name: str = "tickets", uid: str = UID) -> Any:
    """The reference of a job that controls an object."""
    kind = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "FedPipeJob"}
    return kind | {"uid": uid, "name": name, "controller": True}


def waiting(reason: str, message: str = "", **more: Any) -> Any:
    """A container status of a container that does not run."""
    return [{"name": "agent", "state": {"waiting": {"reason": reason, "message": message}}} | more]
