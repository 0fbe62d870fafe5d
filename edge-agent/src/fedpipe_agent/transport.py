# SPDX-License-Identifier: Apache-2.0
"""The agent's side of the round protocol (`fedpipe_api.wire`): retries, resumed downloads, paced transfers.

Every call may be repeated, so connection errors, time-outs, 5xx, 408 and 429 are retried with jittered
exponential backoff until `give_up` seconds have passed since the first failure.
"""

import hashlib
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import urllib3
from pydantic import ValidationError
from urllib3.exceptions import HTTPError

from fedpipe_api import wire
from fedpipe_api.base import Model, UserError, explain

from .errors import Aborted, Failure, RequestRefused

log = logging.getLogger(__name__)
T = TypeVar("T")
M = TypeVar("M", bound=Model)

RESPONSE_LIMIT = 4 * 1024 * 1024
"""Bytes of the largest control message accepted."""
CHUNK = 64 * 1024
"""Bytes read from the network at a time."""
LONGEST_WAIT = 10.0
"""Seconds of the longest pause between two attempts."""


class _Again(Exception):
    """An answer that asks for another attempt."""

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class Pace:
    """Keeps a transfer at or under `rate` bytes per second; None does not slow it."""

    def __init__(self, rate: int | None):
        self._rate = rate
        self._begin = time.monotonic()
        self._bytes = 0

    def spend(self, size: int) -> None:
        """Account for `size` bytes and sleep until they may have passed."""
        if self._rate is None:
            return
        self._bytes += size
        ahead = self._bytes / self._rate - (time.monotonic() - self._begin)
        if ahead > 0:
            time.sleep(ahead)


class _PacedFile:
    """A file whose reads keep to a pace."""

    def __init__(self, file: IO[bytes], rate: int | None):
        self._file = file
        self._pace = Pace(rate)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._pace.spend(len(data))
        return data


