# SPDX-License-Identifier: Apache-2.0
"""Which taints keep a job's agents from a node, by the scheduler's rules: pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .fields import FieldReader, Unreadable

GPU_TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
"""Given to agents on nodes that offer GPUs; such nodes are often tainted so."""

# Kubernetes sets these for what the view of a Node says anyway: cordoned, not ready.
_SAID = ("node.kubernetes.io/unschedulable", "node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


@dataclass(frozen=True)
class Taint:
    """One taint that can keep a Pod away."""

    key: str
    value: str
    effect: str


def taints_of(spec: FieldReader) -> tuple[Taint, ...]:
    """Return the taints of a Node's spec that keep Pods away; Unreadable as for every field."""
    found = (Taint(t.text("key"), t.text("value"), t.text("effect")) for t in spec.objects("taints"))
    return tuple(t for t in found if t.effect in ("NoSchedule", "NoExecute") and t.key not in _SAID)


def tolerations_of(template: Mapping[str, Any] | None) -> list[Mapping[str, str]]:
    """Return the tolerations of a podTemplate; none where it cannot be read, as building the Pod says."""
    try:
        found = FieldReader(template or {}).object("spec").objects("tolerations")
        return [{key: t.text(key) for key in ("key", "operator", "value", "effect")} for t in found]
    except Unreadable:
        return []


def untolerated(taints: Iterable[Taint], tolerations: list[Mapping[str, str]]) -> Taint | None:
    """Return the first taint that no toleration covers."""
    return next((t for t in taints if not any(_covers(known, t) for known in tolerations)), None)


def _covers(toleration: Mapping[str, str], taint: Taint) -> bool:
    if toleration.get("effect") not in (None, "", taint.effect):
        return False
    exists = toleration.get("operator") == "Exists"
    if not toleration.get("key"):
        return exists
    if toleration["key"] != taint.key:
        return False
    return exists or (toleration.get("value") or "") == taint.value
