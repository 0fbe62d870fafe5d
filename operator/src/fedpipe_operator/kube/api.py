# SPDX-License-Identifier: Apache-2.0
"""Writes to the API server, and the few reads that a watch does not give, over `kubernetes.aio`."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import getproxies_environment

import aiohttp
from kubernetes.aio import client, config

from fedpipe_api.names import GROUP, JOBS, NODES, VERSION

from .fields import FieldReader
from .shallow import decode
from .views import AGENT

Document = dict[str, Any]

MANAGER = "fedpipe-operator"
REQUEST_SECONDS = 30
_APPLY = "application/apply-patch+yaml"
_STRATEGIC = "application/strategic-merge-patch+json"
_CUSTOM = f"/apis/{GROUP}/{VERSION}"


class ApiError(Exception):
    """The API server refused, or (status 0) did not answer."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason

    @property
    def permanent(self) -> bool:
        """Whether the same request would be refused again: it is invalid or forbidden."""
        return self.status in (400, 403, 422)


async def connect() -> client.ApiClient:
    """Return a client with the Pod's own ServiceAccount, or outside a cluster with the user's kubeconfig."""
    configuration = client.Configuration()
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        config.load_incluster_config(client_configuration=configuration)
    else:
        await config.load_kube_config(client_configuration=configuration)
    configuration.connection_pool_maxsize = 50
    # Without a proxy the environment has nothing to say, and aiohttp would read ~/.netrc at every request.
    configuration.client_session_kwargs = {"trust_env": bool(getproxies_environment())}
    return client.ApiClient(configuration)


