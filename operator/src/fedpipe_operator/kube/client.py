# SPDX-License-Identifier: Apache-2.0
"""A cluster's jobs for its users, with their own kubeconfig: behind the command line and `fedpipe.Client`."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedpipe_api.base import UserError, explain
from fedpipe_api.conditions import ACCEPTED, Reason
from fedpipe_api.job import FedPipeJob, Phase
from fedpipe_api.logs import one_line
from fedpipe_api.names import COMPONENT_LABEL, GROUP, JOB_LABEL, JOBS, NODE_LABEL, VERSION

from .get import NAMESPACE_NAME, fetch, unpack
from .views import AGENT

log = logging.getLogger(__name__)

MANAGER = "fedpipe"
"""Owns, in server-side apply, the fields that users give with this client."""

STRICT = "Strict"
"""A field that the cluster's version of FedPipe does not know is refused, not dropped."""

POLL_SECONDS = 2.0
"""Pause between two looks at a job that is watched; its status is written no more often."""

PATIENCE_SECONDS = 300.0
"""How long a watch goes on without an answer: an API server is upgraded or fails over in less."""

TIMEOUT = (10.0, 60.0)
"""Seconds to connect, and to wait for what comes next of an answer."""

ENDED = (Phase.SUCCEEDED, Phase.FAILED)
_TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"


class Unavailable(UserError):
    """The API server does not answer, or asks to come back later; the same request may succeed then."""


