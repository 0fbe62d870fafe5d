# SPDX-License-Identifier: Apache-2.0
"""The table that `fedpipe plan` prints, as plain text cells."""

from dataclasses import dataclass

from fedpipe_api import units, wire
from fedpipe_api.job import Precision

from .format import batch, ranks, slow
from .request import Plan
from .speed import slowness


@dataclass(frozen=True)
class PlanRow:
    """One node of a plan."""

    node: str
    precision: str
    batch: str
    ranks: str
    memory: str
    round: str
    limited_by: str
    reason: str


def rows(plan: Plan) -> list[PlanRow]:
    """Return a row per node, planned ones first; a node left out says why in the last column."""
    found = []
    for name, node in plan.nodes.items():
        low, high = units.memory(node.predicted_bytes), units.memory(plan.budgets[name])
        if low.split()[1] == high.split()[1]:
            low = low.split()[0]
        found.append(
            PlanRow(
                node=name,
                precision=node.precision,
                batch=batch(node.micro_batch, node.accumulation) + (" ckpt" if node.checkpointing else ""),
                ranks=f"{len(node.ranks)} matrices, {ranks(node.ranks)}",
                memory=f"{low} of {high}",
                round=units.duration(node.predicted_round_seconds),
                limited_by=node.limited_by,
                reason=node.reason,
            )
        )
    for name, reason in plan.left_out.items():
        found.append(PlanRow(name, "–", "–", "–", "–", "–", f"does not fit: {reason}", reason))
    return found


def summary_line(plan: Plan) -> str:
    """Return the line under the table."""
    parts = [f"round deadline {units.duration(plan.deadline)}"]
    if plan.nodes:
        slowest = max(node.predicted_round_seconds for node in plan.nodes.values())
        parts += [
            f"slowest planned node {units.duration(slowest)}",
            f"upload {units.transfer(sum(plan.upload_bytes.values()))} per round",
            f"under-training {plan.under_training:.0%}".replace("%", " %"),
        ]
    else:
        parts.append("no node fits")
    if plan.provisional:
        parts.append("matrices are chosen after profiling; until then the largest are assumed")
    return " · ".join(parts)


def slow_line(device: wire.DeviceFacts, precision: Precision) -> str:
    """Return the warning of a precision that is slower than float32 on the device's CPU; "" for none."""
    found = slowness(device, precision)
    return slow(precision, found) if found > 1 else ""


def modules_line(model: wire.ModelShape) -> str:
    """Return which layers can be adapted and who chose them, and which precisions differ."""
    layers = dict.fromkeys(matrix.name.rpartition(".")[2] for matrix in model.matrices)
    chosen = {
        wire.ModulesFrom.JOB: "as spec.adapter.modules names them",
        wire.ModulesFrom.PEFT: f"peft's choice for {model.architecture}; spec.adapter.modules names others",
        wire.ModulesFrom.ALL_LINEAR: "all linear layers; spec.adapter.modules names others",
    }[model.modules_from]
    text = f"{model.parameters:,} parameters; weights to adapt: {', '.join(layers)} ({chosen})"
    left = [precision for precision in Precision if precision not in model.precisions]
    return text + (f"; {', '.join(left)} would change nothing" if left else "")
