# SPDX-License-Identifier: Apache-2.0
"""Builds the agent Pod of a job on a node: a pure function of job, node and the operator's settings."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fedpipe_api.base import UserError
from fedpipe_api.job import FedPipeJob
from fedpipe_api.names import (
    AUDIENCE,
    BUDGET_DIRECTORY,
    CA_CONFIGMAP,
    COMPONENT_LABEL,
    GROUP,
    JOB_LABEL,
    MODEL_DIRECTORY,
    NODE_LABEL,
    POLICY_DIRECTORY,
    VERSION,
    child_name,
)
from fedpipe_api.object_url import ObjectURL
from fedpipe_api.objects import Claim, HostPath, Volume

from .merge import strategic_merge
from .pod_resources import UNPLANNED
from .settings import OperatorSettings
from .taints import GPU_TOLERATION
from .views import (
    AGENT,
    GENERATION_ANNOTATION,
    TEMPLATE_ANNOTATION,
    TRACKER,
    WRITER,
    CapacityView,
    NodeView,
    own_pod_name,
)

CA_KEY = "ca.crt"
TOKEN_SECONDS = 3600
USER = 65532
GRACE_SECONDS = 60
"""An agent that is asked to end may finish the upload it is in."""

IDENTITY_DIRECTORY = "/var/run/fedpipe"
DATA_DIRECTORY, CACHE_DIRECTORY = "/data", "/cache"
OUTPUT_DIRECTORY, CREDENTIALS_DIRECTORY = "/output", "/var/run/credentials"
EVENTS_DIRECTORY = "tensorboard_runs"
"""Of event files, beside adapters that replace what is in their jobs' directories: no job has such a name."""

MLFLOW_CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""Keys of a Secret, and the variables that MLflow's client reads."""

OWN_REQUESTS = {"cpu": "100m", "memory": "256Mi"}
TOKEN_KEY = "HF_TOKEN"  # noqa: S105 - a name
"""The key of a Secret, and the variable, with a token of the Hugging Face hub."""

Document = dict[str, Any]


