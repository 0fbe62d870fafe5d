# SPDX-License-Identifier: Apache-2.0
"""Keeps the coordinator's certificate current and makes its CA known in the namespaces of jobs."""

import asyncio
import logging
import ssl
from urllib.parse import urlsplit

from fedpipe_api.base import UserError
from fedpipe_api.names import CA_CONFIGMAP, OPERATOR_KEY

from .api import Api, ApiError, Document
from .pods import CA_KEY
from .settings import OperatorSettings
from .tls import Material, load_certificate, now_utc, renew

log = logging.getLogger(__name__)

CHECK_SECONDS = 300.0
"""Pause between two checks of the certificate."""


class Authority:
    """The coordinator's TLS. Call `load` before `context` is used, and keep `watch` running."""

    def __init__(self, api: Api, settings: OperatorSettings) -> None:
        self._api = api
        self._settings = settings
        self._material: Material | None = None
        self._published: dict[str, tuple[str, Document]] = {}
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2

    @property
    def _hosts(self) -> list[str]:
        service, namespace = self._settings.service, self._settings.namespace
        hosts = {service, f"{service}.{namespace}", f"{service}.{namespace}.svc"}
        named = urlsplit(self._settings.coordinator).hostname
        return sorted(hosts | ({named} if named else set()))

    @property
    def _secret(self) -> str:
        return self._settings.tls_secret or self._settings.own_tls_secret

    async def load(self) -> None:
        """Read the Secret, renew what is due, and use the certificate."""
        found = await self._api.get_secret(self._settings.namespace, self._secret)
        data = (found or {}).get("data") or {}
        material = Material.from_secret(self._secret, data) if data else None
        if self._settings.tls_secret:
            if material is None:
                raise UserError(f"Secret {self._secret}: not found or empty; create it or leave its name out")
        else:
            current = renew(material, self._hosts, now_utc())
            if current is not material:
                await self._api.apply_secret(self._settings.namespace, self._secret, current.to_secret())
                log.info("the coordinator's certificate was renewed (Secret %s)", self._secret)
            material = current
        if material != self._material:
            await asyncio.to_thread(load_certificate, self.context, material)
            self._material = material
            self._published.clear()
        await self._fill(material)

    async def watch(self) -> None:
        """Check the certificate until cancelled, and publish a new CA to the namespaces."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            known = dict(self._published)
            try:
                await self.load()
                if self._material is not None and not self._published:
                    for namespace, (_, owner) in known.items():
                        await self._apply(namespace, owner)
            except (ApiError, UserError) as error:
                log.warning("the coordinator's certificate: %s; trying again", error)

    async def _fill(self, material: Material) -> None:
        """Fill the ConfigMap that probes and Prometheus trust; without it links and metrics stay unread.

        Applied at every check, so that one that somebody emptied is filled again.
        """
        name = self._settings.ca_config_map
        if name is None:
            return
        try:
            await self._api.apply_config_map(self._settings.namespace, name, {CA_KEY: material.bundle}, [])
        except ApiError as error:
            log.warning("ConfigMap %s, with the CA for probes and Prometheus: %s; trying again", name, error)

    async def publish(self, namespace: str, owner: Document, *, again: bool = False) -> None:
        """Make the CA known in a namespace, for as long as its owner lives; `again`: even if it is known."""
        assert self._material is not None
        if not again and self._published.get(namespace) == (self._material.bundle, owner):
            return
        await self._apply(namespace, owner)

    async def _apply(self, namespace: str, owner: Document) -> None:
        assert self._material is not None
        operator = f"{self._settings.namespace}/{self._settings.service}"
        data = {CA_KEY: self._material.bundle, OPERATOR_KEY: operator}
        await self._api.apply_config_map(namespace, CA_CONFIGMAP, data, [owner])
        self._published[namespace] = (self._material.bundle, owner)
