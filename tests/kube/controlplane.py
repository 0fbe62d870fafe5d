# SPDX-License-Identifier: Apache-2.0
"""A Kubernetes control plane for tests: etcd and kube-apiserver on loopback, RBAC on; else an emulator.

Binaries are looked for as envtest does: `KUBEBUILDER_ASSETS`, else `/usr/local/kubebuilder/bin`; etcd also on
PATH. Where there are none, `kube.emulator` takes the API server's place. Nothing else runs: no controllers (no
garbage collection, no ServiceAccount `default`), no scheduler and no kubelet.
"""

import ctypes
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

from kube.emulator import start_emulator

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 60
ATTEMPTS = 5
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Binaries:
    """Where the control plane's programs are; kubectl may be missing."""

    apiserver: Path
    etcd: Path
    kubectl: Path | None


def find_binaries() -> Binaries | None:
    """Return the control plane's programs, or None when this machine has none."""
    folder = Path(os.environ.get("KUBEBUILDER_ASSETS") or "/usr/local/kubebuilder/bin")
    apiserver = folder / "kube-apiserver"
    etcd = folder / "etcd" if (folder / "etcd").is_file() else shutil.which("etcd")
    kubectl = folder / "kubectl"
    if not apiserver.is_file() or etcd is None:
        return None
    return Binaries(apiserver, Path(etcd), kubectl if kubectl.is_file() else None)


def describe_binaries() -> str:
    """Return one line on what the tests of the cluster run against."""
    found = find_binaries()
    if found is None:
        return "none found (KUBEBUILDER_ASSETS, /usr/local/kubebuilder/bin)"
    version = subprocess.run([found.apiserver, "--version"], capture_output=True, text=True, check=False)
    return f"{version.stdout.strip()} ({found.apiserver}), etcd {found.etcd}"


