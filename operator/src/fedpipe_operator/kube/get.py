# SPDX-License-Identifier: Apache-2.0
"""`fedpipe get adapter`: fetches adapters from a cluster through the API server's service proxy.

What the user's kubeconfig logs in with never reaches the operator: the proxy does not hand it on, and a
stolen operator must not collect it. The API server is asked for a token of the job's namespace's
ServiceAccount fedpipe-adapter-reader, which lasts ten minutes and is good for adapters alone.
"""

import io
import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fedpipe_api.base import UserError
from fedpipe_api.logs import one_line
from fedpipe_api.names import ADAPTER_AUDIENCE, ADAPTER_READER, CA_CONFIGMAP, OPERATOR_KEY, TOKEN_HEADER

if TYPE_CHECKING:
    from kubernetes.aio import client

LIMIT = 4 << 30
"""Bytes of the largest adapter accepted."""

_TOO_LONG = f"the operator sends more than {LIMIT >> 30} GiB; this is no adapter"
_CHUNK = 1 << 20

TOKEN_SECONDS = 600
"""The shortest life that the API server gives a token."""

FILES = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
"""What a PEFT directory holds; nothing else is unpacked."""

NAMESPACE_NAME = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"


def service_of(source: str, text: str) -> tuple[str, str]:
    """Return namespace and name of a Service; UserError names the source of the text."""
    if not re.fullmatch(f"{NAMESPACE_NAME}/{NAMESPACE_NAME}", text):
        raise UserError(f"{source}: must be NAMESPACE/SERVICE")
    namespace, _, service = text.partition("/")
    return namespace, service


async def fetch(kubeconfig: Path | None, namespace: str, job: str, operator: tuple[str, str] | None) -> bytes:
    """Return a job's adapter as a tar; `operator` is namespace and name of its Service, None: find it.

    UserError says what is missing and who can give it.
    """
    # The client takes a second to import, which other commands need not wait for.
    from kubernetes.aio import client, config

    configuration = client.Configuration()
    try:
        await config.load_config(
            config_file=str(kubeconfig) if kubeconfig else None, client_configuration=configuration
        )
    except (config.ConfigException, OSError) as error:
        raise UserError(f"kubeconfig: {error}; set KUBECONFIG or give --kubeconfig") from None
    async with client.ApiClient(configuration) as api_client:
        api = _Api(api_client)
        where, service = operator or await _find_operator(api, namespace)
        token = await _token(api, namespace, service)
        path = f"/api/v1/namespaces/{where}/services/https:{service}:coordinator/proxy"
        status, body = await api.call(
            "GET", f"{path}/v1/jobs/{namespace}/{quote(job, safe='')}/adapter", headers={TOKEN_HEADER: token}
        )
    if status != 200:
        raise UserError(f"{where}/{service}: {_message(status, body)}")
    return body


async def _find_operator(api: "_Api", namespace: str) -> tuple[str, str]:
    """Return where the operator says it is, in the job's namespace.

    A Service found by its label could be anybody's; this ConfigMap is in the hands of the job's namespace.
    """
    status, body = await api.call("GET", f"/api/v1/namespaces/{namespace}/configmaps/{CA_CONFIGMAP}")
    found = _json(body) if status == 200 else {}
    place = (found.get("data") or {}).get(OPERATOR_KEY)
    if status not in (200, 404):
        raise UserError(f"ConfigMap {namespace}/{CA_CONFIGMAP}: {_message(status, body)}")
    if not isinstance(place, str):
        raise UserError(
            f"namespace {namespace} has no ConfigMap {CA_CONFIGMAP} that names the operator, so no jobs; "
            f"check --namespace, or give --operator NAMESPACE/SERVICE"
        )
    return service_of(f"ConfigMap {namespace}/{CA_CONFIGMAP}: {OPERATOR_KEY}", place)


async def _token(api: "_Api", namespace: str, service: str) -> str:
    """Return a token that is good for reading adapters of the namespace, and for nothing else."""
    account = f"/api/v1/namespaces/{namespace}/serviceaccounts/{ADAPTER_READER}"
    request = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"audiences": [ADAPTER_AUDIENCE], "expirationSeconds": TOKEN_SECONDS},
    }
    status, body = await api.call("POST", f"{account}/token", request)
    if status == 404:
        raise UserError(
            f"namespace {namespace} has no ServiceAccount {ADAPTER_READER}; its administrator makes one: "
            f"kubectl create serviceaccount {ADAPTER_READER} -n {namespace} && "
            f"kubectl create rolebinding {ADAPTER_READER} -n {namespace} "
            f"--clusterrole={service}-adapter-reader --serviceaccount={namespace}:{ADAPTER_READER}"
        )
    if status != 201:
        raise UserError(f"a token of ServiceAccount {namespace}/{ADAPTER_READER}: {_message(status, body)}")
    return str(_json(body)["status"]["token"])


class _Api:
    """Requests with the user's own kubeconfig, whatever it logs in with."""

    def __init__(self, api_client: "client.ApiClient") -> None:
        self._client = api_client

    async def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, bytes]:
        """Return status and body of any answer; UserError when there is none."""
        import aiohttp
        from kubernetes.aio.client import ApiException

        given = dict(headers or {}) | ({"Content-Type": "application/json"} if body else {})
        try:
            _, address, sent, _, _ = await self._client.param_serialize(
                method, path, header_params=given, auth_settings=["BearerToken"]
            )
            answer = await self._client.call_api(method, address, sent, body)
            if (answer.response.content_length or 0) > LIMIT:
                raise UserError(_TOO_LONG)
            received = bytearray()
            async for chunk in answer.response.content.iter_chunked(_CHUNK):
                received += chunk
                # An answer without a length may have no end.
                if len(received) > LIMIT:
                    raise UserError(_TOO_LONG)
            return answer.status, bytes(received)
        except (aiohttp.ClientError, ApiException, TimeoutError) as error:
            raise UserError(f"the API server does not answer: {error}") from None


def _json(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _message(status: int, body: bytes) -> str:
    """Return what a refusal says: the API server's, or the operator's, or another one's on the way."""
    found = _json(body)
    text = found.get("message") or found.get("error") or body[:500].decode(errors="replace").strip()
    return f"{one_line(str(text))[:1024] or 'no reason given'} ({status})"


def unpack(body: bytes, directory: Path) -> None:
    """Write the files of a tar of a PEFT directory; UserError for anything that is none."""
    files = adapter_files(body)
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)


def adapter_files(body: bytes) -> dict[str, bytes]:
    """Return the files of a tar of a PEFT directory by name; UserError for anything that is none."""
    try:
        with tarfile.open(fileobj=io.BytesIO(body), mode="r:") as archive:
            members = archive.getmembers()
            names = [member.name for member in members]
            # A sparse file is one of a few bytes that becomes any size when it is read.
            plain = all(m.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not m.issparse() for m in members)
            if set(names) - FILES or len(names) != len(set(names)) or not plain:
                raise UserError(f"the operator sent an unexpected archive: {names[:5]!a:.200}")
            return {m.name: found.read() for m in members if (found := archive.extractfile(m))}
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise UserError(f"the operator sent no archive: {one_line(str(error))}") from None
