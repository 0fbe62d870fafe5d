# SPDX-License-Identifier: Apache-2.0
"""How often a node's Pods failed in a row, for the pause before the next, and how, for people."""

from dataclasses import dataclass, replace

from .views import PodView

STEADY_SECONDS = 600.0
"""A Pod that failed only after so long starts the count again, as the kubelet counts restarts."""


@dataclass(frozen=True)
class _Failure:
    uid: str
    count: int
    why: str


class FailedPods:
    """The failures of a job's Pods, in memory: after a restart of the operator the count starts again."""

    def __init__(self) -> None:
        self._latest: dict[str, _Failure] = {}

    def known(self, pod: PodView) -> PodView:
        """Return the Pod with how many of its node failed in a row, or with how the one before it failed."""
        latest = self._latest.get(pod.node)
        if pod.phase == "Failed":
            if latest is None or latest.uid != pod.uid:
                steady = (pod.ended or pod.created) - pod.created >= STEADY_SECONDS
                count = 1 if latest is None or steady else latest.count + 1
                latest = self._latest[pod.node] = _Failure(
                    pod.uid, count, "" if pod.mistake else pod.trouble or ""
                )
            return replace(pod, failures=latest.count)
        if latest is None or not latest.why or not pod.running:
            return pod
        return replace(pod, restarted=pod.restarted or f"before, {latest.why}")
