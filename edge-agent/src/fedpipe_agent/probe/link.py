"""The rate of the link to the coordinator, measured by a small download."""

import contextlib
import http.client
import time
from urllib.parse import urlsplit

SAMPLE_BYTES = 1024 * 1024
MEANINGFUL_BYTES = 64 * 1024
TIMEOUT = 10.0


def measure(url: str) -> int | None:
    """Return bytes per second of a ranged GET of at most SAMPLE_BYTES, or None when it cannot be told.

    The clock starts with the first bytes, so that connecting does not count; a sample below MEANINGFUL_BYTES
    tells nothing. No credentials are sent and no redirect is followed.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    path = parts._replace(scheme="", netloc="").geturl() or "/"
    try:
        with contextlib.closing(kind(parts.hostname or "", parts.port, timeout=TIMEOUT)) as connection:
            connection.request("GET", path, headers={"Range": f"bytes=0-{SAMPLE_BYTES - 1}"})
            response = connection.getresponse()
            if response.status not in (200, 206) or not response.read(1):
                return None
            received, seconds = _download(response)
    except (OSError, http.client.HTTPException):
        return None
    if received < MEANINGFUL_BYTES or seconds <= 0:
        return None
    return max(1, round(received / seconds))


def _download(response: http.client.HTTPResponse) -> tuple[int, float]:
    """Return bytes and seconds of what comes within TIMEOUT."""
    started = time.monotonic()
    received = 0
    while received < SAMPLE_BYTES and time.monotonic() - started < TIMEOUT:
        part = response.read1(65536)
        if not part:
            break
        received += len(part)
    return received, time.monotonic() - started