def owner_reference(job: str, uid: str) -> Document:
    """Return the reference by which Kubernetes collects what belongs to a job, by its name."""
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "FedPipeJob",
        "name": job,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def template_digest(job: FedPipeJob, settings: OperatorSettings) -> str:
    """Return a digest of what agent Pods are built from besides their node; a new one means a new Pod."""
    spec = job.spec
    parts = [spec.pod_template, spec.model.to_dict(), spec.data.to_dict()]
    installed = [settings.agent_image, settings.coordinator, settings.model_cache]
    installed += [settings.policy_directory, settings.budget_directory]
    text = json.dumps([*parts, *installed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build_agent_pod(
    job: FedPipeJob, node: NodeView, capacity: CapacityView, settings: OperatorSettings
) -> Document:
    """Return the manifest of the Pod; UserError names the field of podTemplate that does not fit."""
    base = {
        "metadata": _metadata(job, node.name, AGENT, settings),
        "spec": _spec(job, node, capacity, settings),
    }
    pod = strategic_merge(base, job.spec.pod_template or {}, "spec.podTemplate")
    # What ties the Pod to its job and node is not the template's to change.
    ours = base["metadata"]
    for field in ("labels", "annotations"):
        pod["metadata"][field] = pod["metadata"].get(field, {}) | ours[field]
    for field in ("name", "namespace", "ownerReferences"):
        pod["metadata"][field] = ours[field]
    _pin(pod["spec"], node.name)
    return {"apiVersion": "v1", "kind": "Pod"} | pod


def build_writer_pod(job: FedPipeJob, node: str, settings: OperatorSettings) -> Document:
    """Return the manifest of the Pod that writes the adapter to spec.output.

    A hostPath is one of `node`; a claim decides by itself where the Pod may run. UserError for an object
    store that is not allowed.
    """
    output = job.spec.output
    assert output is not None
    pod = _own_pod(job, WRITER, ["fedpipe-operator", "deliver"], settings)
    [container], volumes = pod["spec"]["containers"], pod["spec"]["volumes"]
    args, mounts = container["args"], container["volumeMounts"]
    if output.url is not None:
        store = settings.store_of(output.url)
        args += ["--url", str(output_place(job)), "--credentials", CREDENTIALS_DIRECTORY]
        args += ["--endpoint", store.endpoint] if store.endpoint else []
        # Optional: where it is missing the Pod says so, instead of never starting.
        secret = {"secretName": output.secret_name, "optional": True, "defaultMode": 0o440}
        volumes.append({"name": "credentials", "secret": secret})
        mounts.append({"name": "credentials", "mountPath": CREDENTIALS_DIRECTORY, "readOnly": True})
    if output.volume is not None:
        args += ["--output", _mount_output(pod, output.volume, job.metadata.name, node)]
    return pod


def build_tracker_pod(job: FedPipeJob, node: str, settings: OperatorSettings) -> Document:
    """Return the manifest of the Pod that sends rounds to spec.tracking.

    A hostPath is one of `node`; a claim decides by itself where the Pod may run.
    """
    tracking = job.spec.tracking
    assert tracking is not None
    pod = _own_pod(job, TRACKER, ["fedpipe-operator", "track"], settings)
    [container], volumes = pod["spec"]["containers"], pod["spec"]["volumes"]
    # MLflow's client and Python's bytecode; the root is read-only.
    volumes.append({"name": "tmp", "emptyDir": {}})
    container["volumeMounts"].append({"name": "tmp", "mountPath": "/tmp"})  # noqa: S108 - in the Pod
    if tracking.volume is not None:
        place = f"{EVENTS_DIRECTORY}/{job.metadata.name}"
        container["args"] += ["--tensorboard", _mount_output(pod, tracking.volume, place, node)]
    if tracking.mlflow is not None:
        experiment = tracking.mlflow.experiment or job.metadata.name
        container["args"] += ["--mlflow", tracking.mlflow.uri, "--experiment", experiment]
        # Optional: where it is missing the server says so, instead of the Pod never starting.
        secret = {"name": tracking.mlflow.secret_name, "optional": True}
        container["env"] = [
            {"name": name, "valueFrom": {"secretKeyRef": secret | {"key": name}}}
            for name in MLFLOW_CREDENTIALS
            if tracking.mlflow.secret_name is not None
        ]
    return pod


def _own_pod(job: FedPipeJob, component: str, command: list[str], settings: OperatorSettings) -> Document:
    """Return a Pod of the operator's image that may ask the coordinator for what is of its job."""
    container: Document = {
        "name": component,
        "image": settings.operator_image,
        "command": command,
        "args": [
            *("--coordinator", settings.coordinator),
            *("--token-file", f"{IDENTITY_DIRECTORY}/token"),
            *("--ca-file", f"{IDENTITY_DIRECTORY}/{CA_KEY}"),
        ],
        "resources": {"requests": dict(OWN_REQUESTS)},
        "securityContext": container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "identity", "mountPath": IDENTITY_DIRECTORY, "readOnly": True}],
    }
    spec: Document = {
        "restartPolicy": "OnFailure",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "containers": [container],
        "volumes": [identity_volume()],
    }
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    metadata = _metadata(job, "", component, settings)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def output_place(job: FedPipeJob) -> ObjectURL:
    """Return where in the object store of spec.output.url the adapter is written."""
    assert job.spec.output is not None
    assert job.spec.output.url is not None
    return ObjectURL.parse(job.spec.output.url) / job.metadata.name


def volume_place(volume: Volume, name: str, node: str) -> str:
    """Return where in a volume the directory `name` is, as people write it."""
    if volume.persistent_volume_claim is not None:
        claim = volume.persistent_volume_claim
        parts = (claim.claim_name.replace("{node}", node), claim.path, name)
        return "claim " + "/".join(filter(None, parts))
    assert volume.host_path is not None
    return f"{node}:{volume.host_path.path.rstrip('/')}/{name}"


