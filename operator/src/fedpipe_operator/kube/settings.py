# SPDX-License-Identifier: Apache-2.0
"""How this operator is installed."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedpipe_api.base import UserError
from fedpipe_api.object_url import ObjectURL


@dataclass(frozen=True)
class AllowedStore:
    """Where spec.output.url may lead: a prefix, and the endpoint of a store that is no provider's own."""

    prefix: ObjectURL
    endpoint: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what `PREFIX[,ENDPOINT]` says."""
        prefix, _, endpoint = text.partition(",")
        try:
            place = ObjectURL.parse_prefix(prefix)
        except ValueError as error:
            raise UserError(f"--output-allow {prefix}: {error}") from None
        if endpoint and (place.scheme == "gs" or not endpoint.startswith(("https://", "http://"))):
            raise UserError(
                f"--output-allow {prefix}: the endpoint must be an http(s) URL, and gs:// has none"
            )
        return cls(place, endpoint or None)


def parse_origin(text: str) -> str:
    """Return the origin of a server; UserError for anything else."""
    if not re.fullmatch(r"https?://[A-Za-z0-9.:_-]+/?", text):
        raise UserError(f"--tracking-allow {text}: must be http(s)://HOST:PORT without a path")
    return text.rstrip("/").lower()


@dataclass(frozen=True)
class OperatorSettings:
    """What the chart decides. `namespaces` empty stands for the whole cluster."""

    namespace: str
    """Namespace of the operator: its Service and its Secret live here."""
    service: str
    """Service in front of the coordinator."""
    store: Path
    """Directory of ledger and blobs, on a volume."""
    agent_image: str
    operator_image: str
    namespaces: tuple[str, ...] = ()
    coordinator_url: str | None = None
    """Where agents find the coordinator if not at its Service: for nodes outside the cluster's network."""
    host: str = "0.0.0.0"  # noqa: S104 - a Pod's servers listen on all of its addresses
    coordinator_port: int = 8443
    health_port: int = 8080
    metrics_port: int = 8444
    tls_secret: str | None = None
    """A Secret with tls.crt, tls.key and ca.crt, as cert-manager writes it; None: the operator's own CA."""
    ca_config_map: str | None = None
    """ConfigMap of the operator's namespace from which probes and Prometheus read the CA; None: none."""
    model_cache: str | None = None
    """Directory on every node that keeps downloaded models; None: an emptyDir, gone with the Pod."""
    policy_directory: str | None = None
    """Directory on every node with its owner's policy.yaml, for agents to read; None: not mounted."""
    budget_directory: str | None = None
    """Directory on every node with the privacy ledger that its policy names; None: not mounted."""
    runtime_class: str | None = None
    """For GPU nodes whose GPUs are no resource of the Node, such as a Jetson without device plugin."""
    image_pull_secrets: tuple[str, ...] = ()
    output_allowed: tuple[AllowedStore, ...] = ()
    """Object stores that jobs may name; empty: none."""
    tracking_allowed: tuple[str, ...] = ()
    """Origins (scheme://host:port) of MLflow servers that jobs may name; empty: none."""

    drop_unknown_jobs: bool = False
    """Start with a store none of whose jobs is in the cluster, and remove them."""

    def store_of(self, url: str) -> AllowedStore:
        """Return what allows a job's spec.output.url, the longest prefix first; UserError for none."""
        place = ObjectURL.parse(url)
        fitting = [allowed for allowed in self.output_allowed if place.inside(allowed.prefix)]
        if not fitting:
            some = "not that object store" if self.output_allowed else "no object store"
            raise UserError(
                f"spec.output.url: this cluster allows {some}; "
                "its administrator adds it to output.allowed in the values of the chart"
            )
        return max(fitting, key=lambda allowed: len(allowed.prefix.parts))

    @property
    def own_tls_secret(self) -> str:
        """The Secret of the operator's own CA; its rights name it."""
        return f"{self.service}-tls"

    @property
    def coordinator(self) -> str:
        """The URL that agents use."""
        return self.coordinator_url or f"https://{self.service}.{self.namespace}.svc:{self.coordinator_port}"
