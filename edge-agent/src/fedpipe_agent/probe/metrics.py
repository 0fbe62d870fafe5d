# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of one node. Their definitions are data, from which README.md's table is generated."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from fedpipe_api.node import FedPipeNodeStatus

NODE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "memory_bytes": (
        "Bytes by kind (total, free); device is a GPU's or MIG instance's uuid, or cpu.",
        ("device", "kind"),
    ),
    "device_info": ("1 for each device.", ("device", "name", "compute_capability")),
    "device_utilization_ratio": ("Share of time busy, 0 to 1.", ("device",)),
    "device_power_limit_watts": ("Enforced power limit.", ("device",)),
    "cpu_cores": ("Logical cores.", ()),
    "cache_disk_free_bytes": ("Free bytes for the model cache (--cache DIR).", ()),
    "link_bytes_per_second": ("Measured rate from the coordinator.", ()),
    "precision_usable": ("1 where a precision can be used.", ("precision", "verified")),
    "condition": ("1 where a condition is True.", ("type", "reason")),
    "last_pass_timestamp_seconds": ("Unix time of the last pass.", ()),
}
"""Of fedpipe_node_NAME: its meaning, and its labels beside `node`. All are gauges."""

PROBE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "pass_seconds": ("Duration of the last pass.", ()),
    "passes_total": ("Passes since the start.", ()),
    "writes_total": ("Writes of the FedPipeNode by cause: first, heartbeat, or what changed.", ("cause",)),
    "publish_failures_total": ("Writes that failed by reason: Forbidden, Unreachable, …", ("reason",)),
}
"""The same of fedpipe_probe_NAME; those that end in _total are counters."""


def markdown() -> str:
    """Return the table of all metrics for the documentation."""
    rows = ["| metric | labels | meaning |", "|---|---|---|"]
    for prefix, group in (("node", NODE), ("probe", PROBE)):
        for name, (text, labels) in group.items():
            shown = ", ".join(f"`{label}`" for label in labels)
            rows.append(f"| `fedpipe_{prefix}_{name}` | {shown or '–'} | {text} |")
    return "\n".join(rows)


class NodeMetrics(Collector):
    """The metrics that the probe exports about its node and itself."""

    def __init__(self, node: str) -> None:
        self.registry = CollectorRegistry()
        self._node = node
        self._status: FedPipeNodeStatus | None = None
        self.registry.register(self)
        self._pass_seconds = Gauge(*self._own("pass_seconds"), registry=self.registry)
        self._passes = Counter(*self._own("passes_total"), registry=self.registry)
        self._writes = Counter(*self._own("writes_total"), registry=self.registry)
        self._failures = Counter(*self._own("publish_failures_total"), registry=self.registry)

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
        memory = _family("memory_bytes")
        info = _family("device_info")
        utilization = _family("device_utilization_ratio")
        power = _family("device_power_limit_watts")
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
        cores = _family("cpu_cores")
        disk = _family("cache_disk_free_bytes")
        if status.cpu is not None:
            _add(memory, [self._node, "cpu", "total"], status.cpu.total_memory)
            _add(memory, [self._node, "cpu", "free"], status.cpu.free_memory)
            _add(cores, [self._node], status.cpu.cores)
            _add(disk, [self._node], status.cpu.cache_disk_free)
        link = _family("link_bytes_per_second")
        _add(link, [self._node], status.link_rate)
        precision = _family("precision_usable")
        for support in status.precisions:
            verified = "true" if support.verified else "false"
            _add(precision, [self._node, support.precision, verified], int(support.usable))
        condition = _family("condition")
        for known in status.conditions:
            _add(condition, [self._node, known.type, known.reason], int(known.status == "True"))
        seen = _family("last_pass_timestamp_seconds")
        if status.observed_at is not None:
            seen.add_metric([self._node], status.observed_at.timestamp())
        families = (memory, info, utilization, power, cores, disk, link, precision, condition, seen)
        yield from (family for family in families if family.samples)

    @staticmethod
    def _own(name: str) -> tuple[str, str, tuple[str, ...]]:
        text, labels = PROBE[name]
        return f"fedpipe_probe_{name}", text, ("node", *labels)


def _family(name: str) -> GaugeMetricFamily:
    text, labels = NODE[name]
    return GaugeMetricFamily(f"fedpipe_node_{name}", text, labels=("node", *labels))


def _add(family: GaugeMetricFamily, labels: list[str], value: float | None) -> None:
    if value is not None:
        family.add_metric(labels, value)
