# SPDX-License-Identifier: Apache-2.0
"""An API server with one FedPipeNode: apply, resource versions and refusals, as far as the probe needs."""

import base64
import copy
import json
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fedpipe_agent.probe.publish import Cluster

NODE = "edge-1"
UID = "7f1d0b9e-52a5-4f6c-9d21-3b0a6f3b2c11"
PATH = f"/apis/fedpipe.io/v1alpha1/fedpipenodes/{NODE}"


def token(node: str | None = NODE) -> str:
    """Return a token bound to a Node, or to none; its signature is nobody's business here."""
    bound = {"node": {"name": node, "uid": UID}} if node else {}
    parts = [{"alg": "RS256"}, {"kubernetes.io": {"namespace": "fedpipe"} | bound}]
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*encoded, "c2lnbmF0dXJl"])


class ApiServer:
    """Answers the probe; `refuse` is a (status, reason) for all calls, `proven` the operator's precisions."""

    def __init__(self, directory: Path) -> None:
        self.node: dict[str, Any] | None = None
        self.refuse: tuple[int, str] | None = None
        self.proven: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str, dict[str, Any] | None]] = []
        self._lock = threading.Lock()
        self._version = 0
        self._directory = directory
        self.url = ""
        self.ca: Path | None = None

    def cluster(self, node: str | None = NODE) -> Cluster:
        """Return how a probe on the node reaches this server."""
        path = self._directory / "token"
        path.write_text(token(node))
        return Cluster(self.url, path, self.ca)

    def touch(self) -> None:
        """Let somebody else write the object."""
        assert self.node is not None
        self._version += 1
        self.node["metadata"]["resourceVersion"] = str(self._version)

    def prove(self, precision: str, **facts: Any) -> None:
        """Let the operator record a verified precision."""
        self.proven.append({"precision": precision, "verified": True, "usable": True} | facts)
        assert self.node is not None
        self.node["status"]["precisions"] = self._with_proven(self.node["status"].get("precisions", []))
        self.touch()

    @property
    def writes(self) -> list[dict[str, Any]]:
        """The statuses that were applied or tried."""
        return [body["status"] for _, path, body in self.requests if body and "/status" in path]

    def answer(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the body of the answer."""
        with self._lock:
            self.requests.append((method, path, body))
            if self.refuse:
                return self.refuse[0], _status(*self.refuse)
            resource, _, query = path.partition("?")
            if resource not in (PATH, f"{PATH}/status"):
                return 403, _status(403, "Forbidden")
            if method == "GET":
                return (200, self.node) if self.node else (404, _status(404, "NotFound"))
            if query != "fieldManager=fedpipe-probe&force=true" or body is None:
                return 400, _status(400, "BadRequest")
            return self._apply(resource, body)

    def _apply(self, resource: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if resource == PATH:
            self.node = (self.node or {}) | copy.deepcopy(body)
            self.touch()
            return 201, self.node
        if self.node is None:
            return 404, _status(404, "NotFound")
        if body["metadata"].get("resourceVersion") not in (None, self.node["metadata"]["resourceVersion"]):
            return 409, _status(409, "Conflict")
        status = body["status"]
        self.node["status"] = status | {"precisions": self._with_proven(status["precisions"])}
        self.touch()
        return 200, self.node

    def _with_proven(self, precisions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        proven = {entry["precision"] for entry in self.proven}
        return [*self.proven, *(entry for entry in precisions if entry["precision"] not in proven)]


def _status(code: int, reason: str) -> dict[str, Any]:
    return {"kind": "Status", "code": code, "reason": reason, "message": f"{reason} by the test"}


def _certify(directory: Path) -> tuple[Path, Path]:
    """Return a certificate for 127.0.0.1 that is its own authority, and its key."""
    certificate, key = directory / "ca.crt", directory / "ca.key"
    options = ["-newkey", "rsa:2048", "-nodes", "-subj", "/CN=api", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", *options, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@contextmanager
def serve(directory: Path, tls: bool = False) -> Iterator[ApiServer]:
    """Serve on a free port of this machine."""
    api = ApiServer(directory)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _answer(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            code, answer = api.answer(self.command, self.path, json.loads(data) if data else None)
            text = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PATCH = _answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    api.url = f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
    if tls:
        api.ca, key = _certify(directory)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(api.ca, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
