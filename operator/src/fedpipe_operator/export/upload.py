# SPDX-License-Identifier: Apache-2.0
"""Writes an adapter's files to an object store, and says what keeps them from getting there."""

import json
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from fedpipe_api.base import UserError
from fedpipe_api.object_url import ObjectURL

LAST = "adapter_config.json"
"""What readers open first is written last, so that an upload cut short is no adapter."""

_OPTIONAL = {
    "s3": ("AWS_SESSION_TOKEN", "AWS_REGION"),
    "gs": (),
    "az": (),
}
_NEEDED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "s3": (("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),),
    "gs": (("GOOGLE_SERVICE_ACCOUNT_KEY",),),
    "az": (
        ("AZURE_STORAGE_ACCOUNT_KEY",),
        ("AZURE_STORAGE_SAS_TOKEN",),
        ("AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET"),
    ),
}
"""Keys of credentials by scheme; of several sets one is enough."""

KEYS = {scheme: frozenset(_OPTIONAL[scheme]).union(*alternatives) for scheme, alternatives in _NEEDED.items()}
"""Every key that is read, by scheme."""

_SERVICE_ACCOUNT = ("type", "project_id", "private_key_id", "private_key", "client_email", "client_id")
"""Of a Google key file; others would send the upload elsewhere."""

_CLIENT = {"timeout": timedelta(minutes=10), "connect_timeout": timedelta(seconds=20)}
_RETRY = {"max_retries": 3, "retry_timeout": timedelta(minutes=2)}


def upload(
    files: Mapping[str, bytes], url: ObjectURL, credentials: Mapping[str, str], endpoint: str | None = None
) -> None:
    """Write the files below the URL.

    Args:
        files: content by name.
        url: where they go.
        credentials: of `KEYS`, one whole set of the scheme's.
        endpoint: of a store that is not the provider's own, such as https://minio.example.org:9000.

    Raises:
        UserError: what is missing or was refused and what to do. It never holds anything that the store
            answered, nor any credential.
    """
    # Loading it takes a moment that most commands need not wait for.
    import obstore

    store = open_store(url, credentials, endpoint)
    for name in sorted(files, key=lambda name: (name == LAST, name)):
        try:
            obstore.put(store, name, files[name])
        except Exception as error:  # the store's errors quote its answers: only their class is passed on
            raise UserError(f"{url}: {_explain(error)}") from None


def open_store(url: ObjectURL, credentials: Mapping[str, str], endpoint: str | None) -> Any:
    """Return the store below the URL; nothing is sent yet. UserError for credentials that cannot do."""
    from obstore.store import AzureStore, GCSStore, S3Store

    sets = _NEEDED[url.scheme]
    if not any(set(keys) <= credentials.keys() for keys in sets):
        wanted = ", or ".join(" and ".join(keys) for keys in sets)
        raise UserError(f"credentials for {url.scheme}:// are missing; give {wanted}")
    config: Any = {key: credentials[key] for key in KEYS[url.scheme] & credentials.keys()}
    options: dict[str, Any] = {"retry_config": _RETRY, "client_options": dict(_CLIENT)}
    if endpoint is not None:
        options["endpoint"] = endpoint
        options["client_options"]["allow_http"] = endpoint.startswith("http://")
    try:
        if url.scheme == "s3":
            bucket, *path = url.parts
            return S3Store(bucket, prefix="/".join(path), config=config, **options)
        if url.scheme == "gs":
            bucket, *path = url.parts
            config = {key: _service_account(value) for key, value in config.items()}
            return GCSStore(bucket, prefix="/".join(path), config=config, **options)
        account, container, *path = url.parts
        return AzureStore(container, prefix="/".join(path), account_name=account, config=config, **options)
    except UserError:
        raise
    except Exception:  # quotes what it was given
        keys = " and ".join(sorted(config))
        raise UserError(f"credentials for {url.scheme}:// cannot be used; check {keys}") from None


def own_credentials(url: ObjectURL) -> tuple[dict[str, str], str | None]:
    """Return the credentials and the endpoint for a store that the user's environment holds."""
    credentials = {key: os.environ[key] for key in KEYS[url.scheme] if os.environ.get(key)}
    return credentials, os.environ.get("AWS_ENDPOINT_URL") if url.scheme == "s3" else None


def _service_account(text: str) -> str:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError("GOOGLE_SERVICE_ACCOUNT_KEY: must be the JSON key file of a service account")
    return json.dumps({key: found[key] for key in _SERVICE_ACCOUNT if key in found})


def _explain(error: Exception) -> str:
    from obstore import exceptions

    match error:
        case exceptions.UnauthenticatedError():
            return "the object store does not accept the credentials; check them"
        case exceptions.PermissionDeniedError():
            return "the object store denies the upload; allow these credentials to write there"
        case FileNotFoundError() | exceptions.NotFoundError():
            return "the object store has no such bucket; create it or correct the URL"
        case _:
            return "the object store does not answer as expected; check bucket, region and the network to it"
