# SPDX-License-Identifier: Apache-2.0
"""A client that sends any bytes over TLS and reads what comes back."""

import asyncio
import re
import ssl

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]

_CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
_CONTEXT.check_hostname, _CONTEXT.verify_mode = False, ssl.CERT_NONE


async def connect(port: int, address: str = "127.0.0.1") -> Stream:
    """Open a TLS connection to a loopback port from a loopback address."""
    return await asyncio.open_connection(
        "127.0.0.1", port, ssl=_CONTEXT, local_addr=(address, 0), limit=1 << 22
    )


def request(line: str, token: str | bytes | None = "job-0/node-0", *headers: str, body: bytes = b"") -> bytes:
    """Return the bytes of a request."""
    head = [f"{line} HTTP/1.1".encode(), b"Host: coordinator", *(header.encode() for header in headers)]
    if token is not None:
        head.append(b"Authorization: Bearer " + (token if isinstance(token, bytes) else token.encode()))
    return b"\r\n".join(head) + b"\r\n\r\n" + body


async def answer(stream: Stream, seconds: float = 30) -> tuple[int, bytes, bytes]:
    """Read one answer: status, head and body; status 0 when the connection ends without."""
    try:
        async with asyncio.timeout(seconds):
            head = await stream[0].readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            body = await stream[0].readexactly(int(length[1]) if length else 0)
    except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
        return 0, b"", b""
    return int(head.split()[1]), head, body
