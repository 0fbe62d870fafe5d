"""`fedpipe-operator deliver`: in a Pod with the output volume, fetches the adapter and writes it there."""

import shutil
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from fedpipe_api.base import UserError

from .get import LIMIT, unpack

REQUEST_SECONDS = 300


def deliver(coordinator: str, token_file: Path, ca_file: Path, output: Path) -> None:
    """Write the adapter in place of what `output` held; it appears whole or not at all."""
    token = token_file.read_text().strip()
    request = urllib.request.Request(  # noqa: S310 - the URL is the operator's own
        f"{coordinator}/v1/adapter", headers={"Authorization": f"Bearer {token}"}
    )
    context = ssl.create_default_context(cafile=ca_file)
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS, context=context) as response:  # noqa: S310
            body = response.read(LIMIT)
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{coordinator}: {error}") from None
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
