# SPDX-License-Identifier: Apache-2.0
"""Uploads to an object store over HTTP: signed with the given credentials, and no answer of the store is quoted."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from fedpipe_api.base import UserError
from fedpipe_api.object_url import ObjectURL
from fedpipe_operator.export.upload import open_store, own_credentials, upload
from fedpipe_operator.kube.deliver import read_credentials
from fedpipe_operator.local.results import check_output, deliver
from kube.objects import job
from standins.object_store import KEY, SECRET, ObjectStore

FILES = {
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"\x00" * (6 << 20),
    "README.md": "# Ä".encode(),
}
GOOD = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
PLACE = ObjectURL.parse("s3://adapters/team=a/tickets")


@pytest.fixture
def store() -> Iterator[ObjectStore]:
    one = ObjectStore()
    yield one
    one.close()


def test_an_adapter_is_stored_signed_and_its_configuration_last(store: ObjectStore) -> None:
    upload(FILES, PLACE, GOOD | {"AWS_REGION": "eu-central-1"}, store.url)
    assert store.objects == {f"/adapters/team=a/tickets/{name}": body for name, body in FILES.items()}
    assert store.order[-1].endswith("adapter_config.json")


def test_azure_has_account_and_container_in_the_url(store: ObjectStore) -> None:
    upload(
        {"README.md": b"x"},
        ObjectURL.parse("az://account/models/a"),
        {"AZURE_STORAGE_ACCOUNT_KEY": "a2V5"},
        store.url,
    )
    assert store.objects == {"/models/a/README.md": b"x"}


def test_credentials_that_the_store_does_not_know(store: ObjectStore) -> None:
    with pytest.raises(UserError) as caught:
        upload(FILES, PLACE, GOOD | {"AWS_SECRET_ACCESS_KEY": "another-secret"}, store.url)
    assert str(caught.value) == (
        "s3://adapters/team=a/tickets: the object store denies the upload; allow these credentials to write there"
    )
    assert not store.objects


@pytest.mark.parametrize(
    ("status", "reported"),
    [
        (400, "does not answer as expected"),
        (401, "does not accept the credentials"),
        (403, "denies the upload"),
        (404, "no such bucket"),
        (409, "does not answer as expected"),
        (418, "does not answer as expected"),
        (307, "does not answer as expected"),
    ],
)
def test_nothing_that_the_store_answers_is_quoted(store: ObjectStore, status: int, reported: str) -> None:
    store.answer = (status, b"PRIVATE-BODY of a service inside")
    with pytest.raises(UserError) as caught:
        upload(FILES, PLACE, GOOD, store.url)
    text = str(caught.value)
    assert reported in text
    for secret in ("PRIVATE", str(status), SECRET, KEY, "127.0.0.1"):
        assert secret not in text
    assert caught.value.__suppress_context__


def test_a_store_that_is_not_there(store: ObjectStore) -> None:
    store.close()
    with pytest.raises(UserError, match="does not answer as expected; check bucket, region and the network"):
        upload({"README.md": b"x"}, PLACE, GOOD, store.url)


@pytest.mark.parametrize(
    ("url", "credentials", "reported"),
    [
        ("s3://adapters", {}, "give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("s3://adapters", {"AWS_ACCESS_KEY_ID": "k"}, "give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("gs://adapters", {}, "give GOOGLE_SERVICE_ACCOUNT_KEY"),
        ("gs://adapters", {"GOOGLE_SERVICE_ACCOUNT_KEY": "s3cret"}, "must be the JSON key file"),
        ("gs://adapters", {"GOOGLE_SERVICE_ACCOUNT_KEY": '["s3cret"]'}, "must be the JSON key file"),
        (
            "gs://adapters",
            {"GOOGLE_SERVICE_ACCOUNT_KEY": '{"private_key": "s3cret"}'},
            "cannot be used; check GOOGLE",
        ),
        (
            "az://account/models",
            {"AZURE_CLIENT_ID": "i"},
            "give AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS",
        ),
        (
            "az://account/models",
            {"AZURE_STORAGE_ACCOUNT_KEY": "%s3cret"},
            "cannot be used; check AZURE_STORAGE",
        ),
    ],
)
def test_credentials_that_cannot_do_are_named_without_their_values(
    url: str, credentials: dict[str, str], reported: str
) -> None:
    with pytest.raises(UserError) as caught:
        upload(FILES, ObjectURL.parse(url), credentials)
    assert reported in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_google_key_leads_nowhere_else() -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {
        "type": "service_account", "private_key_id": "1", "private_key": key.decode(), "client_email": "a@b.example",
        "gcs_base_url": "http://169.254.169.254", "disable_oauth": True,
    }  # fmt: skip
    store = open_store(
        ObjectURL.parse("gs://adapters"), {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account)}, None
    )
    assert "169.254" not in repr(store)
    assert "169.254" not in str(store.config)


def test_a_secret_is_read_by_its_keys_alone(tmp_path: Path) -> None:
    assert read_credentials(tmp_path / "absent", "s3") == {}
    for key in ("AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "LD_PRELOAD"):
        (tmp_path / key).write_text("value\n")
    assert read_credentials(tmp_path, "s3") == {"AWS_ACCESS_KEY_ID": "value"}
    (tmp_path / "AWS_REGION").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"spec.output.secretName: AWS_REGION cannot be read as text"):
        read_credentials(tmp_path, "s3")
    (tmp_path / "AWS_REGION").write_bytes(b"x" * 70_000)
    with pytest.raises(UserError, match=r"spec.output.secretName: AWS_REGION is longer than 64 KiB"):
        read_credentials(tmp_path, "s3")


def test_a_local_run_writes_as_its_user_and_asks_for_credentials_before_it_trains(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = {"persistentVolumeClaim": {"claimName": "models"}}
    output = {"url": "s3://adapters/mine", "secretName": "writer", "volume": volume}
    spec = job(output=output).spec
    for key in GOOD:
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(
        UserError, match=r"spec.output.url: in the environment, credentials for s3:// are missing"
    ):
        check_output(spec)
    for key, value in (GOOD | {"AWS_ENDPOINT_URL": store.url}).items():
        monkeypatch.setenv(key, value)
    check_output(spec)
    for file, content in FILES.items():
        (tmp_path / file).write_bytes(content)
    state: Any = SimpleNamespace(spec=spec, name="tickets")
    lines = deliver(tmp_path, state)
    assert set(store.objects) == {f"/adapters/mine/tickets/{file}" for file in FILES}
    assert lines[0] == "stored   s3://adapters/mine/tickets"
    assert lines[1].startswith("spec.output.volume is of a cluster")


def test_a_local_run_takes_the_users_own_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(key, f"{key} of the user")
    found, endpoint = own_credentials(PLACE)
    assert found == {key: f"{key} of the user" for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    assert endpoint == "AWS_ENDPOINT_URL of the user"
    assert own_credentials(ObjectURL.parse("gs://adapters"))[1] is None
