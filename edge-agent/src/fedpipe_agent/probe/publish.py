# SPDX-License-Identifier: Apache-2.0
"""Writes this node's FedPipeNode by server-side apply, as the field manager `fedpipe-probe`."""

import base64
import contextlib
import http.client
import json
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from fedpipe_api.base import UserError, explain
from fedpipe_api.names import GROUP, NODES, VERSION
from fedpipe_api.node import (
    DEVICE_LOST,
    DRIVER_FAULT,
    MEMORY_PRESSURE,
    READY,
    FedPipeNode,
    FedPipeNodeStatus,
    PrecisionSupport,
)

FIELD_MANAGER = "fedpipe-probe"
OWN_CONDITIONS = (READY, DRIVER_FAULT, DEVICE_LOST, MEMORY_PRESSURE)
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TOKEN_LIMIT = 64 * 1024
TIMEOUT = 10.0
"""Seconds for connecting, and for each wait on the answer."""
RESPONSE_LIMIT = 4 * 1024 * 1024


class PublishError(Exception):
    """A write that did not happen; the reason is a CamelCase word for metrics and logs."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class NodeIdentity:
    """The Node that a bound ServiceAccount token names."""

    node: str
    uid: str


@dataclass(frozen=True)
class Cluster:
    """Where the API server is and how to speak to it; `ca` None trusts the system's authorities."""

    url: str
    token: Path
    ca: Path | None

    @classmethod
    def of_pod(cls, environment: Mapping[str, str] = os.environ) -> "Cluster":
        """Return the cluster this Pod runs in. Raises UserError outside a Pod."""
        host = environment.get("KUBERNETES_SERVICE_HOST")
        if not host:
            raise UserError("this is no Pod of a cluster; use --once to print what the node can carry")
        host = f"[{host}]" if ":" in host else host
        port = environment.get("KUBERNETES_SERVICE_PORT", "443")
        return cls(f"https://{host}:{port}", SERVICE_ACCOUNT / "token", SERVICE_ACCOUNT / "ca.crt")

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection to the API server, not yet opened. Raises OSError for an unreadable CA."""
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        if parts.scheme == "http":
            return http.client.HTTPConnection(host, parts.port, timeout=TIMEOUT)
        context = ssl.create_default_context(cafile=self.ca)
        return http.client.HTTPSConnection(host, parts.port, timeout=TIMEOUT, context=context)

    def read_token(self) -> str:
        """Return the token, read each time because the kubelet renews it. Raises PublishError."""
        try:
            with self.token.open() as file:
                return file.read(TOKEN_LIMIT).strip()
        except OSError as error:
            raise PublishError("NoToken", f"{self.token}: {error.strerror}; mount the token") from None

    def identity(self) -> NodeIdentity:
        """Return the Node that the token is bound to; the admission policy lets the probe write no other.

        The token is this process's own: it is decoded, not verified. Raises PublishError without the claim.
        """
        try:
            payload = self.read_token().split(".")[1]
            claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
            node = claims["kubernetes.io"]["node"]
            return NodeIdentity(node=str(node["name"]), uid=str(node["uid"]))
        except (IndexError, KeyError, TypeError, ValueError):
            raise PublishError(
                "NoNodeClaim", f"{self.token}: the token names no Node; Kubernetes 1.30 or later is needed"
            ) from None


class Publisher:
    """Keeps one FedPipeNode written. Not for use by several threads.

    Every write carries the resource version last seen, so that it can never overwrite what another manager
    wrote meanwhile: precisions verified by the operator are seen first and then left to it.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._version: str | None = None
        self.verified: tuple[PrecisionSupport, ...] = ()

    def load(self) -> FedPipeNodeStatus | None:
        """Return this node's last status, with the probe's own conditions only; create the object if need be.

        Sets `verified`, the precisions that others proved. Raises PublishError.
        """
        identity = self._cluster.identity()
        try:
            found = self._call("GET", _path(identity))
        except PublishError as error:
            if error.reason != "NotFound":
                raise
            found = {}
        owners = found.get("metadata", {}).get("ownerReferences", [])
        if not any(owner.get("uid") == identity.uid for owner in owners):
            found = self._call("PATCH", _path(identity), _owned_object(identity))
        return self._keep(found)

    def write(self, status: FedPipeNodeStatus) -> None:
        """Apply the status. Raises PublishError."""
        identity = self._cluster.identity()
        for last in (False, False, True):
            if self._version is None:
                self.load()
            own = tuple(
                support
                for support in status.precisions
                if support.precision not in {proven.precision for proven in self.verified}
            )
            body = _object(identity, {"resourceVersion": self._version})
            body["status"] = status.model_copy(update={"precisions": own}).to_dict()
            try:
                self._keep(self._call("PATCH", f"{_path(identity)}/status", body))
            except PublishError as error:
                self._version = None
                if last or error.reason not in ("Conflict", "NotFound"):
                    raise
            else:
                return

    def _keep(self, found: dict[str, Any]) -> FedPipeNodeStatus | None:
        try:
            node = FedPipeNode.model_validate(found)
        except ValidationError as error:
            raise PublishError(
                "InvalidObject", f"the FedPipeNode read back is not valid: {explain(error)}"
            ) from None
        self._version = found["metadata"].get("resourceVersion")
        if node.status is None:
            self.verified = ()
            return None
        self.verified = tuple(support for support in node.status.precisions if support.verified)
        own = tuple(condition for condition in node.status.conditions if condition.type in OWN_CONDITIONS)
        return node.status.model_copy(update={"conditions": own})

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._cluster.read_token()}", "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/apply-patch+yaml"
            path += f"?fieldManager={FIELD_MANAGER}&force=true"
        status, text = self._exchange(method, path, None if body is None else json.dumps(body), headers)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise PublishError(f"Http{status}", f"{method} {path}: the answer is not a JSON object")
        if status >= 400:
            reason = str(answer.get("reason") or f"Http{status}")
            raise PublishError(reason, f"{method} {path.partition('?')[0]}: {answer.get('message', reason)}")
        return answer

    def _exchange(
        self, method: str, path: str, body: str | None, headers: dict[str, str]
    ) -> tuple[int, bytes]:
        """Send one request on a connection of its own: writes are minutes apart and the CA may change."""
        try:
            connection = self._cluster.connect()
            with contextlib.closing(connection):
                connection.request(method, path, body=body, headers=headers)
                response = connection.getresponse()
                return response.status, response.read(RESPONSE_LIMIT)
        except (OSError, http.client.HTTPException) as error:
            raise PublishError(
                "Unreachable", f"{self._cluster.url}: {error or type(error).__name__}"
            ) from None


def _path(identity: NodeIdentity) -> str:
    return f"/apis/{GROUP}/{VERSION}/{NODES}/{identity.node}"


def _object(identity: NodeIdentity, metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "FedPipeNode",
        "metadata": {"name": identity.node} | metadata,
    }


def _owned_object(identity: NodeIdentity) -> dict[str, Any]:
    """Return the object with its Node as owner, so that Kubernetes collects it with the Node."""
    owner = {"apiVersion": "v1", "kind": "Node", "name": identity.node, "uid": identity.uid}
    return _object(identity, {"ownerReferences": [owner]})