class Api:
    """The requests the operator makes besides kopf's watches. `requests` counts them by (verb, code).

    Verbs are those of Kubernetes, but for what is written often: status, event, review.
    """

    def __init__(self, api_client: client.ApiClient) -> None:
        self._client = api_client
        self.requests: Counter[tuple[str, str]] = Counter()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    # Pods

    async def create_pod(self, manifest: Document) -> Document | None:
        """Create a Pod and return it; None when its name is taken, which a second attempt may find."""
        path = f"/api/v1/namespaces/{manifest['metadata']['namespace']}/pods"
        try:
            # A misspelt field of a podTemplate is refused by name instead of dropped.
            query = {"fieldValidation": "Strict"}
            return await self.request("create", "POST", path, manifest, query=query)
        except ApiError as error:
            if error.status == 409:
                return None
            raise

    async def get_pod(self, namespace: str, name: str) -> Document | None:
        """Return a Pod, or None when there is none."""
        return await self._get(f"/api/v1/namespaces/{namespace}/pods/{name}")

    async def resize_pod(self, namespace: str, name: str, uid: str, requests: Mapping[str, str]) -> None:
        """Change what the agent's container of exactly this Pod requests, while it runs (Kubernetes 1.33)."""
        container = {"name": AGENT, "resources": {"requests": dict(requests)}}
        body = {"metadata": {"uid": uid}, "spec": {"containers": [container]}}
        path = f"/api/v1/namespaces/{namespace}/pods/{name}/resize"
        await self.request("resize", "PATCH", path, body, content_type=_STRATEGIC)

    async def delete_pod(self, namespace: str, name: str, uid: str, force: bool) -> None:
        """Delete exactly this Pod; no error when it is gone or another one has its name."""
        options: Document = {"preconditions": {"uid": uid}}
        if force:
            options["gracePeriodSeconds"] = 0
        await self._delete(f"/api/v1/namespaces/{namespace}/pods/{name}", options)

    # Jobs and FedPipeNodes

    async def delete_job(self, namespace: str, name: str, uid: str) -> None:
        """Delete exactly this job and, in the background, what it owns."""
        path = f"{_CUSTOM}/namespaces/{namespace}/{JOBS}/{name}"
        await self._delete(path, {"preconditions": {"uid": uid}, "propagationPolicy": "Background"})

    async def apply_status(self, namespace: str, name: str, uid: str, status: Document) -> None:
        """Apply a job's whole status; no resourceVersion is needed, because the operator alone owns it."""
        path = f"{_CUSTOM}/namespaces/{namespace}/{JOBS}/{name}/status"
        metadata = {"name": name, "namespace": namespace, "uid": uid}
        await self._apply(path, _custom("FedPipeJob", metadata, status), "status")

    async def apply_precisions(self, node: str, precisions: list[Document]) -> None:
        """Record in a FedPipeNode what a real kernel on the node proved."""
        path = f"{_CUSTOM}/{NODES}/{node}/status"
        await self._apply(path, _custom("FedPipeNode", {"name": node}, {"precisions": precisions}))

    # The rest

    async def review_token(self, token: str, audience: str | None) -> Document:
        """Return the status of a TokenReview for an audience; None: the API server's own."""
        spec: Document = {"token": token} | ({"audiences": [audience]} if audience else {})
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        path = "/apis/authentication.k8s.io/v1/tokenreviews"
        status: Document = (await self.request("review", "POST", path, body)).get("status") or {}
        return status

    async def review_access(self, user: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
        """Return whether the user of a TokenReview has a right, in the words of a SubjectAccessReview."""
        spec: Document = {key: user[key] for key in ("uid", "groups", "extra") if user.get(key)}
        spec |= {"user": user.get("username", ""), **right}
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
        status: Document = (await self.request("review", "POST", path, body)).get("status") or {}
        return status.get("allowed") is True

    async def get_secret(self, namespace: str, name: str) -> Document | None:
        """Return a Secret, or None when there is none."""
        return await self._get(f"/api/v1/namespaces/{namespace}/secrets/{name}")

    async def apply_secret(self, namespace: str, name: str, data: Mapping[str, str]) -> None:
        """Apply a Secret; `data` is base64."""
        await self._apply_core(namespace, "secrets", "Secret", {"name": name}, {"data": dict(data)})

    async def apply_config_map(
        self, namespace: str, name: str, data: Mapping[str, str], owners: list[Document]
    ) -> None:
        """Apply a ConfigMap that lives as long as any of its owners."""
        metadata: Document = {"name": name, "ownerReferences": owners}
        await self._apply_core(namespace, "configmaps", "ConfigMap", metadata, {"data": dict(data)})

    async def warnings_of(self, namespace: str, uid: str) -> list[FieldReader]:
        """Return the newest Warnings of an object; Unreadable where they are not as Kubernetes has them."""
        query = {"fieldSelector": f"involvedObject.uid={uid},type=Warning", "limit": "50"}
        path = f"/api/v1/namespaces/{namespace}/events"
        return FieldReader(await self.request("list", "GET", path, query=query)).objects("items")

    async def create_event(self, namespace: str, event: Document) -> None:
        """Create an Event."""
        await self.request("event", "POST", f"/api/v1/namespaces/{namespace}/events", event)

    async def _apply_core(
        self, namespace: str, plural: str, kind: str, metadata: Document, body: Document
    ) -> None:
        path = f"/api/v1/namespaces/{namespace}/{plural}/{metadata['name']}"
        await self._apply(path, {"apiVersion": "v1", "kind": kind, "metadata": metadata} | body)

    async def _apply(self, path: str, body: Document, verb: str = "apply") -> None:
        query = {"fieldManager": MANAGER, "force": "true"}
        await self.request(verb, "PATCH", path, body, content_type=_APPLY, query=query)

    async def _get(self, path: str) -> Document | None:
        try:
            return await self.request("get", "GET", path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def _delete(self, path: str, options: Document) -> None:
        try:
            await self.request("delete", "DELETE", path, options)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    async def request(
        self,
        verb: str,
        method: str,
        path: str,
        body: Document | None = None,
        *,
        content_type: str = "application/json",
        query: Mapping[str, str] | None = None,
        accept: str = "application/json",
    ) -> Document:
        """Send one request and return the decoded answer; ApiError for anything but success."""
        url = path if not query else f"{path}?{urlencode(query)}"
        headers = {"Content-Type": content_type, "Accept": accept}
        try:
            _, address, sent, _, _ = await self._client.param_serialize(
                method, url, header_params=headers, auth_settings=["BearerToken"]
            )
            answer = await self._client.call_api(
                method, address, sent, body, _request_timeout=REQUEST_SECONDS
            )
            text = await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.requests[verb, "0"] += 1
            raise ApiError(0, "Unreachable", f"the API server does not answer: {error}") from None
        self.requests[verb, str(answer.status)] += 1
        found: Document = _decode(text)
        if answer.status >= 400:
            reason = str(found.get("reason") or answer.status)
            raise ApiError(answer.status, reason, str(found.get("message") or reason))
        return found


def _custom(kind: str, metadata: Document, status: Document) -> Document:
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": kind, "metadata": metadata, "status": status}


def _decode(text: bytes) -> Document:
    try:
        found = decode(text)
    except ValueError:
        return {"message": text[:200].decode(errors="replace")}
    return found if isinstance(found, dict) else {}


def own_namespace(directory: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount")) -> str | None:
    """Return the namespace this Pod runs in, None outside a cluster."""
    try:
        return (directory / "namespace").read_text().strip()
    except OSError:
        return None