def _mount_output(pod: Document, volume: Volume, name: str, node: str) -> str:
    """Mount a volume into an own Pod, on `node` where it is of that; return the directory `name` in it."""
    spec, path = pod["spec"], ""
    if volume.persistent_volume_claim is not None:
        claim = volume.persistent_volume_claim
        path = claim.path.strip("/")
        kind: Document = {"persistentVolumeClaim": {"claimName": claim.claim_name.replace("{node}", node)}}
    else:
        assert volume.host_path is not None
        kind = {"hostPath": {"path": volume.host_path.path, "type": "Directory"}}
        _pin(spec, node)
    spec["volumes"].append({"name": "output"} | kind)
    spec["containers"][0]["volumeMounts"].append({"name": "output", "mountPath": OUTPUT_DIRECTORY})
    return "/".join(filter(None, (OUTPUT_DIRECTORY, path, name)))


def _metadata(job: FedPipeJob, node: str, component: str, settings: OperatorSettings) -> Document:
    name, namespace = job.metadata.name, job.metadata.namespace
    return {
        "name": child_name(name, node) if component == AGENT else own_pod_name(name, component),
        "namespace": namespace,
        "labels": {
            JOB_LABEL: name,
            # The whole name is in the annotation; a label value has at most 63 characters.
            NODE_LABEL: node[:63].rstrip("-."),
            COMPONENT_LABEL: component,
            "app.kubernetes.io/name": "fedpipe",
            "app.kubernetes.io/managed-by": "fedpipe-operator",
        },
        "annotations": {
            NODE_LABEL: node,
            TEMPLATE_ANNOTATION: template_digest(job, settings),
            GENERATION_ANNOTATION: str(job.metadata.generation),
        },
        "ownerReferences": [owner_reference(name, job.metadata.uid or "")],
    }


def _spec(job: FedPipeJob, node: NodeView, capacity: CapacityView, settings: OperatorSettings) -> Document:
    model, model_volumes, model_mounts, environment = _model(job, node.name, settings)
    data = job.spec.data.volume
    if data is None:
        raise UserError("spec.data.volume: required on a cluster; give hostPath or persistentVolumeClaim")
    data_volume, data_mount = _source(
        "data", DATA_DIRECTORY, data.persistent_volume_claim or data.host_path, node.name
    )
    container: Document = {
        "name": AGENT,
        "image": settings.agent_image,
        "command": ["fedpipe-agent", "train"],
        "args": [
            *("--coordinator", settings.coordinator),
            *("--model", model),
            *("--data", DATA_DIRECTORY),
            *("--token-file", f"{IDENTITY_DIRECTORY}/token"),
            *("--ca-file", f"{IDENTITY_DIRECTORY}/{CA_KEY}"),
            *(("--link-rate", str(capacity.link_rate)) if capacity.link_rate else ()),
        ],
        "env": environment,
        "resources": {"requests": dict(UNPLANNED)},
        "securityContext": container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "identity", "mountPath": IDENTITY_DIRECTORY, "readOnly": True},
            data_mount,
            *model_mounts,
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a mount in the Pod
        ],
    }
    spec: Document = {
        # The operator replaces what fails: a kubelet would restart for ever an agent that refuses its data.
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": pod_security(),
        "containers": [container],
        "volumes": [identity_volume(), data_volume, *model_volumes, {"name": "tmp", "emptyDir": {}}],
    }
    # The chart's admission policy refuses a Pod from which a podTemplate takes one of these.
    for name, path, directory in (
        ("policy", POLICY_DIRECTORY, settings.policy_directory),
        ("budget", BUDGET_DIRECTORY, settings.budget_directory),
    ):
        if directory:
            volume, mount = _source(name, path, HostPath(path=directory), node.name)
            spec["volumes"].append(volume)
            container["volumeMounts"].append(mount | {"readOnly": name == "policy"})
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    if node.accelerator is not None and capacity.devices:
        container["resources"]["limits"] = {node.accelerator: "1"}
        spec["tolerations"] = [GPU_TOLERATION]
    elif capacity.devices:
        container["env"].append({"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"})
    if capacity.devices and settings.runtime_class:
        # Also beside a device plugin: on k3s the driver's libraries come with the RuntimeClass alone.
        spec["runtimeClassName"] = settings.runtime_class
    return spec


