# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hugging Face hub: one gated repository, served from a directory over real HTTP."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    server: "Hub"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        if hub.status != 200:
            return self._send(hub.status, b"", body, {})
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            hub.refused += 1
            return self._send(401, b"", body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if path.startswith("/api/models/"):
            found = [{"type": "file", "path": p.name, "oid": "0", "size": 1} for p in hub.files.iterdir()]
            info = {
                "id": hub.repository,
                "sha": COMMIT,
                "siblings": [{"rfilename": f["path"]} for f in found],
            }
            return self._send(200, json.dumps(found if "/tree/" in path else info).encode(), body, {})
        file = hub.files / path.rpartition("/")[2]
        if not path.startswith(f"/{hub.repository}/resolve/") or not file.is_file():
            return self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
        data = file.read_bytes()
        tag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        return self._send(200, data, body, {"X-Repo-Commit": COMMIT} | tag)

    def _send(self, status: int, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


class Hub(ThreadingHTTPServer):
    """Serves `files` as `repository` to whom brings the token; `refused` counts the others' requests."""

    def __init__(self, repository: str, files: Path, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository, self.files, self.token = repository, files, token
        self.refused = 0
        self.status = 200
        """Of every answer; 200 lets it serve."""

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def hub(repository: str, files: Path, token: str) -> Iterator[Hub]:
    """Serve until the end of the block."""
    server = Hub(repository, files, token)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