class Client:
    """The jobs of one namespace: the context's of the kubeconfig, unless another is given.

    Every method raises UserError in one line for what the API server refuses, and where it does not answer.
    """

    def __init__(self, namespace: str | None = None, kubeconfig: Path | str | None = None) -> None:
        # The client takes a second to import, which other commands need not wait for.
        from kubernetes import client, config

        self._kubeconfig = Path(kubeconfig) if kubeconfig else None
        configuration = client.Configuration()
        given = str(kubeconfig) if kubeconfig else None
        try:
            config.load_config(config_file=given, client_configuration=configuration)
        except (config.ConfigException, OSError) as error:
            text = one_line(str(error))
            raise UserError(f"kubeconfig: {text}; set KUBECONFIG or give --kubeconfig") from None
        configuration.retries = 0  # like kubectl: one try, whose failure is reported
        self.namespace = namespace or _context_namespace(given)
        if not re.fullmatch(NAMESPACE_NAME, self.namespace):
            raise UserError("--namespace: must be the name of a namespace")
        self._api = client.ApiClient(configuration)
        self._jobs = client.CustomObjectsApi(self._api)
        self._core = client.CoreV1Api(self._api)

    def apply(self, job: Mapping[str, Any]) -> FedPipeJob:
        """Create a job, or change one to what the manifest says, by server-side apply; return it.

        The manifest is checked here first. Its own namespace, if it has one, must be the client's.
        """
        name = self._checked(job).metadata.name
        with self._refusals(name):
            self._jobs.patch_namespaced_custom_object(
                GROUP, VERSION, self.namespace, JOBS, name, _whole(job),
                field_manager=MANAGER, field_validation=STRICT, _content_type="application/apply-patch+yaml",
                _request_timeout=TIMEOUT,
            )  # fmt: skip
        # The generated client drops the answer to an apply that creates.
        return self.get(name)

    def submit(self, job: Mapping[str, Any]) -> FedPipeJob:
        """Create a job; UserError where there is one of its name."""
        name = self._checked(job).metadata.name
        with self._refusals(name):
            found = self._jobs.create_namespaced_custom_object(
                GROUP,
                VERSION,
                self.namespace,
                JOBS,
                _whole(job),
                field_manager=MANAGER,
                field_validation=STRICT,
                _request_timeout=TIMEOUT,
            )
        return _read(found)

    def get(self, name: str) -> FedPipeJob:
        """Return a job with its status."""
        with self._refusals(name):
            return _read(
                self._jobs.get_namespaced_custom_object(
                    GROUP, VERSION, self.namespace, JOBS, name, _request_timeout=TIMEOUT
                )
            )

    def jobs(self) -> list[FedPipeJob]:
        """Return all jobs of the namespace."""
        with self._refusals():
            found: Any = self._jobs.list_namespaced_custom_object(
                GROUP, VERSION, self.namespace, JOBS, _request_timeout=TIMEOUT
            )
        return [_read(one) for one in found["items"]]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return columns and rows of the jobs as `kubectl get` shows them."""
        with self._refusals():
            answer = self._api.call_api(
                *self._api.param_serialize(
                    "GET", f"/apis/{GROUP}/{VERSION}/namespaces/{self.namespace}/{JOBS}",
                    header_params={"Accept": _TABLE}, auth_settings=["BearerToken"],
                )[:5],
                _request_timeout=TIMEOUT,
            )  # fmt: skip
            body = answer.read()
            if answer.status >= 400:
                raise UserError(f"namespace {self.namespace}: {_reason(body) or answer.status}")
        table = json.loads(body)
        shown = [i for i, column in enumerate(table["columnDefinitions"]) if not column.get("priority")]
        names = [table["columnDefinitions"][i]["name"].upper() for i in shown]
        rows = [[row["cells"][i] for i in shown] for row in table["rows"]]
        # As of all that a cluster says: no cell moves the cursor of a terminal.
        return names, [["" if cell is None else one_line(str(cell)) for cell in row] for row in rows]

    def watch(self, name: str) -> Iterator[FedPipeJob]:
        """Yield a job as it is and after each change of its status, until it has ended or cannot be run.

        Once it was seen, an API server that does not answer for less than PATIENCE_SECONDS is waited for.
        """
        before: Any = False
        answered, waiting = None, False
        while True:
            try:
                job = self.get(name)
            except Unavailable as error:
                if answered is None or time.monotonic() - answered > PATIENCE_SECONDS:
                    raise
                if not waiting:
                    log.warning("%s; waiting for it", error)
                waiting = True
                time.sleep(POLL_SECONDS)
                continue
            answered, waiting = time.monotonic(), False
            if job.status != before:
                before = job.status
                yield job
            if has_ended(job) or refused(job) is not None:
                return
            time.sleep(POLL_SECONDS)

    def suspend(self, name: str) -> FedPipeJob:
        """Have a job stop after what it does; nothing is lost."""
        return self._patch(name, suspend=True)

    def resume(self, name: str) -> FedPipeJob:
        """Have a suspended job go on."""
        return self._patch(name, suspend=False)

    def logs(self, name: str, node: str | None = None, *, follow: bool = False) -> Iterator[tuple[str, str]]:
        """Yield (node, line) of the agents' logs, node after node; `follow` goes on with one node's."""
        labels = f"{JOB_LABEL}={name},{COMPONENT_LABEL}={AGENT}"
        with self._refusals(name):
            found: Any = self._core.list_namespaced_pod(
                self.namespace, label_selector=labels, _request_timeout=TIMEOUT
            ).items
        pods = {pod.metadata.annotations.get(NODE_LABEL, ""): pod.metadata.name for pod in found}
        if node is not None:
            pods = {one: pod for one, pod in pods.items() if one == node}
        if not pods:
            self.get(name)  # says if there is no such job
            raise UserError(f"job {name}: no agent{f' on node {node}' if node else ''} has a Pod now")
        if follow and len(pods) > 1:
            raise UserError(f"--follow: of one node; give --node with one of {', '.join(sorted(pods))}")
        for one, pod in sorted(pods.items()):
            with self._refusals(name):
                lines: Any = self._core.read_namespaced_pod_log(
                    pod, self.namespace, container=AGENT, follow=follow, _preload_content=False,
                    _request_timeout=None if follow else TIMEOUT,
                )  # fmt: skip
                for line in lines:
                    yield one, line.decode(errors="replace").rstrip("\n")

    def adapter(self, name: str, out: Path | str, operator: tuple[str, str] | None = None) -> None:
        """Write a job's latest adapter as a PEFT directory, which must not exist.

        `operator` is namespace and name of the operator's Service; by default it is found.
        """
        if Path(out).exists():
            raise UserError(f"{out}: exists already; give another")
        unpack(asyncio.run(fetch(self._kubeconfig, self.namespace, name, operator)), Path(out))

    def _patch(self, name: str, **spec: Any) -> FedPipeJob:
        with self._refusals(name):
            found = self._jobs.patch_namespaced_custom_object(
                GROUP, VERSION, self.namespace, JOBS, name, {"spec": spec},
                field_manager=MANAGER, _content_type="application/merge-patch+json", _request_timeout=TIMEOUT,
            )  # fmt: skip
        return _read(found)

    def _checked(self, manifest: Mapping[str, Any]) -> FedPipeJob:
        try:
            job = FedPipeJob.model_validate(manifest)
        except ValidationError as error:
            raise UserError(explain(error)) from None
        given = (manifest.get("metadata") or {}).get("namespace")
        if given not in (None, self.namespace):
            raise UserError(f"metadata.namespace: is {given}, not {self.namespace}; give --namespace {given}")
        return job

    @contextmanager
    def _refusals(self, name: str = "") -> Iterator[None]:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        where = f"job {name} in namespace {self.namespace}" if name else f"namespace {self.namespace}"
        try:
            yield
        except ApiException as error:
            kind = Unavailable if error.status == 429 or error.status >= 500 else UserError
            raise kind(f"{where}: {_reason(error.body) or error.reason} ({error.status})") from None
        except HTTPError as error:
            text = one_line(str(getattr(error, "reason", None) or error))
            raise Unavailable(f"the API server does not answer: {text}") from None


def has_ended(job: FedPipeJob) -> bool:
    """Whether nothing more happens to a job."""
    return job.status is not None and job.status.phase in ENDED


def refused(job: FedPipeJob) -> str | None:
    """Return why a job cannot be run as its spec is now, None if it can."""
    conditions = job.status.conditions if job.status else ()
    found = next((one for one in conditions if one.type == ACCEPTED and one.reason == Reason.INVALID), None)
    return found.message if found and found.observed_generation == job.metadata.generation else None


def _whole(job: Mapping[str, Any]) -> dict[str, Any]:
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": "FedPipeJob"} | dict(job)


def _read(found: Any) -> FedPipeJob:
    try:
        return FedPipeJob.model_validate(found)
    except ValidationError as error:
        text = explain(error)
        raise UserError(f"the cluster's FedPipe is of another version than this client: {text}") from None


def _reason(body: Any) -> str:
    """Return what a Status of the API server says."""
    try:
        found = json.loads(body or "{}")
    except ValueError:
        return ""
    return one_line(str(found.get("message") or "")) if isinstance(found, dict) else ""


def _context_namespace(kubeconfig: str | None) -> str:
    from kubernetes import config

    try:
        _, active = config.list_kube_config_contexts(kubeconfig)
    except (config.ConfigException, OSError):
        return "default"  # in a Pod there is no kubeconfig
    return str(active["context"].get("namespace") or "default")
