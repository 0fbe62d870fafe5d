# SPDX-License-Identifier: Apache-2.0
"""`fedpipe-operator deliver`: fetches the adapter and writes it to spec.output, in the job's namespace."""

import shutil
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from fedpipe_api.base import UserError
from fedpipe_api.object_url import ObjectURL

from ..export.upload import KEYS, upload
from .get import LIMIT, adapter_files, unpack

REQUEST_SECONDS = 300

CREDENTIAL_BYTES = 64 * 1024
"""Bytes of the largest value of a Secret that is read."""


@dataclass(frozen=True)
class Target:
    """A place in an object store, and the directory that the Secret with its credentials is mounted at."""

    url: ObjectURL
    endpoint: str | None
    credentials: Path


def deliver(
    coordinator: str, token_file: Path, ca_file: Path, output: Path | None, target: Target | None
) -> None:
    """Write the adapter in place of what `output` held and to `target`.

    In `output` it appears whole or not at all.
    """
    body = _fetch(coordinator, token_file, ca_file)
    if output is not None:
        _write(body, output)
    if target is not None:
        credentials = read_credentials(target.credentials, target.url.scheme)
        try:
            upload(adapter_files(body), target.url, credentials, target.endpoint)
        except UserError as error:
            raise UserError(f"spec.output.url, with the Secret of spec.output.secretName: {error}") from None


def _fetch(coordinator: str, token_file: Path, ca_file: Path) -> bytes:
    token = token_file.read_text().strip()
    request = urllib.request.Request(  # noqa: S310 - the URL is the operator's own
        f"{coordinator}/v1/adapter", headers={"Authorization": f"Bearer {token}"}
    )
    context = ssl.create_default_context(cafile=ca_file)
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS, context=context) as response:  # noqa: S310
            body: bytes = response.read(LIMIT)
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{coordinator}: {error}") from None
    return body


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
