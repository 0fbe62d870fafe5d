# SPDX-License-Identifier: Apache-2.0
"""What the controller keeps of one FedPipeJob."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from fedpipe_api.conditions import OUTPUT, TRACKED, Condition, Reason
from fedpipe_api.job import FedPipeJob
from fedpipe_api.status import FedPipeJobStatus

from .failed_pods import FailedPods
from .job_status import OutputResult, TrackingResult, WriteBudget
from .node_selection import NodeSelection
from .pod_resources import Kept
from .views import Body, PodView


@dataclass
class TrackedJob:
    """One job as the API server has it, and what was made of it."""

    uid: str
    namespace: str
    name: str
    generation: int
    job: FedPipeJob | None
    invalid: str | None
    budget: WriteBudget
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    choice: NodeSelection | None = None
    refused: str | None = None
    refused_until: float = 0.0
    output: OutputResult | None = None
    tracking: TrackingResult | None = None
    output_task: asyncio.Task[None] | None = None
    expected: dict[str, float] = field(default_factory=dict)
    failures: int = 0
    failed: FailedPods = field(default_factory=FailedPods)
    quarantined: bool = False
    kept: dict[str, Kept] = field(default_factory=dict)
    """By uid of a Pod: the requests that the API server did not take."""

    @staticmethod
    def of(body: Body) -> "TrackedJob":
        """Return a job seen for the first time, with the status that an earlier process wrote."""
        meta = body["metadata"]
        written = _read_status(body.get("status"))
        budget = WriteBudget(written)
        names = str(meta["uid"]), str(meta["namespace"]), str(meta["name"])
        return TrackedJob(
            *names, int(meta["generation"]), None, None, budget,
            output=_read_output(written), tracking=_read_tracking(written),
        )  # fmt: skip

    def with_history(self, pod: PodView) -> PodView:
        """Return a Pod with how those of its node failed, and what the API server refused to change of it."""
        kept = self.kept.get(pod.uid)
        return replace(self.failed.known(pod), unresized=f"its Pod {kept}" if kept else None)

    @property
    def title(self) -> str:
        """namespace/name."""
        return f"{self.namespace}/{self.name}"


def _read_status(document: Mapping[str, Any] | None) -> FedPipeJobStatus | None:
    try:
        return FedPipeJobStatus.model_validate(dict(document)) if document else None
    except ValidationError:
        return None  # of another version; it is written again


def _read_output(status: FedPipeJobStatus | None) -> OutputResult | None:
    found = _condition(status, OUTPUT)
    return OutputResult(found.status == "True", found.message) if found else None


def _read_tracking(status: FedPipeJobStatus | None) -> TrackingResult | None:
    found = _condition(status, TRACKED)
    if found is None or found.reason not in list(Reason):
        return None
    return TrackingResult(Reason(found.reason), found.message, found.last_transition_time.timestamp())


def _condition(status: FedPipeJobStatus | None, kind: str) -> Condition | None:
    return next((c for c in (status.conditions if status else ()) if c.type == kind), None)
