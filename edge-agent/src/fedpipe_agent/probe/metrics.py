"""Prometheus metrics of one node; README.md lists them."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from fedpipe_api.node import FedPipeNodeStatus


class NodeMetrics(Collector):
    """The metrics that the probe exports about its node and itself."""

    def __init__(self, node: str) -> None:
        self.registry = CollectorRegistry()
        self._node = node
        self._status: FedPipeNodeStatus | None = None
        self.registry.register(self)
        self._pass_seconds = Gauge(
            "fedpipe_probe_pass_seconds", "Duration of the last pass.", ["node"], registry=self.registry
        )
        self._passes = Counter(
            "fedpipe_probe_passes", "Passes since the start.", ["node"], registry=self.registry
        )
        self._writes = Counter(
            "fedpipe_probe_writes", "Writes of the FedPipeNode.", ["node", "cause"], registry=self.registry
        )
        self._failures = Counter(
            "fedpipe_probe_publish_failures",
            "Writes of the FedPipeNode that failed.",
            ["node", "reason"],
            registry=self.registry,
        )

    def saw(self, status: FedPipeNodeStatus, seconds: float) -> None:
        """Take note of one pass."""
        self._status = status
        self._pass_seconds.labels(self._node).set(seconds)
        self._passes.labels(self._node).inc()

    def wrote(self, cause: str) -> None:
        """Take note of one write."""
        self._writes.labels(self._node, cause).inc()

    def failed(self, reason: str) -> None:
        """Take note of one write that failed."""
        self._failures.labels(self._node, reason).inc()

    def describe(self) -> list[GaugeMetricFamily]:
        """Return nothing: before the first pass there is nothing to describe."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the capacity as the last pass saw it; what is not known has no sample."""
        status = self._status
        if status is None:
            return
        memory = self._family("memory_bytes", "Memory by kind (total, free).", "device", "kind")
        info = self._family("device_info", "1 for each device.", "device", "name", "compute_capability")
        utilization = self._family("device_utilization_ratio", "Share of time busy.", "device")
        power = self._family("device_power_limit_watts", "Enforced power limit.", "device")
        for device in status.devices:
            info.add_metric([self._node, device.uuid, device.name, device.compute_capability or ""], 1)
            _add(memory, [self._node, device.uuid, "total"], device.total_memory)
            _add(memory, [self._node, device.uuid, "free"], device.free_memory)
            for instance in device.mig_instances:
                _add(memory, [self._node, instance.uuid, "total"], instance.total_memory)
                _add(memory, [self._node, instance.uuid, "free"], instance.free_memory)
            busy = None if device.utilization is None else device.utilization / 100
            _add(utilization, [self._node, device.uuid], busy)
            _add(power, [self._node, device.uuid], device.power_limit)
        cores = self._family("cpu_cores", "Processor cores.")
        disk = self._family("cache_disk_free_bytes", "Free bytes for the model cache.")
        if status.cpu is not None:
            _add(memory, [self._node, "cpu", "total"], status.cpu.total_memory)
            _add(memory, [self._node, "cpu", "free"], status.cpu.free_memory)
            _add(cores, [self._node], status.cpu.cores)
            _add(disk, [self._node], status.cpu.cache_disk_free)
        link = self._family("link_bytes_per_second", "Measured rate from the coordinator.")
        _add(link, [self._node], status.link_rate)
        precision = self._family(
            "precision_usable", "1 where a precision can be used.", "precision", "verified"
        )
        for support in status.precisions:
            verified = "true" if support.verified else "false"
            _add(precision, [self._node, support.precision, verified], int(support.usable))
        condition = self._family("condition", "1 where a condition is True.", "type", "reason")
        for known in status.conditions:
            _add(condition, [self._node, known.type, known.reason], int(known.status == "True"))
        seen = self._family("last_pass_timestamp_seconds", "Unix time of the last pass.")
        if status.observed_at is not None:
            seen.add_metric([self._node], status.observed_at.timestamp())
        families = (memory, info, utilization, power, cores, disk, link, precision, condition, seen)
        yield from (family for family in families if family.samples)

    @staticmethod
    def _family(name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"fedpipe_node_{name}", text, labels=["node", *labels])


def _add(family: GaugeMetricFamily, labels: list[str], value: float | None) -> None:
    if value is not None:
        family.add_metric(labels, value)
