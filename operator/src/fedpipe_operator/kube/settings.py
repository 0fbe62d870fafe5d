"""How this operator is installed."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
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
    http_port: int = 8080
    tls_secret: str | None = None
    """A Secret with tls.crt, tls.key and ca.crt, as cert-manager writes it; None: the operator's own CA."""
    probe_ca: str | None = None
    """ConfigMap of the operator's namespace from which probes read the CA; None: they do not need it."""
    model_cache: str | None = None
    """Directory on every node that keeps downloaded models; None: an emptyDir, gone with the Pod."""
    runtime_class: str | None = None
    """For GPU nodes whose GPUs are no resource of the Node, such as a Jetson without device plugin."""
    image_pull_secrets: tuple[str, ...] = ()

    @property
    def own_tls_secret(self) -> str:
        """The Secret of the operator's own authority; its rights name it."""
        return f"{self.service}-tls"

    @property
    def coordinator(self) -> str:
        """The URL that agents use."""
        return self.coordinator_url or f"https://{self.service}.{self.namespace}.svc:{self.coordinator_port}"