def container_security() -> Document:
    """Return the container's securityContext for Pod Security "restricted"."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def pod_security() -> Document:
    """Return the Pod's securityContext for Pod Security "restricted"."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        # A large data volume is not walked through at every start.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def identity_volume() -> Document:
    """Return the volume with a token for the coordinator, bound to the Pod, and the CA to trust."""
    token = {"audience": AUDIENCE, "expirationSeconds": TOKEN_SECONDS, "path": "token"}
    authorities = {"name": CA_CONFIGMAP, "items": [{"key": CA_KEY, "path": CA_KEY}]}
    sources = [{"serviceAccountToken": token}, {"configMap": authorities}]
    return {"name": "identity", "projected": {"sources": sources, "defaultMode": 0o440}}


def _source(name: str, path: str, source: Claim | HostPath | None, node: str) -> tuple[Document, Document]:
    """Return a read-only volume and its mount."""
    mount: Document = {"name": name, "mountPath": path, "readOnly": True}
    if isinstance(source, Claim):
        if source.path:
            mount["subPath"] = source.path
        claim = {"claimName": source.claim_name.replace("{node}", node), "readOnly": True}
        return {"name": name, "persistentVolumeClaim": claim}, mount
    assert source is not None
    return {"name": name, "hostPath": {"path": source.path, "type": "Directory"}}, mount


def _model(
    job: FedPipeJob, node: str, settings: OperatorSettings
) -> tuple[str, list[Document], list[Document], list[Document]]:
    """Return the model's argument, volumes, mounts and environment."""
    source = job.spec.model
    environment: list[Document] = [{"name": "HOME", "value": "/tmp"}]  # noqa: S108 - in the Pod
    if source.hugging_face is None:
        volume, mount = _source(
            "model", MODEL_DIRECTORY, source.persistent_volume_claim or source.host_path, node
        )
        return MODEL_DIRECTORY, [volume], [mount], environment
    kind: Document = {"emptyDir": {}}
    if settings.model_cache:
        kind = {"hostPath": {"path": settings.model_cache, "type": "Directory"}}
    environment.append({"name": "HF_HOME", "value": CACHE_DIRECTORY})
    if source.hugging_face.token_secret is not None:
        # Optional: where it is missing the agent says that the model is gated, instead of never starting.
        reference = {"name": source.hugging_face.token_secret, "key": TOKEN_KEY, "optional": True}
        environment.append({"name": TOKEN_KEY, "valueFrom": {"secretKeyRef": reference}})
    mount = {"name": "cache", "mountPath": CACHE_DIRECTORY}
    name = source.hugging_face.name
    return name, [{"name": "cache"} | kind], [mount], environment


def _pin(spec: Document, node: str) -> None:
    """Bind the Pod to its node, by affinity so that the scheduler still counts resources and taints."""
    field = {"key": "metadata.name", "operator": "In", "values": [node]}
    path = "spec.podTemplate.spec.affinity"
    affinity = _object(spec.get("affinity"), path)
    given = _object(affinity.get("nodeAffinity"), path)
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    terms = _object(given.get(required), path).get("nodeSelectorTerms") or [{}]
    if not isinstance(terms, list):
        raise UserError(f"{path}: nodeSelectorTerms must be a list")
    pinned = []
    for term in (_object(term, path) for term in terms):
        fields = term.get("matchFields") or []
        if not isinstance(fields, list):
            raise UserError(f"{path}: matchFields must be a list")
        pinned.append(term | {"matchFields": [*fields, field]})
    spec["affinity"] = affinity | {"nodeAffinity": given | {required: {"nodeSelectorTerms": pinned}}}


def _object(value: Any, path: str) -> Document:
    if not isinstance(value, Mapping | None):
        raise UserError(f"{path}: must be an object")
    return dict(value or {})