@dataclass(frozen=True)
class ControlPlane:
    """A running control plane and the administrator's way in; an emulated one has no binaries."""

    url: str
    token: str
    ca: Path
    directory: Path
    binaries: Binaries | None

    def needs(self, what: str) -> None:
        """Skip the test unless the API server is a real one: the emulator does not have this."""
        if self.binaries is None:
            pytest.skip(f"needs a real API server for {what}; the emulator has none")

    @cached_property
    def kubeconfig(self) -> Path:
        """A kubeconfig file for the administrator."""
        return self.kubeconfig_for("admin", self.token)

    @cached_property
    def _context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.ca))

    def kubeconfig_for(self, name: str, token: str) -> Path:
        """Write a kubeconfig file for another bearer token, such as a ServiceAccount's."""
        path = self.directory / f"{name}.kubeconfig"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [
                {"name": "test", "cluster": {"server": self.url, "certificate-authority": str(self.ca)}}
            ],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
            "users": [{"name": name, "user": {"token": token}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        content_type: str = "application/json",
        token: str = "",
    ) -> tuple[int, Any]:
        """Call the API and return the status code and the decoded body."""
        address = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPSConnection(
            address.hostname, address.port, timeout=30, context=self._context
        )
        headers = {"Authorization": f"Bearer {token or self.token}", "Content-Type": content_type}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(text) if is_json else text.decode()

    def kubectl(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run kubectl as the administrator; skips the test when there is none."""
        self.needs("kubectl")
        assert self.binaries is not None
        if self.binaries.kubectl is None:
            pytest.skip("no kubectl beside kube-apiserver")
        command = [self.binaries.kubectl, "--kubeconfig", self.kubeconfig, *arguments]
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.directory)}
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=60, env=environment, check=False
        )

    def install_crds(self) -> None:
        """Create or replace FedPipe's CustomResourceDefinitions and wait until they are served."""
        group = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        for file in sorted((REPOSITORY / "crds").glob("fedpipe.io_*.yaml")):
            manifest = yaml.safe_load(file.read_text())
            path = f"{group}/{manifest['metadata']['name']}"
            apply = "?fieldManager=test&force=true&fieldValidation=Strict"
            status, answer = self.request("PATCH", path + apply, manifest, "application/apply-patch+yaml")
            assert status in (200, 201), f"{file.name}: {answer['message']}"
            until = time.monotonic() + START_SECONDS
            while not _is_established(self.request("GET", path)[1]):
                assert time.monotonic() < until, f"{file.name}: not established"
                time.sleep(0.02)


def _is_established(definition: dict[str, Any]) -> bool:
    conditions = {entry["type"]: entry for entry in definition.get("status", {}).get("conditions") or ()}
    faults = conditions.get("NonStructuralSchema")
    assert faults is None, faults
    return conditions.get("Established", {}).get("status") == "True"


@contextmanager
def start_control_plane(directory: Path, binaries: Binaries) -> Iterator[ControlPlane]:
    """Run etcd and kube-apiserver in the given directory until the block ends."""
    token = secrets.token_hex(16)
    (directory / "tokens.csv").write_text(f'{token},admin,admin,"system:masters"\n')
    with _server(directory / "etcd.log", _etcd_command(binaries, directory), _answers_http) as etcd_port:
        certificates = directory / "certs"

        def ready(port: int) -> bool:
            return plane(port).request("GET", "/readyz")[0] == 200

        def plane(port: int) -> ControlPlane:
            url = f"https://127.0.0.1:{port}"
            # The server writes its own certificate here before it listens.
            return ControlPlane(url, token, certificates / "apiserver.crt", directory, binaries)

        command = _apiserver_command(binaries, directory, certificates, etcd_port)
        with _server(directory / "apiserver.log", command, ready) as port:
            yield plane(port)


@contextmanager
def start_emulated_plane(directory: Path) -> Iterator[ControlPlane]:
    """Run the emulator in this process until the block ends."""
    token = secrets.token_hex(16)
    with start_emulator(directory, token) as (url, ca):
        yield ControlPlane(url, token, ca, directory, None)


def _etcd_command(binaries: Binaries, directory: Path) -> Callable[[int], list[str]]:
    return lambda port: [
        str(binaries.etcd),
        f"--data-dir={directory / 'etcd'}",
        f"--listen-client-urls=http://127.0.0.1:{port}",
        f"--advertise-client-urls=http://127.0.0.1:{port}",
        "--listen-peer-urls=http://127.0.0.1:0",
        "--unsafe-no-fsync",
    ]


def _apiserver_command(
    binaries: Binaries, directory: Path, certificates: Path, etcd_port: int
) -> Callable[[int], list[str]]:
    return lambda port: [
        str(binaries.apiserver),
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        f"--secure-port={port}",
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",
        "--endpoint-reconciler-type=none",
        f"--cert-dir={certificates}",
        "--authorization-mode=RBAC",
        f"--token-auth-file={directory / 'tokens.csv'}",
        "--service-cluster-ip-range=10.0.0.0/24",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={certificates / 'apiserver.key'}",
        f"--service-account-signing-key-file={certificates / 'apiserver.key'}",
        "--allow-privileged=true",
    ]


def _answers_http(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    finally:
        connection.close()


@contextmanager
def _server(log: Path, command: Callable[[int], list[str]], ready: Callable[[int], bool]) -> Iterator[int]:
    """Run a server on a free port until the block ends; try again if another process takes the port."""
    for _ in range(ATTEMPTS):
        port = _free_port()
        with log.open("ab") as output:
            process = subprocess.Popen(
                command(port),
                stdout=output,
                stderr=output,
                preexec_fn=_die_with_parent,  # noqa: PLW1509
            )
        try:
            if _becomes_ready(process, lambda port=port: ready(port)):
                yield port
                return
        finally:
            _stop(process)
    raise RuntimeError(f"{log.stem} did not start:\n" + log.read_text(errors="replace")[-4000:])


def _becomes_ready(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> bool:
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        with suppress(OSError, http.client.HTTPException):
            if ready():
                return True
        time.sleep(0.05)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """Have Linux end the server when the test run is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane with FedPipe's CRDs, shared by all tests of the run: real, or emulated where it must be."""
    directory = tmp_path_factory.mktemp("control-plane")
    binaries = find_binaries()
    start = start_control_plane(directory, binaries) if binaries else start_emulated_plane(directory)
    with start as plane:
        plane.install_crds()
        yield plane
