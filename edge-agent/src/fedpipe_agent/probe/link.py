# SPDX-License-Identifier: Apache-2.0
"""The rate of the link to the coordinator, measured by a small download."""

import contextlib
import http.client
import re
import ssl
import time
from pathlib import Path
from urllib.parse import urlsplit

from .child import Child, Died, Stuck, Wait

SAMPLE_BYTES = 1024 * 1024
MEANINGFUL_BYTES = 64 * 1024
TIMEOUT = 10.0
"""Seconds for connecting, for each wait on the answer, and for the download."""
DEADLINE = 30.0
"""Seconds that all of it may take, looking up the name included."""

UNKNOWN_ISSUER = (2, 18, 19, 20, 21)
"""OpenSSL's verify codes for a chain that ends at no trusted authority."""


class LinkError(Exception):
    """The rate cannot be measured; the text says why."""


def measure(url: str, ca: Path | None = None, *, wait: Wait | None = None, child: Child | None = None) -> int:
    """Return bytes per second of a ranged GET of at most SAMPLE_BYTES. Raises LinkError.

    The clock starts with the first bytes, so that connecting does not count; a sample below MEANINGFUL_BYTES
    gives no rate. No credentials are sent and no redirect is followed. `ca` None trusts the system's
    authorities. All is done in the child, which has the timeout; `wait` as in `Child.ask`.
    """
    child = child or Child(DEADLINE)
    try:
        kind, _, text = child.ask(lambda: _answer(url, ca), wait).decode().partition(" ")
    except (TimeoutError, Stuck) as error:
        raise LinkError(str(error) or "an earlier measurement does not end") from None
    except Died as how:
        raise LinkError(f"the process that measures it died {how}") from None
    if kind != "rate":
        raise LinkError(text)
    return int(text)


def check_authorities(ca: Path) -> None:
    """Raise LinkError when the file cannot be opened."""
    try:
        ca.open("rb").close()
    except OSError as error:
        raise LinkError(f"{ca}: {error.strerror}") from None


def _answer(url: str, ca: Path | None) -> bytes:
    try:
        return f"rate {_measure(url, ca)}".encode()
    except LinkError as error:
        return f"error {error}".encode()
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"error {_reason(error)}".encode()


def _reason(error: Exception) -> str:
    text = re.sub(r" \(_ssl\.c:\d+\)", "", str(error)) or type(error).__name__
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in UNKNOWN_ISSUER:
        return f"{text}; name its authority with --ca-file"
    return text


def _measure(url: str, ca: Path | None) -> int:
    parts = urlsplit(url)
    path = parts._replace(scheme="", netloc="").geturl() or "/"
    host = parts.hostname or ""
    connection = http.client.HTTPConnection(host, parts.port, timeout=TIMEOUT)
    if parts.scheme == "https":
        if ca is not None:
            check_authorities(ca)
        context = ssl.create_default_context(cafile=ca)
        connection = http.client.HTTPSConnection(host, parts.port, timeout=TIMEOUT, context=context)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Range": f"bytes=0-{SAMPLE_BYTES - 1}"})
        response = connection.getresponse()
        if response.status not in (200, 206):
            raise LinkError(f"it answered {response.status} {response.reason}")
        first, received, seconds = _download(response)
    if first + received < MEANINGFUL_BYTES or seconds <= 0:
        raise LinkError(f"{first + received} bytes are too few; at least {MEANINGFUL_BYTES} are needed")
    return max(1, round(received / seconds))


def _download(response: http.client.HTTPResponse) -> tuple[int, int, float]:
    """Return the bytes that came first (0 or 1), those within TIMEOUT after them, and their seconds."""
    first = len(response.read(1))
    started = time.monotonic()
    received = 0
    while first and received < SAMPLE_BYTES and time.monotonic() - started < TIMEOUT:
        part = response.read1(65536)
        if not part:
            break
        received += len(part)
    return first, received, time.monotonic() - started
