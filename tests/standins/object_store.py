# SPDX-License-Identifier: Apache-2.0
"""An object store on loopback that speaks S3's uploads: it keeps what is signed with the one key it knows."""

import hashlib
import hmac
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

KEY, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI-a-secret-that-never-leaves"


class ObjectStore:
    """`objects` by path; `answer` is what every request gets instead, once it is set."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.order: list[str] = []
        self.answer: tuple[int, bytes] | None = None
        self._parts: dict[tuple[str, int], bytes] = {}
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, text = store.answer or store.put(self.command, self.path, self.headers, body)
                self.send_response(status)
                self.send_header("ETag", '"x"')
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_HEAD = do_POST = do_DELETE = do_PUT

            def log_message(self, *_: Any) -> None:
                """Keep quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def put(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, bytes]:
        """Keep an object whose request is signed; return status and body of the answer."""
        if headers.get("Authorization", "").startswith("AWS4"):
            if not _signed(method, path, headers, body):
                return 403, b"<Code>SignatureDoesNotMatch</Code> internal-host-10.0.0.7"
        elif "Authorization" not in headers:
            return 401, b"who are you? internal-host-10.0.0.7"
        where, _, query = path.partition("?")
        where, parts = unquote(where), parse_qs(query, keep_blank_values=True)
        if "partNumber" in parts:
            self._parts[where, int(parts["partNumber"][0])] = body
            return 200, b""
        if method == "POST" and "uploads" in parts:
            return (
                200,
                b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>",
            )
        if method == "POST":
            numbers = sorted(number for name, number in self._parts if name == where)
            body = b"".join(self._parts[where, number] for number in numbers)
        self.objects[where] = body
        self.order.append(where)
        return 200, b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def _signed(method: str, path: str, headers: Any, body: bytes) -> bool:
    """Return whether AWS Signature Version 4 fits the request and the known key."""
    pattern = r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d+)/([^/]+)/s3/aws4_request, ?SignedHeaders=([^,]+), ?Signature=(\w+)"
    match = re.fullmatch(pattern, headers["Authorization"])
    if match is None or match[1] != KEY:
        return False
    _, day, region, names, signature = match.groups()
    where, _, query = path.partition("?")
    sent = "".join(f"{name}:{headers[name].strip()}\n" for name in names.split(";"))
    digest = hashlib.sha256(body).hexdigest()
    if headers["x-amz-content-sha256"] != digest:
        return False
    query = "&".join(sorted(part if "=" in part else f"{part}=" for part in query.split("&") if part))
    canonical = "\n".join((method, where, query, sent, names, digest))
    scope = f"{day}/{region}/s3/aws4_request"
    hashed = hashlib.sha256(canonical.encode()).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{headers['x-amz-date']}\n{scope}\n{hashed}"
    key = f"AWS4{SECRET}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.new(key, part.encode(), "sha256").digest()
    return hmac.compare_digest(hmac.new(key, text.encode(), "sha256").hexdigest(), signature)
