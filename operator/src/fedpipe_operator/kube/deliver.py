# SPDX-License-Identifier: Apache-2.0
"""`fedpipe-operator deliver`: fetches the adapter and writes it to spec.output, in the job's namespace."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from fedpipe_api.base import UserError
from fedpipe_api.object_url import ObjectURL

from ..export.upload import KEYS, upload
from .get import LIMIT, adapter_files, unpack
from .own_requests import OWN_ADAPTER_PATH, Coordinator

REQUEST_SECONDS = 300

CREDENTIAL_BYTES = 64 * 1024
"""Bytes of the largest value of a Secret that is read."""


@dataclass(frozen=True)
class Target:
    """A place in an object store, and the directory that the Secret with its credentials is mounted at."""

    url: ObjectURL
    endpoint: str | None
    credentials: Path


def deliver(coordinator: Coordinator, output: Path | None, target: Target | None) -> None:
    """Write the adapter in place of what `output` held and to `target`.

    In `output` it appears whole or not at all.
    """
    body = coordinator.get(OWN_ADAPTER_PATH, limit=LIMIT, seconds=REQUEST_SECONDS)
    if output is not None:
        _write(body, output)
    if target is not None:
        credentials = read_credentials(target.credentials, target.url.scheme)
        try:
            upload(adapter_files(body), target.url, credentials, target.endpoint)
        except UserError as error:
            raise UserError(f"spec.output.url, with the Secret of spec.output.secretName: {error}") from None


def _write(body: bytes, output: Path) -> None:
    fresh, old = output.with_name(f".{output.name}.new"), output.with_name(f".{output.name}.old")
    try:
        for left in (fresh, old):
            shutil.rmtree(left, ignore_errors=True)
        unpack(body, fresh)
        if output.exists():
            output.rename(old)
        fresh.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}; the volume must be writable for group 65532") from None


def read_credentials(directory: Path, scheme: str) -> dict[str, str]:
    """Return the Secret's values that the scheme's store takes, by key; none where there is no Secret."""
    found = {}
    for key in sorted(KEYS[scheme]):
        try:
            with (directory / key).open("rb") as file:
                value = file.read(CREDENTIAL_BYTES + 1)
            if len(value) > CREDENTIAL_BYTES:
                raise UserError(f"spec.output.secretName: {key} is longer than {CREDENTIAL_BYTES >> 10} KiB")
            # A line end is a common slip of `kubectl create secret --from-file`.
            found[key] = value.decode().strip()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError):
            raise UserError(f"spec.output.secretName: {key} cannot be read as text") from None
    return found
