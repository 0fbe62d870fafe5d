# SPDX-License-Identifier: Apache-2.0
"""What the wire's fuzz sends: values, pieces, headers, paths and methods that are hard to read right."""

from dataclasses import dataclass
from typing import Any

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.5, -0.0, 5e-324, 1e308,
    float("nan"), float("inf"), float("-inf"), "", "x", "\x00", "a\nb\r\x1b[2J", "\ud800", "\u202e", "é" * 300,
    "9" * 5000, "NaN", "1e999", [], {}, [[]], [None] * 300, {"": ""}, {"a": {"a": {}}}, "0" * 64, "f" * 64,
]  # fmt: skip
PIECES = [
    b"\x00", b"\xff\xfe", b"\r\n", b"\n\n", b"\r\n\r\n", b"%0a%00%ff", b"{" * 2000, b"[" * 5000, b"a" * 70000,
    b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"ffffffffffffffff\r\n", b"-1", b"../..", b"\x16\x03\x01",
]  # fmt: skip
HEADERS = [
    b"Range: bytes=9-1", b"Range: bytes=-5", b"Range: bytes=0-", b"Range: bytes=" + b"9" * 5000 + b"-", b"Range: x",
    b"If-Range: \xff", b"If-Modified-Since: Mon, 01 Jan 99999999999999 00:00:00 GMT", b'If-None-Match: "\x7f", W/*',
    b"Expect: 100-continue", b"Expect: x", b"Upgrade: websocket\r\nConnection: Upgrade", b"Upgrade: h2c",
    b"Content-Encoding: gzip", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Content-Length: 10",
    b"Content-Length: -1", b"Content-Length: " + b"9" * 400, b"Content-Type: multipart/form-data; boundary=\xff",
    b"Cookie: " + b"a=\xff;" * 300, b"Accept-Encoding: gzip, br", b"Host: \xff", b"Connection: close", b"X: " + b"y" * 20000,
    b"Authorization: Bearer \xff\xfe", b"Authorization: Basic eDp5", b"Authorization: Bearer", b"Authorization: Digest x",
]  # fmt: skip
PATHS = [
    "/v1/job", "/v1/agents", "/v1/assignment?wait=0.1", "/v1/assignment?wait=nan", "/v1/assignment?wait=%ff&wait=1",
    "/v1/profile", "/v1/progress", "/v1/link", "/v1/blobs/" + "0" * 64, "/v1/blobs/..%2f..%2fledger.sqlite",
    "/v1/blobs/%0aforged", "/v1/rounds/1/update", "/v1/rounds/999999/update", "/v1/rounds/-1/evaluation",
    "/v1/rounds/0/evaluation", "/v1/rounds/%00/update", "/", "*", "//", "/v1/../v1/job", "http://[::1/", "/" + "a" * 8300,
]  # fmt: skip
METHODS = ["GET", "POST", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE", "get", "\x00"]


@dataclass(frozen=True)
class Message:
    """One request, before it is serialised."""

    method: str
    path: str
    headers: tuple[bytes, ...] = ()
    body: bytes = b""

    def to_bytes(self) -> bytes:
        """Return it as HTTP/1.1."""
        lines = [
            f"{self.method} {self.path} HTTP/1.1".encode("utf-8", "surrogateescape"),
            b"Host: coordinator",
        ]
        if not any(h.lower().startswith((b"content-length", b"transfer-encoding")) for h in self.headers):
            lines.append(b"Content-Length: %d" % len(self.body))
        return b"\r\n".join([*lines, *self.headers]) + b"\r\n\r\n" + self.body
