# SPDX-License-Identifier: Apache-2.0
"""Where the operator keeps its certificate, and the CA that probes trust, on an API server."""

import asyncio
import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from kubernetes.aio import client, config

from fedpipe_operator.kube.api import Api
from fedpipe_operator.kube.certificates import Authority
from fedpipe_operator.kube.pods import CA_KEY
from fedpipe_operator.kube.settings import OperatorSettings
from kube.controlplane import ControlPlane


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    name = "authority"
    control_plane.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    yield name
    for kind, thing in (("secrets", "edge-tls"), ("configmaps", "edge-operator-ca")):
        control_plane.request("DELETE", f"/api/v1/namespaces/{name}/{kind}/{thing}")


def read(plane: ControlPlane, namespace: str, kind: str, name: str) -> dict[str, Any] | None:
    status, found = plane.request("GET", f"/api/v1/namespaces/{namespace}/{kind}/{name}")
    return dict(found) if status == 200 else None


def load(
    plane: ControlPlane, settings: OperatorSettings, meanwhile: Callable[[], object] = lambda: None
) -> None:
    """Look twice, with something between."""

    async def run() -> None:
        configuration = client.Configuration()
        await config.load_kube_config(str(plane.kubeconfig), client_configuration=configuration)
        api = Api(client.ApiClient(configuration))
        try:
            authority = Authority(api, settings)
            await authority.load()
            await asyncio.to_thread(meanwhile)
            await authority.load()
            # The Secret once, the ConfigMap at each look.
            assert api.requests["apply", "200"] + api.requests["apply", "201"] <= 3
        finally:
            await api.close()

    asyncio.run(run())


def settings(namespace: str, ca_config_map: str | None) -> OperatorSettings:
    return OperatorSettings(
        namespace=namespace,
        service="edge",
        store=Path("/store"),
        agent_image="agent:1",
        operator_image="op:1",
        ca_config_map=ca_config_map,
    )


def test_probes_are_given_the_authority_that_signed(control_plane: ControlPlane, namespace: str) -> None:
    # As the chart makes it: there, and empty.
    path = f"/api/v1/namespaces/{namespace}/configmaps"
    control_plane.request("POST", path, {"metadata": {"name": "edge-operator-ca", "labels": {"of": "chart"}}})
    load(control_plane, settings(namespace, "edge-operator-ca"))
    secret = read(control_plane, namespace, "secrets", "edge-tls")
    reported = read(control_plane, namespace, "configmaps", "edge-operator-ca")
    assert secret is not None
    assert reported is not None
    assert reported["metadata"]["labels"] == {"of": "chart"}
    assert not reported["metadata"].get("ownerReferences")
    [authority] = x509.load_pem_x509_certificates(reported["data"][CA_KEY].encode())
    leaf = x509.load_pem_x509_certificate(base64.b64decode(secret["data"]["tls.crt"]))
    leaf.verify_directly_issued_by(authority)


def test_a_config_map_that_was_emptied_is_filled_again(control_plane: ControlPlane, namespace: str) -> None:
    path = f"/api/v1/namespaces/{namespace}/configmaps/edge-operator-ca"
    emptied = []

    def empty() -> None:
        answer = control_plane.request("PATCH", path, {"data": None}, "application/merge-patch+json")
        emptied.append((answer[0], answer[1].get("data")))

    load(control_plane, settings(namespace, "edge-operator-ca"), empty)
    assert emptied == [(200, None)]
    reported = read(control_plane, namespace, "configmaps", "edge-operator-ca")
    assert reported is not None
    assert x509.load_pem_x509_certificates(reported["data"][CA_KEY].encode())


def test_nothing_is_kept_for_probes_that_do_not_ask(control_plane: ControlPlane, namespace: str) -> None:
    load(control_plane, settings(namespace, None))
    assert read(control_plane, namespace, "secrets", "edge-tls")
    assert read(control_plane, namespace, "configmaps", "edge-operator-ca") is None