class Transport:
    """One agent's connection to the coordinator. Thread-safe but for `blob`."""

    def __init__(
        self,
        coordinator: str,
        token_file: Path,
        work: Path,
        *,
        ca_file: Path | None = None,
        link_rate: int | None = None,
        give_up: float = 600.0,
    ):
        """Prepare; nothing is sent yet.

        Args:
            coordinator: base URL, http or https.
            token_file: bearer token, read again for each request because projected tokens rotate.
            work: directory for downloaded blobs.
            ca_file: certificate authority of the coordinator, PEM.
            link_rate: bytes per second each way, declared; None for what the link gives.
            give_up: seconds of failure after which a call gives up.
        """
        self._base = coordinator.rstrip("/")
        self._token_file = token_file
        self._work = work
        self._rate = link_rate
        self._give_up = give_up
        self._pool = urllib3.PoolManager(
            maxsize=4, retries=False, ca_certs=str(ca_file) if ca_file else None, cert_reqs="CERT_REQUIRED"
        )

    def job(self) -> wire.AgentConfig:
        """Return the part of the job the agent works by."""
        return self._ask("GET", "/v1/job", wire.AgentConfig)

    def register(self, registration: wire.Registration) -> wire.AgentConfig:
        """Present the agent; again after the coordinator asks for it."""
        return self._ask("POST", "/v1/agents", wire.AgentConfig, registration)

    def assignment(self, wait: float = 30) -> wire.Assignment | None:
        """Return the next piece of work, or None when there was none for `wait` seconds."""

        def attempt() -> wire.Assignment | None:
            status, body = self._exchange("GET", f"/v1/assignment?wait={wait:g}", timeout=wait + 15)
            return None if status == 204 else wire.Assignment.model_validate_json(body)

        return self._retry(attempt, "assignment")

    def profile(self, report: wire.ProfileReport) -> None:
        """Report what profiling measured; dropped when it is no longer wanted."""
        self._report("/v1/profile", report)

    def evaluation(self, evaluation: wire.Evaluation) -> None:
        """Report the sums of an evaluation; dropped when its round is no longer the latest."""
        self._report(f"/v1/rounds/{evaluation.round}/evaluation", evaluation)

    def progress(self, progress: wire.Progress) -> wire.Answer | None:
        """Say how the work goes; None when the single attempt failed (another sign of life follows soon)."""
        try:
            _, body = self._exchange("POST", "/v1/progress", body=progress.to_json().encode(), timeout=5)
            return wire.Answer.model_validate_json(body)
        except (HTTPError, ConnectionError, RequestRefused, _Again, ValidationError) as error:
            log.debug("progress: %s", error)
            return None

    def update(self, round_number: int, path: Path, manifest: wire.UpdateManifest) -> bool:
        """Send an update from disk; False when its round is already closed and it was dropped."""

        def attempt() -> bool:
            with path.open("rb") as file:
                self._exchange(
                    "PUT",
                    f"/v1/rounds/{round_number}/update",
                    body=_PacedFile(file, self._rate),
                    headers={
                        wire.MANIFEST_HEADER: manifest.to_json(),
                        "Content-Length": str(manifest.size),
                        "Content-Type": "application/octet-stream",
                    },
                    timeout=120,
                )
            return True

        try:
            return self._retry(attempt, "update")
        except RequestRefused as refusal:
            if refusal.status != 409:
                raise
            log.info("round %d: update dropped: %s", round_number, refusal)
            return False

    def blob(self, blob: wire.Blob) -> Path:
        """Return the file of a blob, downloaded unless it is the one fetched last; others are deleted.

        Raises:
            Aborted: the coordinator no longer has the blob, because the job has gone on.
        """
        target = self._work / blob.digest
        if not target.exists():
            for other in self._work.iterdir():
                if other.name != f"{blob.digest}.part":
                    other.unlink()
            try:
                self._retry(lambda: self._download(blob, target), "blob")
            except RequestRefused as refusal:
                if refusal.status != 404:
                    raise
                raise Aborted from refusal
        return target

    def _download(self, blob: wire.Blob, target: Path) -> None:
        """Fetch what is missing of a blob, check size and digest, then give it its name."""
        part = target.with_suffix(".part")
        digest = hashlib.sha256()
        with part.open("a+b") as file:
            file.seek(0)
            while data := file.read(CHUNK):
                digest.update(data)
            have = file.tell()
            if have < blob.size:
                have += self._append(blob, file, have, digest)
        if have < blob.size:
            raise _Again(f"blob cut at {have} of {blob.size} bytes")
        if have > blob.size or digest.hexdigest() != blob.digest:
            part.unlink()
            raise _Again("blob differs from its digest")
        part.rename(target)

    def _append(self, blob: wire.Blob, file: IO[bytes], have: int, digest: Any) -> int:
        """Append the bytes from `have` on and return how many came; a cut link leaves those that did."""
        response = self._open("GET", f"/v1/blobs/{blob.digest}", headers={"Range": f"bytes={have}-"})
        try:
            resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(
                f"bytes {have}-"
            )
            if have and not resumed:
                file.truncate(0)
                raise _Again("coordinator cannot resume the blob; it starts from the beginning")
            pace = Pace(self._rate)
            came = 0
            for data in response.stream(CHUNK):
                came += len(data)
                if have + came > blob.size:
                    raise _Again("blob is longer than announced")
                file.write(data)
                digest.update(data)
                pace.spend(len(data))
            return came
        finally:
            response.close()

    def _ask(self, method: str, path: str, answer: type[M], message: Model | None = None) -> M:
        """Send a message and return the answer."""
        body = message.to_json().encode() if message else None
        return self._retry(
            lambda: answer.model_validate_json(self._exchange(method, path, body=body)[1]), path
        )

    def _report(self, path: str, message: Model) -> None:
        """Send a message whose answer says nothing more; 409 says that it came too late."""
        try:
            self._retry(lambda: self._exchange("POST", path, body=message.to_json().encode()), path)
        except RequestRefused as refusal:
            if refusal.status != 409:
                raise
            log.info("%s dropped: %s", path, refusal)

    def _exchange(
        self,
        method: str,
        path: str,
        *,
        body: bytes | _PacedFile | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 30,
    ) -> tuple[int, bytes]:
        """One attempt: return status and body, or raise RequestRefused or _Again."""
        response = self._open(method, path, body=body, headers=headers, timeout=timeout)
        data = response.read(RESPONSE_LIMIT + 1)
        if len(data) > RESPONSE_LIMIT:
            response.close()
            raise Failure(f"{method} {path}: the coordinator's answer is above {RESPONSE_LIMIT} bytes")
        response.release_conn()
        return response.status, data

    def _open(
        self,
        method: str,
        path: str,
        *,
        body: bytes | _PacedFile | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 30,
    ) -> urllib3.BaseHTTPResponse:
        """Send a request and return the 2xx response, its body still to be read."""
        try:
            token = self._token_file.read_text(encoding="ascii").strip()
        except OSError as error:
            raise UserError(
                f"--token-file {self._token_file}: {error.strerror}; give a readable file"
            ) from None
        except UnicodeDecodeError:
            token = ""
        if not token.isprintable() or not token:  # http.client would quote it
            raise UserError(
                f"--token-file {self._token_file}: not a token; give a file with one line of ASCII"
            )
        response = self._pool.request(
            method,
            self._base + path,
            body=cast(IO[bytes], body),
            headers={"Authorization": f"Bearer {token}", **_kind(body), **(headers or {})},
            timeout=urllib3.Timeout(connect=10, read=timeout),
            preload_content=False,
        )
        if 200 <= response.status < 300:
            return response
        status, data = response.status, response.read(wire.CONTROL_LIMIT)
        response.close()
        if status >= 500 or status in (408, 429):
            raise _Again(f"answered {status}", _seconds(response.headers.get("Retry-After")))
        try:
            refusal = wire.Refusal.model_validate_json(data)
        except ValidationError:
            refusal = wire.Refusal(reason="Unexpected", error=f"{method} {path} answered {status}")
        raise RequestRefused(status, refusal.reason, refusal.error)

    def _retry(self, attempt: Callable[[], T], what: str) -> T:
        # Not tenacity: the pause follows Retry-After, and patience begins at the first failure.
        begin = None
        tries = 0
        while True:
            try:
                return attempt()
            except (HTTPError, ConnectionError, _Again) as error:
                now = time.monotonic()
                begin = now if begin is None else begin
                left = begin + self._give_up - now
                if left <= 0:
                    raise Failure(
                        f"{what}: coordinator unreachable for {self._give_up:g} s: {error}"
                    ) from error
                wait = min(LONGEST_WAIT, 0.2 * 2**tries) * random.uniform(0.5, 1)  # noqa: S311
                if isinstance(error, _Again) and error.retry_after is not None:
                    wait = error.retry_after
                log.log(logging.INFO if tries == 3 else logging.DEBUG, "%s: %s; retrying", what, error)
                time.sleep(min(wait, left, 60))
                tries += 1
            except ValidationError as error:
                raise Failure(
                    f"{what}: the coordinator's answer is not understood: {explain(error)}"
                ) from error


def _kind(body: bytes | _PacedFile | None) -> dict[str, str]:
    return {"Content-Type": "application/json"} if isinstance(body, bytes) else {}


def _seconds(value: str | None) -> float | None:
    return float(value) if value and value.isdigit() else None
