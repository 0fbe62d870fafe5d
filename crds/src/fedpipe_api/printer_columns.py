# SPDX-License-Identifier: Apache-2.0
"""What `kubectl get` shows of a FedPipeJob and of a FedPipeNode."""

from typing import Any


def _column(name: str, path: str, kind: str = "string", *, wide: bool = False) -> dict[str, Any]:
    """Return one printer column, for `kubectl get -o wide` alone where it is wide."""
    return {"name": name, "type": kind, "jsonPath": path} | ({"priority": 1} if wide else {})


JOB_COLUMNS = [
    _column("Phase", ".status.phase"),
    _column("Reason", '.status.conditions[?(@.type=="Ready")].reason'),
    _column("Round", ".status.rounds"),
    _column("Nodes", ".status.nodes.summary"),
    _column("Metric", ".status.metricSummary"),
    _column("Best", ".status.metric.best", "number"),
    _column("ETA", ".status.eta"),
    _column("Age", ".metadata.creationTimestamp", "date"),
    _column("Message", ".status.message", wide=True),
]

NODE_COLUMNS = [
    _column("Device", ".status.deviceSummary"),
    _column("Memory", ".status.memorySummary"),
    _column("Free", ".status.freeSummary"),
    _column("Precisions", ".status.precisionSummary"),
    _column("Seen", ".status.observedAt", "date"),
    _column("Ready", '.status.conditions[?(@.type=="Ready")].status'),
]
